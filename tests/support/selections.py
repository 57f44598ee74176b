"""Selections that no step has made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim import Selection


def selection(step: int, *, n: int = 5, keep: int = 2, **changes: Any) -> Selection:
    """A selection with numbers that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.rand(keep, generator=generator, dtype=torch.float64) + 0.1
    fields: dict[str, Any] = {
        "losses": torch.rand(n, generator=generator),
        "kept": torch.randperm(n, generator=generator)[:keep],
        "weights": weights / weights.sum(),
        "fitted_scale": 0.7,
        "gram": torch.eye(n),
        "cross_gram": torch.randn(n, generator=generator),
        "target_energy": 2.0,
        "cosine": 0.5,
        "residual": 0.75,
        "predicted_decrease": 1e-3,
        "effective_size": 1.5,
        "rejected": torch.empty(0, dtype=torch.int64),
        "skipped": False,
        "converged": True,
        "combine": "factors",
    }
    return Selection(**{**fields, **changes})


def of_scores(scores: Tensor, lengths: Tensor | None = None, **changes: Any) -> Selection:
    """A selection with these scores, of gradients of these lengths; None: of lengths that are not one."""
    n = len(scores)
    squares = torch.linspace(0.5, 4.0, n, dtype=torch.float64) if lengths is None else lengths.double().square()
    gram, energy = torch.diag(squares), 9.0
    cross_gram = scores.double() * (squares * energy).sqrt()
    return selection(
        0, **{"n": n, "keep": 1, "gram": gram, "cross_gram": cross_gram, "target_energy": energy, **changes}
    )
