"""The small problem between the two halves of the library, and its outcome.

Capture and the Gram matrix end in a :class:`Matching`; the filter and weight stages start from one and see nothing
else. A :class:`Selection` is what a step reports to its user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """The update-matching problem of one step: minimise ``w @ gram @ w / 2 - cross_gram @ w`` over ``w >= 0``.

    All that a stage ever sees. Rejected candidates are not in it. Tensors are on the CPU, in the dtype they were
    accumulated in: its precision tells a solver which differences are rounding.

    Attributes:
        gram: shape ``(n, n)``, ``<g_i, M g_j>`` in the metric ``M``; symmetric, positive semi-definite.
        cross_gram: shape ``(n,)``, ``<g_i, M target>``.
        target_energy: ``<target, M target>``.
        losses: shape ``(n,)``, the candidates' own losses.
        generator: random numbers for stages that draw; seeded anew for each step.
        offered: how many candidates were offered, the rejected included; ``n`` unless given.
    """

    gram: Tensor
    cross_gram: Tensor
    target_energy: float
    losses: Tensor
    generator: torch.Generator
    offered: int = -1

    def __post_init__(self) -> None:
        n = self.cross_gram.shape[0] if self.cross_gram.ndim == 1 else -1
        if self.gram.shape != (n, n) or self.losses.shape != (n,):
            raise ValueError(
                "Expected gram (n, n), cross_gram (n,) and losses (n,), got "
                f"{tuple(self.gram.shape)}, {tuple(self.cross_gram.shape)} and {tuple(self.losses.shape)}."
            )
        if self.offered < 0:
            object.__setattr__(self, "offered", n)

    def __len__(self) -> int:
        return self.cross_gram.shape[0]

    def restrict(self, kept: Tensor) -> Matching:
        """The same problem for the candidates in ``kept`` (int64, shape ``(k,)``) alone, in that order."""
        return replace(
            self,
            gram=self.gram[kept][:, kept],
            cross_gram=self.cross_gram[kept],
            losses=self.losses[kept],
        )


@final
@dataclass(frozen=True, kw_only=True)
class SketchReport:
    """How the Gram matrix of a selection was estimated.

    Attributes:
        dim: numbers for each candidate.
        error: measured standard error of an inner product, over the norms of its two gradients; root mean square over
            all pairs of candidates and target.
    """

    dim: int
    error: float


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What the last backward chose, and how well it met the target. Tensors are small, detached and on the CPU.

    Attributes:
        losses: shape ``(n,)``, the candidates' own losses, in the order of the closure.
        kept: shape ``(k,)`` int64, indices of the kept candidates in picking order.
        weights: shape ``(k,)``, as applied; zero for a candidate that the weight stage gave no share.
        fitted_scale: sum of the fitted weights before normalisation; 1 means that the target asks for a gradient
            as long as the weighted mean of the kept ones.
        gram: shape ``(n, n)`` in the optimizer's ``metric``; rows and columns of rejected candidates are zero.
        cross_gram: shape ``(n,)``, inner products with the target gradient, zero for rejected candidates.
        target_energy: squared norm of the target gradient in the metric.
        cosine: of the applied gradient with the target gradient, in the metric; 0 where either vanishes.
        residual: ``1 - max(0, cosine) ** 2``, the share of the target energy no rescaling could match, in [0, 1].
        predicted_decrease: of the target loss, in its unit, under the curvature the optimizer assumes.
        effective_size: one over the sum of the squared normalised weights; 0 when skipped.
        rejected: indices of candidates with a non-finite loss or gradient, int64.
        skipped: nothing was applied.
        converged: the weight stage reached its tolerance.
        update: where the applied gradient came from: ``"factors"``, ``"graph"``, ``"rerun"`` or ``"skipped"``.
        sketch: how the products above were estimated; None where they are exact.
        milliseconds: by phase, as the host sees them: ``target``, ``candidates`` (their forward and backward pass),
            ``gram``, ``solve`` (filter and weights, and waiting for the Gram system on an accelerator), ``combine``.
    """

    losses: Tensor
    kept: Tensor
    weights: Tensor
    fitted_scale: float
    gram: Tensor
    cross_gram: Tensor
    target_energy: float
    cosine: float
    residual: float
    predicted_decrease: float
    effective_size: float
    rejected: Tensor
    skipped: bool
    converged: bool
    update: str
    sketch: SketchReport | None = None
    milliseconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def nothing(cls, losses: Tensor, accepted: Tensor) -> Selection:
        """The outcome where there is nothing to match; ``accepted`` is False where a candidate was rejected."""
        n = len(losses)
        return cls(
            losses=losses,
            kept=torch.empty(0, dtype=torch.int64),
            weights=torch.empty(0, dtype=torch.float64),
            fitted_scale=0.0,
            gram=torch.zeros(n, n),
            cross_gram=torch.zeros(n),
            target_energy=0.0,
            cosine=0.0,
            residual=1.0,
            predicted_decrease=0.0,
            effective_size=0.0,
            rejected=(~accepted).nonzero()[:, 0],
            skipped=True,
            converged=True,
            update="skipped",
        )

    def applied_by(self, update: str | None) -> Selection:
        """The same selection, applied in that way; None: it cannot be applied, and is skipped."""
        if update is not None:
            return replace(self, update=update)
        return replace(
            self,
            weights=torch.zeros_like(self.weights),
            cosine=0.0,
            residual=1.0,
            predicted_decrease=0.0,
            effective_size=0.0,
            skipped=True,
        )

    def weighted_loss(self) -> Tensor:
        """The kept losses under weights that sum to one; skipped: the mean of the finite ones; all rejected: NaN."""
        if not self.skipped:
            share = (self.weights / self.weights.sum()).to(self.losses)
            return (share * self.losses[self.kept]).sum()
        accepted = torch.ones(len(self.losses), dtype=torch.bool)
        accepted[self.rejected] = False
        return self.losses[accepted].mean() if bool(accepted.any()) else self.losses.new_full((), torch.nan)
