"""The metrics in which gradients are compared: each applies a power of the preconditioner to both sides."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

Side = TypeVar("Side")


class Metric(StrEnum):
    """An inner product ``<P^power g, P^power h>`` of two gradients.

    Members are equal to the strings that users write, so that both can be used as keys.
    """

    PRECONDITIONED = "preconditioned"
    UPDATE = "update"
    EUCLIDEAN = "euclidean"

    @property
    def power(self) -> float:
        """The power of ``P`` on each side: 0, 1/2 or 1."""
        return _POWERS[self]

    def sides(self, plain: Side, moved: Side) -> tuple[Side, Side]:
        """The left and right side of the inner product: each is ``plain`` (``g``) or ``moved`` (``P g``)."""
        times = round(2 * self.power)  # P is symmetric: how often it is applied in all
        return moved if times > 1 else plain, moved if times > 0 else plain


_POWERS = {Metric.EUCLIDEAN: 0.0, Metric.PRECONDITIONED: 0.5, Metric.UPDATE: 1.0}
