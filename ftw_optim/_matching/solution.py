"""What a weight stage returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class WeightSolution:
    """Weights of the kept candidates, and how good they are.

    Attributes:
        weights: shape ``(k,)`` float64, none negative.
        slack: shape ``(k,)`` float64, ``cross_gram - gram @ weights`` of the problem that was solved.
        iterations: how many times a candidate was offered a share of the weight.
        converged: the weights are a minimiser: within the tolerance, no slack is left where a weight is
            positive and no positive slack where it is zero. False where no minimum exists.
    """

    weights: Tensor
    slack: Tensor
    iterations: int
    converged: bool
