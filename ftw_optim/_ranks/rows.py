"""The rows of a selection over several ranks: how many each rank has, and in which order they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a step, by rank: all candidates in the order of the ranks, and then all target rows.

    Attributes:
        counts: number of candidates of each rank.
        targets: number of target rows of each rank that take part.
        own: the rank of this process.
    """

    counts: Sequence[int]
    targets: Sequence[int]
    own: int

    @property
    def total(self) -> int:
        """The number of candidates."""
        return sum(self.counts)

    @property
    def by_rank(self) -> list[int]:
        """The number of rows of each rank."""
        return [candidates + targets for candidates, targets in zip(self.counts, self.targets, strict=True)]

    @property
    def mine(self) -> slice:
        """The candidates of this process among all."""
        start = sum(self.counts[: self.own])
        return slice(start, start + self.counts[self.own])

    @property
    def my_targets(self) -> slice:
        """The target rows of this process among all target rows."""
        start = sum(self.targets[: self.own])
        return slice(start, start + self.targets[self.own])

    def own_of(self, values: Tensor) -> Tensor:
        """The entries of this process, among one for each row of all."""
        return torch.cat([values[: self.total][self.mine], values[self.total :][self.my_targets]])

    def order(self) -> Tensor | None:
        """Where each row is, in rows that are sorted by rank alone; None where that is the same."""
        if not any(self.targets):
            return None
        starts = [sum(self.by_rank[:rank]) for rank in range(len(self.counts))]
        numbered = list(zip(starts, self.counts, self.targets, strict=True))
        candidates = [start + i for start, count, _ in numbered for i in range(count)]
        targets = [start + count + i for start, count, more in numbered for i in range(more)]
        return torch.tensor([*candidates, *targets])
