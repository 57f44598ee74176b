"""The matching problem of one step.

Capture and the Gram matrix end in a :class:`Matching`; the filter and weight stages start from it and see nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """The update-matching problem of one step: minimise ``w @ gram @ w / 2 - cross_gram @ w`` over ``w >= 0``.

    It is all that a stage sees. Rejected candidates are not part of it. Tensors are on the CPU, in the dtype they were
    accumulated in: its precision tells a solver which differences are rounding.

    Attributes:
        gram: shape ``(n, n)``, ``<g_i, M g_j>`` in the metric ``M``; symmetric, positive semi-definite.
        cross_gram: shape ``(n,)``, ``<g_i, M target>``.
        target_energy: ``<target, M target>``.
        losses: shape ``(n,)``, the candidates' own losses.
        generator: random numbers for stages that draw; seeded anew for each step.
        cross_gram_error: shape ``(n,)``, the standard error of ``cross_gram`` where it is estimated from target rows in
            the step, zero for these rows themselves; None where it is exact.
        offered: number of candidates that were offered, with the rejected ones; ``n`` unless given.
        stale: whether the target gradient is formed no more (``TargetGradient(until=)``): it is of parameters that the
            model had before, and the longer that is ago, the less it tells.
    """

    gram: Tensor
    cross_gram: Tensor
    target_energy: float
    losses: Tensor
    generator: torch.Generator
    offered: int = -1
    cross_gram_error: Tensor | None = None
    stale: bool = False

    def __post_init__(self) -> None:
        n = self.cross_gram.shape[0] if self.cross_gram.ndim == 1 else -1
        if self.gram.shape != (n, n) or self.losses.shape != (n,):
            raise ValueError(
                "Expected gram (n, n), cross_gram (n,) and losses (n,), got "
                f"{tuple(self.gram.shape)}, {tuple(self.cross_gram.shape)} and {tuple(self.losses.shape)}."
            )
        if self.cross_gram_error is not None and self.cross_gram_error.shape != (n,):
            raise ValueError(f"Expected cross_gram_error ({n},), got {tuple(self.cross_gram_error.shape)}.")
        if self.offered < 0:
            object.__setattr__(self, "offered", n)

    def __len__(self) -> int:
        return self.cross_gram.shape[0]

    def restrict(self, kept: Tensor) -> Matching:
        """This problem restricted to the candidates in ``kept`` (int64, shape ``(k,)``), in that order."""
        return replace(
            self,
            # Not by brackets: they take twice as long for a small problem.
            gram=self.gram.index_select(0, kept).index_select(1, kept),
            cross_gram=self.cross_gram.index_select(0, kept),
            losses=self.losses.index_select(0, kept),
            cross_gram_error=None if self.cross_gram_error is None else self.cross_gram_error.index_select(0, kept),
        )
