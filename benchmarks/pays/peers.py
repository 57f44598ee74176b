"""Selectors of others, and controls, as stages: which candidates they would keep, and with which weights.

GREATS and LESS judge in their own geometry, whatever the optimizer's metric: the first problem that they are given is
not used. Small losses and random weights do not look at gradients at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ftw_optim import FilterStage, Matching, WeightSolution, WeightStage


@final
@dataclass(frozen=True, kw_only=True)
class GreatsFilter(FilterStage):
    r"""The greedy choice of GREATS, in the geometry of plain gradient descent.

    A candidate's score is the decrease of the target loss that a step on it promises to second order, the curvature
    taken as the identity: ``lr <g_i, target> - lr^2 sum_j <g_i, g_j>`` over those already picked. The best is picked
    until ``keep`` are, whatever the sign of its score.

    Attributes:
        keep: the number to keep.
        lr: learning rate of this step.

    Source: Wang et al. (2024), GREATS; scores and Gram rows as its published code takes them.
    """

    metrics: ClassVar[tuple[str, ...]] = ("euclidean",)

    keep: int
    lr: float

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`ftw_optim.FilterStage`."""
        (plain,) = more
        scores = self.lr * plain.cross_gram.double()
        interaction = self.lr**2 * plain.gram.double()
        kept: list[int] = []
        for _ in range(min(self.keep, len(plain))):
            best = int(scores.argmax())
            kept.append(best)
            scores = scores - interaction[best]
            scores[kept] = -torch.inf
        return torch.tensor(kept, dtype=torch.int64)


@final
@dataclass(frozen=True, kw_only=True)
class LessFilter(FilterStage):
    """The choice of LESS, made at every step: the largest cosines of Adam's updates with the plain target gradient.

    LESS compares ``A(g_i)``, the update that Adam would make on a candidate alone, with the target gradient. A stage
    sees inner products only, so the update is the linear part ``P g_i``, with the second moments of the step and
    without the momentum, which all candidates share: ``<P g_i, target> / |P g_i|``, the target's own length aside. The
    ``keep`` largest are kept, whatever their sign.

    Attributes:
        keep: the number to keep.

    Source: Xia et al. (2024), LESS, equation of its Adam influence, without warm-up run, projection and checkpoints.
    """

    metrics: ClassVar[tuple[str, ...]] = ("preconditioned", "update")

    keep: int

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`ftw_optim.FilterStage`."""
        preconditioned, update = more
        lengths = update.gram.diagonal().double().clamp(min=0.0).sqrt()
        # A candidate without a gradient has no direction: it comes last among those that do not point away.
        cosines = preconditioned.cross_gram.double() / lengths.clamp(min=torch.finfo(torch.float64).tiny)
        return cosines.sort(descending=True, stable=True).indices[: self.keep]


@final
@dataclass(frozen=True, kw_only=True)
class SmallLossFilter(FilterStage):
    """The candidates with the smallest losses, as those with wrong labels are learned last.

    Attributes:
        keep: the share of the candidates to keep, in (0, 1].

    Source: Han et al. (2018), Co-teaching, with one network.
    """

    keep: float

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`ftw_optim.FilterStage`."""
        count = max(1, round(self.keep * len(matching)))
        return matching.losses.sort(stable=True).indices[:count]


@final
@dataclass(frozen=True)
class RandomWeights(WeightStage):
    """Weights drawn uniformly from all that sum to one: what fitted ones must beat."""

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        """See :class:`ftw_optim.WeightStage`."""
        draws = torch.rand(len(matching), generator=matching.generator, dtype=torch.float64)
        weights = -(1.0 - draws).log()
        weights = weights / weights.sum()
        slack = matching.cross_gram.double() - matching.gram.double() @ weights
        return WeightSolution(weights=weights, slack=slack, iterations=0, converged=True)
