"""Layers and models that several tests capture: small, each with one thing that makes it hard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.models import seeded


class Scaled(nn.Embedding):
    """As Gemma's: rows times a constant."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.5


class OneMinus(nn.Module):
    """A family's own RMSNorm, with the weight around one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.4, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class TiedByHand(nn.Module):
    """A head that reads the embedding's weight instead of calling a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.middle(self.tokens(ids)), self.tokens.weight)


class Scale(nn.Module):
    """``y = scale * f(x)``, with a function that each test chooses; its output is no longer linear in the rest."""

    def __init__(self, width: int = 4, function: Any = torch.tanh) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.linspace(0.5, 1.5, width)), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.scale * x)


def model_with(layer: nn.Module) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))).double()


class LateInfinity(nn.Module):
    """The gradient of a row whose first input is zero is infinite, in the first layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        away = torch.sqrt(hidden - hidden.detach() + (x[:, :1] != 0))
        scores: Tensor = self.last(torch.tanh(hidden) + away)
        return scores
