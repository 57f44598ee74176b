"""The outcome of a step, as its user sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor


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
        combine: where the applied gradient came from: ``"factors"``, ``"graph"``, ``"rerun"`` or ``"skipped"``.
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
    combine: str
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
            combine="skipped",
        )

    def applied_by(self, way: str | None) -> Selection:
        """The same selection, applied in that way; None: it cannot be applied, and is skipped."""
        if way is not None:
            return replace(self, combine=way)
        return replace(
            self,
            weights=torch.zeros_like(self.weights),
            cosine=0.0,
            residual=1.0,
            predicted_decrease=0.0,
            effective_size=0.0,
            skipped=True,
        )

    def spread_weights(self) -> Tensor:
        """The weights of all candidates, shape ``(n,)`` float64: zero for those that are not kept."""
        weights = torch.zeros(len(self.losses), dtype=torch.float64)
        weights[self.kept] = self.weights
        return weights

    def weighted_loss(self) -> Tensor:
        """The kept losses under weights that sum to one; skipped: the mean of the finite ones; all rejected: NaN."""
        if not self.skipped:
            share = (self.weights / self.weights.sum()).to(self.losses)
            return (share * self.losses[self.kept]).sum()
        accepted = torch.ones(len(self.losses), dtype=torch.bool)
        accepted[self.rejected] = False
        return self.losses[accepted].mean() if bool(accepted.any()) else self.losses.new_full((), torch.nan)
