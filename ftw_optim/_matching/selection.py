"""The outcome of one selection, as users see it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

_NOTHING = torch.empty(0, dtype=torch.float64)


@final
@dataclass(frozen=True, kw_only=True)
class SketchReport:
    """The sketch with which the Gram matrix of a selection was estimated.

    Attributes:
        dim: numbers kept for each candidate.
        error: measured standard error of an inner product, relative to the norms of its two gradients; root mean square
            over all pairs of candidates and target.
    """

    dim: int
    error: float


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The outcome of one selection: the kept candidates, their weights, and how well they meet the target.

    Tensors are small, detached and on the CPU.

    Attributes:
        losses: shape ``(n,)``, the candidates' own losses, in the order of the closure.
        kept: shape ``(k,)`` int64, indices of the kept candidates in picking order.
        weights: shape ``(k,)``, the applied weights; zero for a candidate to which the weight stage gave none.
        fitted_scale: sum of the fitted weights before normalisation; 1 means that the best fit to the target is as long
            as the weighted mean of the kept gradients.
        gram: shape ``(n, n)`` in the optimizer's ``metric``; rows and columns of rejected candidates are zero.
        cross_gram: shape ``(n,)``, inner products with the target gradient, zero for rejected candidates.
        target_energy: squared norm of the target gradient in the metric.
        cosine: cosine of the applied gradient with the target gradient, in the metric; 0 where either vanishes.
        residual: ``1 - max(0, cosine) ** 2``, the share of the target energy that no rescaling could match, in [0, 1].
        predicted_decrease: decrease of the target loss, in its unit, under the curvature that the optimizer assumes.
        effective_size: one over the sum of the squared normalised weights; 0 when skipped.
        rejected: indices of candidates with a non-finite loss or gradient, int64.
        skipped: whether nothing was applied.
        converged: whether the weight stage reached its tolerance.
        combine: where the applied gradient came from: ``"factors"``, ``"graph"``, ``"rerun"`` or ``"skipped"``.
        target_weights: shape ``(m,)``, the applied weights of the target rows where these take part in the step, which
            sum to one together with ``weights``; else empty.
        target_losses: shape ``(m,)``, the losses of these rows; else empty.
        guide_loss: the mean loss of the target rows that guide, at the last look at held-out rows; NaN before the first
            look, or where there are none.
        held_out_loss: the mean loss of the held-out rows at the last look.
        blind: whether the former is below the latter by more than two standard errors, as of a guide that is memorised;
            never for a guide of one row, which says nothing of its kind.
        stale: whether the target gradient is formed no more, and is of parameters of long ago.
        mine: which of the candidates are those of this process: ``values[selection.mine]``; all where it is alone. In a
            run of several processes everything else is of all of them, in the order of the ranks.
        group: the candidates that this process's were compared with, among all; ``gram`` is of these alone. All, unless
            ``among`` divides the ranks into groups: then whatever is one number is the mean over the groups that keep
            some candidate, of which ``predicted_decrease`` is a lower bound.
        group_squares: shape ``(n,)``, all candidates' squared norms where ``gram`` is of a group alone; else None.
        sketch: the sketch with which the products above were estimated; None where they are exact.
        milliseconds: host time by phase: ``target``, ``candidates`` (their forward and backward pass), ``gram``,
            ``solve`` (filter and weights, and waiting for the Gram system on an accelerator), ``combine``.
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
    target_weights: Tensor = field(default_factory=lambda: _NOTHING)
    target_losses: Tensor = field(default_factory=lambda: _NOTHING)
    guide_loss: float = math.nan
    held_out_loss: float = math.nan
    blind: bool = False
    stale: bool = False
    mine: slice = field(default_factory=lambda: slice(None))
    group: slice = field(default_factory=lambda: slice(None))
    group_squares: Tensor | None = None
    sketch: SketchReport | None = None
    milliseconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def nothing(cls, losses: Tensor, accepted: Tensor, *, targets: int = 0) -> Selection:
        """The skipped selection of a step without anything to match.

        Args:
            losses: shape ``(n + m,)``, of the candidates and of the target rows behind them.
            accepted: bool ``(n + m,)``, False for rejected candidates.
            targets: ``m``, the number of target rows that take part in the step.
        """
        n = len(losses) - targets
        return cls(
            losses=losses[:n],
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
            rejected=(~accepted[:n]).nonzero()[:, 0],
            skipped=True,
            converged=True,
            combine="skipped",
            target_weights=torch.zeros(targets, dtype=torch.float64),
            target_losses=losses[n:],
        )

    def applied_by(self, way: str | None) -> Selection:
        """This selection, applied in that ``way``; None: no way can apply it, and the step is skipped."""
        if way is not None:
            return replace(self, combine=way)
        return replace(
            self,
            weights=torch.zeros_like(self.weights),
            target_weights=torch.zeros_like(self.target_weights),
            cosine=0.0,
            residual=1.0,
            predicted_decrease=0.0,
            effective_size=0.0,
            skipped=True,
        )

    def own(self) -> Selection:
        """The selection as far as it concerns the candidates of this process; itself where they are all.

        Entries of others are left out, and so are target rows; whatever is of the step as a whole stays as it is.
        """
        start, stop, _ = self.mine.indices(len(self.losses))
        whole = (start, stop) == (0, len(self.losses))
        return self if whole else self.part(slice(start, stop), slice(0, 0))

    def part(self, candidates: slice, targets: slice) -> Selection:
        """The selection as far as it concerns some neighbouring candidates, and target rows that take part."""
        start, stop = candidates.start, candidates.stop
        compared = self.group.start or 0
        square = slice(start - compared, stop - compared)
        kept = (self.kept >= start) & (self.kept < stop)
        rejected = (self.rejected >= start) & (self.rejected < stop)
        return replace(
            self,
            losses=self.losses[candidates],
            kept=self.kept[kept] - start,
            weights=self.weights[kept],
            gram=self.gram[square, square],
            cross_gram=self.cross_gram[candidates],
            rejected=self.rejected[rejected] - start,
            target_weights=self.target_weights[targets],
            target_losses=self.target_losses[targets],
            mine=slice(0, stop - start),
            group=slice(0, stop - start),
            group_squares=None,
        )

    @property
    def squares(self) -> Tensor:
        """The squared norms of the candidates' gradients in the metric, shape ``(n,)``."""
        return self.gram.diagonal() if self.group_squares is None else self.group_squares

    def in_order(self, order: Tensor) -> Selection:
        """The same selection with its candidates in another order, all of them counted as this process's.

        Args:
            order: shape ``(n,)`` int64, the candidate at each place. Where groups of processes have selected, ``gram``
                stays as it is.
        """
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        whole = len(self.gram) == len(order)
        everyone = slice(0, len(order))
        return replace(
            self,
            losses=self.losses[order],
            kept=place[self.kept],
            gram=self.gram[order][:, order] if whole else self.gram,
            group_squares=None if whole else self.squares[order],
            cross_gram=self.cross_gram[order],
            rejected=place[self.rejected],
            mine=everyone,
            group=everyone if whole else self.group,
        )

    def spread_weights(self) -> Tensor:
        """The weights of all candidates, shape ``(n,)`` float64; zero for candidates that are not kept."""
        weights = torch.zeros(len(self.losses), dtype=torch.float64)
        weights[self.kept] = self.weights
        return weights

    def row_weights(self) -> Tensor:
        """The weights of all rows that the step ran, float64: ``(n + m,)``, those of the target rows at the end."""
        weights = self.spread_weights()
        return torch.cat([weights, self.target_weights]) if len(self.target_weights) else weights

    def target_numbers(self) -> dict[str, float]:
        """What is known of the target rows, by name.

        Their share of the weight and their mean loss, where they take part; the losses of the guide and of held-out
        rows, and whether the guide is blind, where these are looked at.
        """
        found = {}
        if len(self.target_weights):
            found["target_share"] = float(self.target_weights.sum())
            found["target_loss"] = float(self.target_losses.mean())
        if not math.isnan(self.held_out_loss):
            found |= {"guide_loss": self.guide_loss, "held_out_loss": self.held_out_loss, "blind": float(self.blind)}
        return found

    def weighted_loss(self) -> Tensor:
        """The weighted mean of the kept losses and of the target rows'.

        If skipped, the mean of accepted candidates; if all are rejected, NaN.
        """
        if not self.skipped:
            weights, losses = self.weights, self.losses[self.kept]
            if len(self.target_weights):
                weights, losses = torch.cat([weights, self.target_weights]), torch.cat([losses, self.target_losses])
            return ((weights / weights.sum()).to(losses) * losses).sum()
        accepted = torch.ones(len(self.losses), dtype=torch.bool)
        accepted[self.rejected] = False
        return self.losses[accepted].mean() if bool(accepted.any()) else self.losses.new_full((), torch.nan)
