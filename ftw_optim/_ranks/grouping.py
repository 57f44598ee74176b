"""How many ranks make one selection, where those of all would be too many candidates to solve for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

MOST = 2048
"""Candidates of one selection, where nothing else is asked for: filter and weights of more take seconds."""


def ranks_of_one(counts: Sequence[int], among: int | None, *, warns: bool = True) -> int:
    """The number of neighbouring ranks whose candidates are one selection.

    Args:
        counts: candidates of each rank.
        among: the number that is asked for; None: all ranks, or as many as have :data:`MOST` candidates at most.
        warns: whether to say so where nothing was asked for, and not all ranks are one selection.

    Raises:
        ValueError: ``among`` does not divide the number of ranks.
    """
    ranks = len(counts)
    if among is not None and ranks % among:
        raise ValueError(
            f"Expected among to divide the number of ranks, {ranks}, got {among}: the groups are of one size."
        )
    if among is not None:
        return among
    sizes = [size for size in range(ranks, 0, -1) if not ranks % size]
    found = next((size for size in sizes if max(sums_of_neighbours(counts, size)) <= MOST), 1)
    if found < ranks and warns:
        warnings.warn(
            f"{sum(counts)} candidates on {ranks} ranks: they are selected in groups of {found} ranks, whose mean is "
            f"applied, as more than {MOST} candidates take long to solve for. among={found} says so without this "
            f"warning, among={ranks} selects among all.",
            stacklevel=2,
        )
    return found


def sums_of_neighbours(counts: Sequence[int], size: int) -> list[int]:
    """The sums over groups of so many neighbours."""
    return [sum(counts[start : start + size]) for start in range(0, len(counts), size)]
