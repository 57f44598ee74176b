"""Parameters without entries, as layers of size zero have: they have no share, and the step is that of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, Sketch, UniformWeights


class Own(nn.Module):
    """Owns a parameter without entries beside one with them, and has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.scale = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.nothing.sum()


class WithEmpty(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(5, 8), nn.Linear(8, 3)
        self.extra: Any = {
            "linear to nothing": lambda: nn.Linear(8, 0),
            "linear of nothing": lambda: nn.Linear(0, 8),
            "embedding of width 0": lambda: nn.Embedding(4, 0),
            "norm of width 0": lambda: nn.LayerNorm(0),
            "a module of its own": Own,
            "none": nn.Identity,
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.kind == "linear to nothing":
            hidden = hidden + self.extra(hidden).sum(-1, keepdim=True)
        elif self.kind == "linear of nothing":
            hidden = hidden + self.extra(x[:, :0]) - self.extra.bias.detach()
        elif self.kind == "embedding of width 0":
            hidden = hidden + self.extra(torch.zeros(len(x), 2, dtype=torch.int64)).sum((1, 2))[:, None]
        elif self.kind == "norm of width 0":
            hidden = hidden + self.extra(hidden[:, :0]).sum(-1, keepdim=True)
        else:
            hidden = self.extra(hidden)
        logits: Tensor = self.last(hidden)
        return logits


KINDS = [
    "linear to nothing",
    "linear of nothing",
    "embedding of width 0",
    "norm of width 0",
    "a module of its own",
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch, on such a layer
@pytest.mark.parametrize("gram", ["exact", Sketch(dim=16)], ids=str)
@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_made_and_with_all_alike_it_is_the_bare_one(kind: str, combine: str, gram: Any) -> None:
    x, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = WithEmpty(kind)

        def losses(rows: Any = slice(None), model: nn.Module = model) -> Tensor:
            return functional.cross_entropy(model(x[rows]), y[rows], reduction="none")

        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        if wrapped:
            options: dict[str, Any] = {"filter": KeepAll(), "weight": UniformWeights()}
            optimizer = SelectiveOptimizer(
                inner, model, lambda losses=losses: losses(slice(2)), combine=combine, gram=gram, **options
            )
            for _ in range(3):
                optimizer.step(losses)
            optimizer.filter = GreedyFilter(keep=2)
            optimizer.backward(losses)
            assert optimizer.selection is not None
            assert not optimizer.selection.skipped
        else:
            for _ in range(3):
                inner.zero_grad()
                losses().mean().backward()
                inner.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
