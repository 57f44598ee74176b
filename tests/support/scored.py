"""A small random model, its tokenizer and records: all that ``ftw_optim.score`` is called with."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with a token for each byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def small_llama(*, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A Llama of three narrow blocks, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def text_records(count: int, *, seed: int, source: str | None = None) -> list[dict[str, Any]]:
    """Records of two sources, sums and greetings, or of one of them."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        kind = source or draw.choice(("sums", "greetings"))
        a, b = draw.randrange(50), draw.randrange(50)
        prompt, response = (f"{a}+{b}=", str(a + b)) if kind == "sums" else (f"hi {a}", f"hello number {a}")
        found.append({"prompt": prompt, "response": response, "source": kind})
    return found


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines, compressed where the name says so."""
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
