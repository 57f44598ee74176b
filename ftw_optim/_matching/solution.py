"""The result of a weight stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class WeightSolution:
    """The fitted weights of the kept candidates, and how good they are.

    Attributes:
        weights: shape ``(k,)`` float64, none negative.
        slack: shape ``(k,)`` float64, ``cross_gram - gram @ weights`` of the problem that was solved.
        iterations: number of attempts to give candidates weight, one or several at once; 0 where nothing is fitted.
        converged: whether the weights are a minimiser: within the tolerance, there is no slack where a weight is
            positive, and no positive slack where it is zero. False where no minimum exists.
    """

    weights: Tensor
    slack: Tensor
    iterations: int
    converged: bool
