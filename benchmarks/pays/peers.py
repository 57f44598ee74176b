"""Published selectors of others, as filter stages: which candidates they would keep, with uniform weights after them.

Both judge in their own geometry, whatever the optimizer's metric: the first problem that a stage is given is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ftw_optim import FilterStage, Matching


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
