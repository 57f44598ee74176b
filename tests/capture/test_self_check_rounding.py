"""What rounding alone does to a step in short dtypes, which is no false alarm, and errors that it must not hide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import SelectiveOptimizer
from tests.support.capturing import squares
from tests.support.models import drawn, seeded

SHORT = [torch.bfloat16, torch.float16]
COMBINE = ["factors", "graph"]
SCALE = torch.tensor([1.0, 3.0, 0.2, 2.0, 0.5, 1.5])


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(rows + 10 * length))


class _Attention(nn.Module):
    """One block of attention over tokens, with a head; its matrices are in ``dtype``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        scores: Tensor = self.head(self.norm(x + mixed))
        return scores


class _Adapted(nn.Module):
    """A linear layer in a short dtype with a trained low-rank side path in float32, as PEFT builds them."""

    def __init__(self, base: nn.Linear, error: float = 0.0) -> None:
        super().__init__()
        self.base, self.error = base, error
        self.order: Tensor | slice = slice(None)  # in which rows are worked on, its own inverse
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.down.weight.dtype)
        hidden = self.down(wide[self.order])[self.order]
        if self.error:  # a part of the next row's activation finds its way into this one's
            hidden = hidden + self.error * hidden.roll(1, 0)
        return self.base(x) + self.up(hidden).to(x.dtype)


def _adapted(dtype: torch.dtype, error: float = 0.0) -> nn.Module:
    model = seeded(_Attention).to(dtype).requires_grad_(False)
    model.query, model.value = (_Adapted(layer, error) for layer in (model.query, model.value))
    return model


def _losses(model: nn.Module, tokens: Tensor, logits_in: torch.dtype = torch.float32) -> Tensor:
    logits = model(tokens)[:, :-1].to(logits_in)
    each = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(1)


def _optimizer(model: nn.Module, combine: str, target_rows: int = 2, **options: object) -> SelectiveOptimizer:
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return SelectiveOptimizer(inner, model, lambda: _losses(model, _tokens(target_rows, 8)), combine=combine, **options)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("combine", [*COMBINE, "rerun"])
@pytest.mark.parametrize("dtype", SHORT)
def test_adapters_in_float32_on_a_base_in_a_short_dtype(dtype: torch.dtype, combine: str, check: bool) -> None:
    model, tokens = _adapted(dtype), _tokens(6, 12)
    optimizer = _optimizer(model, combine, metric="euclidean", self_check=check)
    for seed in range(3):
        mixed = tokens[torch.randperm(6, generator=torch.Generator().manual_seed(seed))]
        optimizer.step(lambda rows=slice(None), mixed=mixed: _losses(model, mixed[rows]))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("dtype", SHORT)
def test_logits_and_losses_in_a_short_dtype_after_layers_in_float32(dtype: torch.dtype, combine: str) -> None:
    model = seeded(_Attention)
    tokens = _tokens(6, 12)
    optimizer = _optimizer(model, combine)
    optimizer.step(lambda: _losses(model, tokens).to(dtype))
    optimizer.step(lambda: _losses(model, tokens, dtype).float())


@pytest.mark.parametrize("first", [1, 6])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_one_token(dtype: torch.dtype, combine: str, first: int) -> None:
    """Of query and key projections nothing but rounding arrives, as there is one key to attend to."""
    model = seeded(_Attention).to(dtype)

    def losses(tokens: Tensor) -> Tensor:
        return functional.cross_entropy(model(tokens)[:, -1].double(), tokens[:, 0].flip(0), reduction="none")

    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), model, lambda: losses(_tokens(2, 6)), combine=combine
    )
    for length in (first, 1):
        optimizer.step(lambda length=length: losses(_tokens(5, length)))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
def test_a_twentieth_of_another_row_is_found(dtype: torch.dtype, combine: str) -> None:
    model, tokens = _adapted(dtype, error=0.05), _tokens(6, 12)
    optimizer = _optimizer(model, combine)
    with pytest.raises(RuntimeError, match=r"Self-check.*down"):
        optimizer.step(lambda: _losses(model, tokens) * SCALE)


@pytest.mark.parametrize("seed", range(8))
def test_two_rows_of_many_that_change_places_are_found(seed: int) -> None:
    """In float32 no two losses have the same weight."""
    model, tokens = _adapted(torch.float32), _tokens(24, 12)
    model.value.order = torch.arange(24)
    model.value.order[[2 * seed, 2 * seed + 1]] = torch.tensor([2 * seed + 1, 2 * seed])
    optimizer = _optimizer(model, "factors", target_rows=24)
    with pytest.raises(RuntimeError, match=r"Self-check.*value\.down"):
        optimizer.step(lambda: _losses(model, tokens))


@pytest.mark.parametrize(("size", "checks"), [(1e4, 1), (1.0, 5)])
def test_a_layer_is_vouched_for_once_any_of_its_gradients_is_more_than_rounding(size: float, checks: int) -> None:
    """The bias's gradient is far below the largest; the weight's is too, unless the inputs are large."""

    class Sided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.side, self.last = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if hidden.requires_grad:
                hidden.register_hook(self._count)
            scores: Tensor = self.last(hidden) + 1e-9 * self.side(size * x)
            return scores

        def _count(self, gradient: Tensor) -> None:
            self.passes += 1

    model, x = seeded(Sided), drawn(6, 3).float()
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, lambda: squares(model, x[:2]), combine="factors"
    )
    counts = []
    for _ in range(8):
        model.passes = 0
        optimizer.step(lambda: squares(model, x))
        counts.append(model.passes)
    assert counts == [counts[-1] + 1] * checks + [counts[-1]] * (8 - checks)
