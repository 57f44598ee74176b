"""Items as all processes together were given them, so that each of them can learn from the candidates of all."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, final

from ftw_optim.integrations._trainers.dealing import part_of

_KEPT = 64
"""Items that are remembered at most, beside those that are read ahead: so many may be accumulated in one step."""


@final
class GivenItems:
    """The last items, of all processes.

    Args:
        rank: the number of this process.
        ranks: the number of processes.
        remembered: number of items that may be read ahead.
    """

    def __init__(self, rank: int, ranks: int, *, remembered: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._items: deque[list[Mapping[str, Any]]] = deque(maxlen=_KEPT + remembered)

    def note(self, samples: list[Any]) -> None:
        """Note the samples of one item, of all processes in their order."""
        if self._ranks > 1:
            self._items.append(samples)

    def of_all_ranks(self, samples: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The candidates of all processes, in their order, of a step in which these are the candidates of this one.

        Raises:
            ValueError: they are not those of neighbouring items that were given.
        """
        if self._ranks == 1:
            return samples
        wanted = [sample["sample_id"] for sample in samples]
        items = list(self._items)
        for first in range(len(items)):
            ids: list[Any] = []
            for number in range(first, len(items)):
                ids += [sample["sample_id"] for sample in part_of(items[number], self._rank, self._ranks)]
                if ids == wanted:
                    return self._by_rank(items[first : number + 1])
                if ids != wanted[: len(ids)]:
                    break
        raise ValueError(
            f"Expected the samples of one of the last items of this stream, or of some that follow each other, got "
            f"{len(wanted)} others: in a run of several processes all of them learn from whole items."
        )

    def _by_rank(self, items: Sequence[list[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
        parts = [part_of(item, rank, self._ranks) for rank in range(self._ranks) for item in items]
        return [sample for part in parts for sample in part]
