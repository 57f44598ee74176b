"""Stages that choose and weigh where likeness is no guide, and leave the choice to it where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from ftw_optim._matching.filters import FilterStage, GreedyFilter, KeepAll
from ftw_optim._matching.problem import Matching
from ftw_optim._matching.solution import WeightSolution
from ftw_optim._matching.weights import NonNegativeLeastSquares, Normalization, UniformWeights, WeightStage


@final
@dataclass(frozen=True, kw_only=True)
class FilterUnless(FilterStage):
    """Keeps every candidate while a condition holds, and filters them while it does not.

    Args:
        condition: called at each step, without arguments; such as :meth:`VettedProposal.trusts_likeness`.
        filter: the filter while it does not hold.

    Raises:
        TypeError: one of them cannot be called.
    """

    condition: Callable[[], bool]
    filter: FilterStage = field(default_factory=GreedyFilter)

    def __post_init__(self) -> None:
        _check_callable(condition=self.condition, filter=self.filter)

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

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]  # those of a stage that is only known here
        """See :class:`WeightStage`."""
        return getattr(self.weight, "metrics", ())

    @property
    def normalize(self) -> Normalization:  # type: ignore[override]
        """See :class:`WeightStage`; uniform weights of all candidates stay what they are under any."""
        return getattr(self.weight, "normalize", "sum")

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        """See :class:`WeightStage`."""
        return UniformWeights()(matching) if self.condition() else self.weight(matching, *more)


def _check_callable(**given: object) -> None:
    for name, one in given.items():
        if not callable(one):
            raise TypeError(
                f"{name} must be callable, got {type(one).__name__}: pass for example "
                "condition=proposal.trusts_likeness, filter=GreedyFilter(), weight=NonNegativeLeastSquares()."
            )
