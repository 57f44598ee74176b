"""Small configurations: the defaults of a family with every size in them made small, by the names that sizes have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 64
LENGTH = 8
WIDTH, HEADS, INNER = 32, 4, 48
HEAD = WIDTH // HEADS

RULES: list[tuple[str, Any]] = [
    (r"type_vocab_size|num_labels", None),
    (r".*vocab(_size)?.*|n_token", VOCABULARY),
    (r"(mamba_)?expand", 1),
    (r"num_kv_shared_layers", 0),
    (r"qk_head_dim", 2 * HEAD),
    (r"rotary_dim|.*head_?dim.*|.*head_size|.*d_head|d_kv|kv_channels|.*_(key|value)_dim", HEAD),
    (r"(n|num|moe|topk).*_groups?|n_group|topk_group|.*_ngroups", 1),
    (r"num_experts_per_tok(en)?.*|num_selected_experts", 2),
    (r".*moe_topk|moe_k|moe_top_k|top_k|.*top_k_experts|router_topk", 2),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_hash_layers", 1),
    (r".*experts|zero_expert_num", 4),
    (r".*lora_rank|.*_rank|lora_dim", HEAD),
    (r".*heads?|n_heads?", HEADS),
    (r".*intermediate_size.*|.*ffn_dim.*|.*ffn_(hidden_)?size|feed_forward_size", INNER),
    (r"d_ff|dff|dim_ff|d_inner|n_inner", INNER),
    (r".*ffn_hidden.*|expert_dim|.*mlp_hidden_.*|.*_mlp_dim|inner_dim", INNER),
    (r".*(hidden_size|hidden_dim|embd|d_model|embedding_size|embedding_dim|embed_dim|emb_dim|proj_dim)(_.*)?", WIDTH),
    (r"dim|width|d_embed|d_proj|.*latents|lru_width|.*bottleneck_size|dim_model", WIDTH),
    (r".*max_.*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length|.*max_sequence_length", 64),
    (r".*state_size|.*d_state|ssm_state.*", HEAD),
    (r".*chunk_size.*|.*attn_chunk_length|.*block_size|.*window.*|.*_chunk_len", 4),
    (r"image_size|.*frame_size", 16),
    (r"patch_size", 8),
    (r".*_mel_bins", 8),
]
"""Sizes of attributes by their names, the first that matches; None leaves one as it is. Only larger values change."""

MISSING = {"head_dim": HEAD, "num_key_value_heads": HEADS}
"""Where a default leaves to the code what not all code works out."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config.head_dim": 2 * HEAD,
        "audio_config.adapter_in_dim": WIDTH,
        "vision_config.adapter_in_dim": WIDTH,
        "vision_config.adapter_input_size": WIDTH,
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": VOCABULARY - 1, "pad_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": WIDTH},
    "funnel": {"block_sizes": [1, 1, 1]},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"use_cache": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": WIDTH // 8, "shape_size": WIDTH // 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},  # of which each of six coordinates has an eighth
    "mistral4": {"qk_rope_head_dim": HEAD // 2},
    "musicgen": {"decoder.num_codebooks": 1},
    "musicgen_melody": {"decoder.num_codebooks": 1},
    "neomme": {"rope_parameters.full_attention.partial_rotary_factor": 0.5},
    "perceiver": {"max_position_embeddings": LENGTH},
    "qwen4_exp": {
        f"text_config.indexer_{key}": value
        for key, value in (("n_heads", 2), ("kv_heads", 1), ("head_dim", HEAD), ("budget", 4), ("compress_ratio", 2))
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [2, LENGTH // 2],
        "axial_pos_embds_dim": [WIDTH // 2, WIDTH // 2],
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,  # without it each pass draws other buckets
        "num_buckets": 2,
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 3200,
        "acoustic_tokenizer_encoder_config.num_filters": 1,
        "semantic_tokenizer_encoder_config.num_filters": 1,
    },
    "xlstm": {"mode": "train", "hidden_size": 2 * WIDTH, "embedding_dim": 2 * WIDTH, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
    },
}
"""What no rule of names says, by family; dotted for configurations within the configuration."""

LAYERS = re.compile(
    r"n_layers?|(num_)?(encoder|decoder)_layers|num(_hidden)?_layers|num_blocks|num_layers_per_stack|.*_depth"
)
KEY_VALUE_HEADS = re.compile(r".*(key_value|kv)_heads")
TOKEN = re.compile(r".*_tokens?_(ids?|index)")
RANDOM = re.compile(r".*(dropout|drop|pdrop|layerdrop|jitter|noise|drop_path).*")


def overridden(family: str, small: dict[str, Any]) -> dict[str, Any]:
    """The small configuration with what ``OVERRIDES`` says of its family."""
    for path, value in OVERRIDES.get(family, {}).items():
        *parents, last = path.split(".")
        part = small
        for parent in parents:
            part = part[parent]
        part[last] = value
    return small


def smaller(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration with small sizes, no dropout, and one layer of each kind."""
    depth = next((value for key, value in config.items() if LAYERS.fullmatch(key) and _is_count(value)), 0)
    chosen = _layers_of_each_kind(config, depth)
    small: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            small[key] = smaller(value)
        elif key == "per_layer_config" and isinstance(value, dict):
            by_layer = {int(old): entries for old, entries in value.items()}
            small[key] = {new: smaller(by_layer[old]) for new, old in enumerate(chosen) if old in by_layer}
        elif isinstance(value, list) and depth > 1 and len(value) == depth:
            small[key] = [_sized(key, value[index]) for index in chosen]
        elif LAYERS.fullmatch(key) and _is_count(value):
            small[key] = min(value, len(chosen))
        elif KEY_VALUE_HEADS.fullmatch(key) and _is_count(value):
            small[key] = HEADS if value == config.get("num_attention_heads") else min(value, HEADS // 2)
        elif TOKEN.fullmatch(key):
            small[key] = _token(key, value)
        elif RANDOM.fullmatch(key) and isinstance(value, float):
            small[key] = 0.0
        else:
            small[key] = _sized(key, value)
    return small


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layers_of_each_kind(config: Mapping[str, Any], depth: int) -> list[int]:
    """Two layers at least, and the first of each kind where the configuration lists a kind for each layer."""
    kinds = [value for value in config.values() if isinstance(value, list) and len(value) == depth > 1]
    seen: dict[Any, int] = {}
    for index in range(depth):
        seen.setdefault(repr([kind[index] for kind in kinds]), index)
    chosen = sorted(seen.values())[:4]
    while len(chosen) < 2:
        chosen = sorted({*chosen, *(index for index in range(max(depth, 2)) if index not in chosen)})[:2]
    return chosen


def _sized(key: str, value: Any) -> Any:
    if value is None:
        return MISSING.get(key)
    if not _is_count(value):
        return value
    for pattern, size in RULES:
        if re.fullmatch(pattern, key):
            return value if size is None else min(value, size)
    return value


def _token(key: str, value: Any) -> Any:
    """Special tokens within the vocabulary; those that no text has lie at its end."""
    if isinstance(value, list):
        return [_token(key, one) for one in value]
    if not _is_count(value) or value < VOCABULARY // 2:
        return value
    return VOCABULARY - 1 - sum(map(ord, key)) % 16
