"""A small selective optimizer to step with, and all that a step may change."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ftw_optim import GreedyFilter, SelectiveOptimizer
from tests.support.models import mlp

WAYS = ["factors", "graph"]


def build(combine: str = "factors", *, lr: float = 0.01, **options: Any) -> tuple[Any, SelectiveOptimizer]:
    case = mlp(torch.float64, 6)
    inner = options.pop("inner", torch.optim.AdamW)(case.model.parameters(), lr=lr)
    target = options.pop("target", case.target_losses)
    return case, SelectiveOptimizer(
        inner, case.model, target, **{"filter": GreedyFilter(keep=3), "combine": combine, **options}
    )


def snapshot(case: Any, optimizer: SelectiveOptimizer) -> Any:
    """Everything a step may change."""
    return copy.deepcopy(
        (
            list(case.model.parameters()),
            [p.grad for p in case.model.parameters()],
            optimizer.optimizer.state_dict(),
            optimizer.state_dict()["selective"],
        )
    )
