"""Models and batches that several tests share: small, random, in float64 unless asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ftw_optim import token_losses

VOCABULARY = 31
Rows = Tensor | None


class Wide(TorchFunctionMode):
    """Makes code that asks for float32 by name compute in float64, as the families' norms and softmaxes do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Everything inside computes in ``dtype`` at least."""
    if dtype == torch.float64:
        with Wide():
            yield
    else:
        yield


@dataclass(frozen=True)
class Case:
    """A model with candidates and a target, and the losses of some rows of either."""

    model: nn.Module
    candidates: dict[str, Tensor]
    target: dict[str, Tensor]
    losses_of: Callable[[nn.Module, dict[str, Tensor]], Tensor]

    def losses(self, rows: Rows = None) -> Tensor:
        return self.losses_of(self.model, _rows(self.candidates, rows))

    def target_losses(self, rows: Rows = None) -> Tensor:
        return self.losses_of(self.model, _rows(self.target, rows))

    @property
    def n(self) -> int:
        return len(next(iter(self.candidates.values())))


def _rows(batch: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    return batch if rows is None else {key: value[rows] for key, value in batch.items()}


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (part.view(n, t, 2, width // 2).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(n, t, width)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))


class SmallGPT(nn.Module):
    """Learned positions looked up once for all rows, and a head tied to the embedding."""

    def __init__(self, *, width: int = 8, depth: int = 2, dropout: float = 0.0, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, **unused: Any) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Gain(nn.Module):
    """A scale with a bend, which no rule knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.gain)


class MLP(nn.Module):
    """Two-dimensional inputs, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        logits: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.middle(x)))))
        return logits


class RowGradients(nn.Module):
    """A loss whose gradient is the row itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        losses: Tensor = self.layer(x)[:, 0]
        return losses


def mlp(dtype: torch.dtype, n: int) -> Case:
    generator = torch.Generator().manual_seed(3)

    def batch(rows: int) -> dict[str, Tensor]:
        return {
            "x": torch.randn(rows, 5, dtype=dtype, generator=generator),
            "y": torch.randint(3, (rows,), generator=generator),
        }

    return Case(
        seeded(MLP).to(dtype),
        batch(n),
        batch(3),
        lambda model, rows: functional.cross_entropy(model(rows["x"]), rows["y"], reduction="none"),
    )


def language_model(model: nn.Module, n: int, *, padded: bool = True) -> Case:
    """Candidates and targets with padding on both sides, unless without any, and prompts without labels."""
    generator = torch.Generator().manual_seed(4)

    common = torch.randint(1, VOCABULARY, (3,), generator=generator)

    def batch(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(1, VOCABULARY, (rows, 7), generator=generator)
        ids[:, 2:5] = common  # so that candidates are of use to the target
        mask = torch.ones_like(ids)
        if padded:
            mask[1 % rows, 5:] = 0
            mask[2 % rows, :2] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, :3] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return Case(model, batch(n), batch(3), token_losses)


def small_gpt(dtype: torch.dtype, n: int) -> Case:
    return language_model(seeded(SmallGPT).to(dtype), n)


def transformers_model(family: str, *, lora: bool = False) -> Callable[[torch.dtype, int], Case]:
    def build(dtype: torch.dtype, n: int) -> Case:
        return language_model(_transformers(family, lora=lora).to(dtype), n)

    return build


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def _transformers(family: str, *, lora: bool) -> nn.Module:
    from tests.support.families import model_of  # here, since it is built upon this module

    model = model_of(family)
    if lora:
        model = seeded(lambda: with_lora(model))
    return model.train()


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """LoRA on all linear layers or as the options say, with a B that is not zero."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on what it reads from transformers, and on Conv1D's stored layout
        options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "target_modules": "all-linear", **options}
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


CASES: dict[str, Callable[[torch.dtype, int], Case]] = {
    "mlp": mlp,
    "small-gpt": small_gpt,
    "llama": transformers_model("llama"),
    "qwen3-tied": transformers_model("qwen3"),
    "gemma3": transformers_model("gemma3"),
    "gpt2-tied": transformers_model("gpt2"),
    "llama-lora": transformers_model("llama", lora=True),
    "gpt2-lora": transformers_model("gpt2", lora=True),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, the same at each call."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cases() -> dict[str, Callable[[], Case]]:
    """Eight candidates each, in float64."""
    return {
        "mlp": lambda: mlp(torch.float64, 8),
        "tied, shared positions": lambda: language_model(seeded(SmallGPT).double(), 8),
        "llama with lora": lambda: transformers_model("llama", lora=True)(torch.float64, 8),
    }


def trained(case: Case) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in case.model.named_parameters() if p.requires_grad}


def in_batches(case: Case, sizes: list[int]) -> Callable[..., Any]:
    """A closure that gives its candidates, or some of them, in micro-batches."""

    def closure(rows: Tensor | None = None) -> Iterator[Tensor]:
        chosen = torch.arange(sum(sizes)) if rows is None else rows
        for part in chosen.split(sizes if rows is None else 2):
            yield case.losses(part)

    return closure
