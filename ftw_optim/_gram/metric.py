"""The metrics in which gradients are compared: each applies a power of the preconditioner to both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TypeVar

Side = TypeVar("Side")


class PowerMetric(str, Enum):
    """The base class of metrics ``<P^power g, P^power h>``; a member is its name and its power, a multiple of 1/2.

    Members are equal to their names as users write them, so that both can be used as keys.
    """

    power: float

    def __new__(cls, name: str, power: float = 0.0) -> PowerMetric:
        """A member of this name and power."""
        if power < 0.0 or 2 * power != round(2 * power):
            raise ValueError(f"The power of {name!r} must be a multiple of 1/2 and not negative, got {power}.")
        member = str.__new__(cls, name)
        member._value_, member.power = name, power
        return member

    def __str__(self) -> str:
        return str.__str__(self)

    @property
    def times(self) -> tuple[int, int]:
        """How often ``P``, which is symmetric, is applied to the left and to the right side: ``2 power`` in all."""
        applied = round(2 * self.power)
        return applied // 2, applied - applied // 2

    def sides(self, applied: Sequence[Side]) -> tuple[Side, Side]:
        """The left and right side of the inner product, out of ``[g, P g, P P g, ...]``."""
        left, right = self.times
        return applied[left], applied[right]


class Metric(PowerMetric):
    """The metrics that users can ask for. A new one is a line here."""

    PRECONDITIONED = "preconditioned", 0.5
    UPDATE = "update", 1.0
    EUCLIDEAN = "euclidean", 0.0


def most_applied(metrics: Iterable[PowerMetric]) -> int:
    """How often ``P`` is applied to one side at most, in any of these metrics."""
    return max(metric.times[1] for metric in metrics)
