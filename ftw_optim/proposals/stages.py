"""Stages that choose and weigh where likeness is no guide, and leave the choice to it where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from ftw_optim._matching.filters import FilterStage, GreedyFilter, KeepAll
from ftw_optim._matching.problem import Matching
from ftw_optim._matching.solution import WeightSolution
from ftw_optim._matching.weights import NonNegativeLeastSquares, Normalization, UniformWeights, WeightStage


@final
@dataclass(frozen=True, kw_only=True)
class FilterUnless(FilterStage):
    """Keeps every candidate while a condition holds, and filters them while it does not.

    A copy has the same condition; what is unpickled has none, and says so when it is asked.

    Args:
        condition: called at each step, without arguments, such as :meth:`VettedProposal.trusts_likeness`. In a run of
            several processes that of the first one counts for the candidates of all. Candidates that were asked for
            ahead were proposed by what was known then.
        filter: the filter while it does not hold.

    Raises:
        TypeError: one of them cannot be called.
    """

    condition: Callable[[], bool]
    filter: FilterStage = field(default_factory=GreedyFilter)

    def __post_init__(self) -> None:
        _check_callable(condition=self.condition, filter=self.filter)

    def __deepcopy__(self, memo: dict[int, Any]) -> FilterUnless:
        return FilterUnless(condition=self.condition, filter=copy.deepcopy(self.filter, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (FilterUnless, "filter", self.filter)

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]  # those of a stage that is only known here
        """See :class:`FilterStage`."""
        return getattr(self.filter, "metrics", ())

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        """See :class:`FilterStage`."""
        return KeepAll()(matching) if self.condition() else self.filter(matching, *more)


@final
@dataclass(frozen=True, kw_only=True)
class WeightUnless(WeightStage):
    """Uniform weights while a condition holds, and fitted ones while it does not.

    A copy has the same condition; what is unpickled has none, and says so when it is asked.

    Args:
        condition: called at each step, without arguments; the one of the filter.
        weight: the weight stage while it does not hold.

    Raises:
        TypeError: one of them cannot be called.
    """

    condition: Callable[[], bool]
    weight: WeightStage = field(default_factory=NonNegativeLeastSquares)

    def __post_init__(self) -> None:
        _check_callable(condition=self.condition, weight=self.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightUnless:
        return WeightUnless(condition=self.condition, weight=copy.deepcopy(self.weight, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (WeightUnless, "weight", self.weight)

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]  # those of a stage that is only known here
        """See :class:`WeightStage`."""
        return getattr(self.weight, "metrics", ())

    @property
    def normalize(self) -> Normalization:  # type: ignore[override]
        """See :class:`WeightStage`; where all candidates are kept, uniform weights stay what they are under any."""
        return getattr(self.weight, "normalize", "sum")

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        """See :class:`WeightStage`."""
        return UniformWeights()(matching) if self.condition() else self.weight(matching, *more)


def keeps_all_alike(filter: object, weight: object) -> bool:
    """Whether two stages keep every candidate now, all with the same weight, so that a step needs no selection."""
    keeps = isinstance(filter, KeepAll) or (isinstance(filter, FilterUnless) and filter.condition())
    return keeps and (
        isinstance(weight, UniformWeights) or (isinstance(weight, WeightUnless) and bool(weight.condition()))
    )


def _unpickled(kind: Callable[..., Any], name: str, stage: object) -> object:
    return kind(condition=_no_condition, **{name: stage})


def _no_condition() -> bool:
    raise RuntimeError(
        "The condition of FilterUnless and WeightUnless is not pickled: it is of the proposal of a run. Give the "
        "optimizer new ones, with condition=proposal.trusts_likeness."
    )


def _check_callable(**given: object) -> None:
    for name, one in given.items():
        if not callable(one) or isinstance(one, type):
            raise TypeError(
                f"{name} must be a stage or a function, got {one!r}: pass for example "
                "condition=proposal.trusts_likeness, filter=GreedyFilter(), weight=NonNegativeLeastSquares()."
            )
