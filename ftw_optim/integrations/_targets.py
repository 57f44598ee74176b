"""Batches of target examples, in an order that the step count alone decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatches:
    """Target examples in batches, shuffled anew in each pass over them: nothing needs saving to go on in the middle.

    Attributes:
        dataset: the examples, by number.
        collate: makes a batch of some of them.
        size: examples in a batch.
        seed: of the order.
        refresh_every: steps that use one batch.
    """

    dataset: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    size: int
    seed: int
    refresh_every: int = 1

    def __post_init__(self) -> None:
        if not (hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")):
            raise TypeError(
                "Expected a target_dataset with a length, whose examples are found by number, got "
                f"{type(self.dataset).__name__}: read a stream's first few hundred examples into a list, or into a "
                "datasets.Dataset."
            )
        if not len(self.dataset):
            raise ValueError(
                "Expected at least one target example, got an empty target_dataset (examples without labels may have "
                "been dropped)."
            )
        for name, value in (("target_batch_size", self.size), ("target_refresh_every", self.refresh_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")

    def at(self, step: int) -> Any:
        """The batch of a step, counted from 0; no larger than the dataset."""
        total, size = len(self.dataset), min(self.size, len(self.dataset))
        first = step // self.refresh_every * size
        passes = range(first // total, (first + size - 1) // total + 1)
        order = [number for one in passes for number in self._order(one, total)]
        offset = first - passes.start * total
        return self.collate([self.dataset[number] for number in order[offset : offset + size]])

    def _order(self, number: int, total: int) -> list[int]:
        """In which order the examples come in one pass over them."""
        order = list(range(total))
        random.Random(f"{self.seed}/{number}/target order").shuffle(order)
        return order
