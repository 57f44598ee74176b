"""A tiny random model, and records of a few made-up sources, one of which counts: every part, without a download."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .records import Record

END = "<|end|>"
VOCABULARY = 1024


def tiny_model() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A Llama of four narrow blocks, the same at each call, and a tokenizer made of generated records."""
    records = generated_records(200, seed=3)
    tokenizer = train_tokenizer([[record["prompt"], record["response"]] for record in records])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config), tokenizer


def train_tokenizer(texts: Sequence[Sequence[str]]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer made of some texts, with a token that ends a text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        chain.from_iterable(texts), vocab_size=VOCABULARY, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, pad_token=END)


def generated_records(count: int, *, seed: int) -> list[Record]:
    """Records of a few made-up sources, one of which counts: enough to run every part without a download."""
    draw = random.Random(seed)
    return [_generated(draw) for _ in range(count)]


def generated_target(count: int, *, seed: int) -> list[Record]:
    """Records of the source that counts."""
    draw = random.Random(seed)
    return [_counting(draw) for _ in range(count)]


def _generated(draw: random.Random) -> Record:
    return draw.choice([_counting, _naming, _spelling, _naming, _spelling])(draw)


def _counting(draw: random.Random) -> Record:
    first, second = draw.randrange(30), draw.randrange(30)
    return _record("count/sums", f"What is {first} and {second}?", f"It is {first + second}.")


def _naming(draw: random.Random) -> Record:
    thing, colour = draw.choice(_THINGS), draw.choice(("red", "green", "blue", "old", "new"))
    return _record("talk/names", f"Name something {colour}.", f"The {colour} {thing} that stands by the road.")


def _spelling(draw: random.Random) -> Record:
    thing = draw.choice(_THINGS)
    return _record("talk/letters", f"Spell the word {thing}.", "-".join(thing))


def _record(source: str, prompt: str, response: str) -> Record:
    return {"source": source, "prompt": prompt, "response": response}


_THINGS = ("house", "bicycle", "lantern", "mill", "garden", "wagon", "bridge", "letter", "kettle", "stone")
