"""Filter stages: which of the candidates are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ftw_optim._matching.active_set import ActiveSet
from ftw_optim._matching.problem import Matching
from ftw_optim._matching.scaled_system import ScaledSystem


class FilterStage(ABC):
    """The interface of filter stages, which choose the candidates that may have weight.

    A stage consists of its hyper-parameters and one call. It sees the matching problem of one step and keeps no state.

    Attributes:
        metrics: names of further metrics in which the stage is given the matching problem, after the first one.
    """

    metrics: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """The indices of the kept candidates, distinct, int64, shape ``(k,)``, in picking order; ``k`` may be 0.

        Args:
            matching: the problem of this step, in the optimizer's metric.
            more: the problem of the same candidates in each of the stage's ``metrics``.
        """


@final
@dataclass(frozen=True, kw_only=True)
class GreedyFilter(FilterStage):
    """Keeps the candidates that together match the target best, picked one at a time.

    The method is orthogonal least squares with non-negative weights, on the Gram matrix. Each pick is the candidate
    that would lower the objective most in addition to those of positive weight: the one with the largest slack squared
    over its Schur complement, both above rounding, so that a redundant candidate is never picked. The weights are
    refitted after each pick; a kept candidate may be left without weight. It stops early when no candidate would help.

    Args:
        keep: the most candidates to keep: a count (int), or a share of all candidates offered (float in (0, 1]). ``1``
            is a count, ``1.0`` a share.

    Raises:
        TypeError: ``keep`` is neither an int nor a float.
        ValueError: ``keep`` is out of range.
    """

    keep: int | float = 0.25

    def __post_init__(self) -> None:
        _check_keep(self.keep)

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`FilterStage`; equal gains go to the larger slack, then to the lower index."""
        count = _count(self.keep, matching)
        system = ScaledSystem(matching.gram, matching.cross_gram, target_energy=matching.target_energy)
        return torch.tensor(ActiveSet.to_grow(system).grow(count), dtype=torch.int64)


@final
@dataclass(frozen=True, kw_only=True)
class TopKFilter(FilterStage):
    """Keeps the candidates with the largest ``cross_gram``, among those where it is positive.

    Each candidate is judged alone: two equal ones are both kept.

    Args:
        keep: the most candidates to keep, as a count or a share; see :class:`GreedyFilter`.

    Raises:
        TypeError: ``keep`` is neither an int nor a float.
        ValueError: ``keep`` is out of range.
    """

    keep: int | float = 0.25

    def __post_init__(self) -> None:
        _check_keep(self.keep)

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`FilterStage`; the largest come first, equal ones in the order of their indices."""
        values, order = matching.cross_gram.sort(descending=True, stable=True)
        return order[values > 0][: _count(self.keep, matching)]


@final
@dataclass(frozen=True, kw_only=True)
class KeepAll(FilterStage):
    """Keeps every candidate that was not rejected, in order."""

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`FilterStage`."""
        return torch.arange(len(matching))


@final
@dataclass(frozen=True, kw_only=True)
class AcceptFilter(FilterStage):
    """Keeps every candidate but those whose gradient certainly points away from the target.

    A candidate is left out where its ``cross_gram`` is below zero by more than ``confidence`` standard errors. These
    are known where the target rows that guide take part in the step; else every negative product counts. With
    :class:`UniformWeights` good candidates are not thinned out, as fitted weights do, and bad ones have no weight.
    Where the target gradient is formed no more, all are kept: it points away from good candidates as well.

    Args:
        confidence: number of standard errors; 0: every candidate with a negative product is left out.

    Raises:
        ValueError: ``confidence`` is negative or not finite.
    """

    confidence: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.confidence < math.inf:
            raise ValueError(
                f"confidence must be finite and not negative, got {self.confidence}: 1 is usual, 0 strict."
            )

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`FilterStage`; in the order of the candidates."""
        if matching.stale:
            return torch.arange(len(matching))
        least = matching.cross_gram
        if matching.cross_gram_error is not None:
            least = least + self.confidence * matching.cross_gram_error
        return (least >= 0).nonzero()[:, 0]


def _check_keep(keep: int | float) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(
            f"keep must be a count (int) or a share of the candidates (float), got {keep!r} of type "
            f"{type(keep).__name__}. Pass for example keep=4 or keep=0.25."
        )
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep as a count must be at least 1, got {keep}. KeepAll() keeps every candidate.")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise ValueError(f"keep as a share must be in (0, 1], got {keep}. A count is an int, such as keep=4.")


def _count(keep: int | float, matching: Matching) -> int:
    """The most candidates to keep: a count, or a share of all offered ones, but never more than there are."""
    count = keep if isinstance(keep, int) else max(1, math.floor(keep * matching.offered + 0.5))
    return min(count, len(matching))
