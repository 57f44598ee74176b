"""Tiny random models of the families that people fine-tune, with the losses that each is trained by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.models import VOCABULARY, Case, language_model, seeded, with_lora

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 4, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3Text", {**SIZES, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}),
    "phi3": ("Phi3", SIZES),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 8,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            **{key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
    ),
    "bert": ("Bert", {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "t5": (
        "T5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "relative_attention_num_buckets": 8,
        },
    ),
    "mixtral": ("Mixtral", {**SIZES, **EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**SIZES, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 6}),
    "gpt-oss": (
        "GptOss",
        {**SIZES, **EXPERTS, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 4,
            "expand": 2,
            "state_size": 4,
            "n_groups": 2,
            "chunk_size": 4,
            **{key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
    ),
    "mamba": (
        "Mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "state_size": 4,
            **{key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
    ),
    "whisper": (
        "Whisper",
        {
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "num_mel_bins": 4,
            "max_source_positions": 6,
            "max_target_positions": 16,
            "dropout": 0.0,
            "decoder_start_token_id": 1,
            "use_cache": False,  # older releases fill a cache that has no layers
            **{key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
    ),
    "vit": (
        "ViT",
        {
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 5,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
}
HEADS = {
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "gemma3": "Gemma3ForCausalLM",
}
LORA_TARGETS: dict[str, Any] = {"mamba2": ["in_proj"], "mamba": ["in_proj"]}
"""Where LoRA is put; on all linear layers by default."""


def model_of(family: str, **changes: Any) -> nn.Module:
    """A random model in training mode, in float32."""
    import transformers  # here, since importing it takes seconds that most tests need not spend

    name, options = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**{**options, **changes})
    head = HEADS.get(family, f"{name}ForCausalLM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = seeded(lambda: getattr(transformers, head)(config))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # zeros and ones would hide mistakes
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def checkpoint_blocks(model: Any, *, reentrant: bool) -> None:
    """Let a model of Transformers checkpoint its blocks, under the name that the installed release has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (model.gradient_checkpointing_enable if new is None else new)({"use_reentrant": reentrant})


def family(name: str, dtype: torch.dtype, n: int, *, lora: bool = False, **changes: Any) -> Case:
    """A model of a family with candidates and a target."""
    model = model_of(name, **changes)
    if lora:
        model = seeded(lambda: with_lora(model, target_modules=LORA_TARGETS.get(name, "all-linear")))
    return case_of(name, model.to(dtype), n)


def case_of(name: str, model: nn.Module, n: int) -> Case:
    """Candidates and a target for a model of a family."""
    if name in ("bert", "t5", "whisper", "vit"):
        generator = torch.Generator().manual_seed(4)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        candidates, target = (BATCHES[name](rows, generator, dtype) for rows in (n, 3))
        return Case(model, candidates, target, labelled_losses)
    # Mamba leaves out the padding mask where it gets one row alone.
    return language_model(model, n, padded="mamba" not in name)


def labelled_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each row, of a classifier or of labels beside their logits, without a shift."""
    labels = batch["labels"]
    output: Any = model(**{key: value for key, value in batch.items() if key != "labels"})
    if labels.ndim == 1:
        return functional.cross_entropy(output.logits, labels, reduction="none")
    losses = functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def _tokens(rows: int, length: int, generator: torch.Generator) -> Tensor:
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    ids[:, 2:5] = torch.tensor([7, 3, 11])  # so that candidates are of use to the target
    return ids


def _masked(rows: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    ids = _tokens(rows, 7, generator)
    mask = torch.ones_like(ids)
    mask[1 % rows, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2, "labels": ids}


def _translated(rows: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    ids, answers = _tokens(rows, 7, generator), _tokens(rows, 6, generator)
    return {"input_ids": ids, "decoder_input_ids": answers, "labels": answers.roll(-1, 1)}


def _transcribed(rows: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    sound, answers = torch.randn(rows, 4, 12, generator=generator).to(dtype), _tokens(rows, 6, generator)
    return {"input_features": sound, "decoder_input_ids": answers, "labels": answers.roll(-1, 1)}


def _classified(rows: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    pixels = torch.randn(rows, 3, 8, 8, generator=generator).to(dtype)
    return {"pixel_values": pixels, "labels": torch.randint(5, (rows,), generator=generator)}


BATCHES: dict[str, Callable[[int, torch.Generator, torch.dtype], dict[str, Tensor]]] = {
    "bert": _masked,
    "t5": _translated,
    "whisper": _transcribed,
    "vit": _classified,
}
