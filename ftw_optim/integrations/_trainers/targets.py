"""Batches of target examples: from a dataset by the number of the step, or from a loader in endless rounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch.utils.data import Subset


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TargetBatches:
    """Batches of target examples, shuffled anew in each pass; the step alone tells its batch: no state is saved.

    Attributes:
        dataset: the examples, found by number.
        collate: makes a batch of some examples.
        size: number of examples in a batch.
        seed: seed of the orders.
        refresh_every: number of steps that use the same batch.
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

    def parted(self, share: float) -> tuple[TargetBatches, TargetBatches]:
        """Batches of a ``share`` of the examples, drawn by the seed alone, and of the others at every step.

        Raises:
            ValueError: the share is not in (0, 1), or it leaves no example to one of the two.
        """
        total = len(self.dataset)
        first = round(share * total) if 0.0 < share < 1.0 else 0
        if not 0 < first < total:
            raise ValueError(
                f"Expected guide_share between 0 and 1 that parts {total} target examples in two, got {share!r}: 0.5 "
                "lets half of them guide and trains on the others."
            )
        order = shuffled(total, f"{self.seed}/guides")
        examples: Any = self.dataset
        guides: Any = Subset(examples, order[:first])
        others: Any = Subset(examples, order[first:])
        return replace(self, dataset=guides), replace(self, dataset=others, refresh_every=1)

    def in_order(self) -> Iterator[Any]:
        """All examples once, in batches."""
        for first in range(0, len(self.dataset), self.size):
            last = min(first + self.size, len(self.dataset))
            yield self.collate([self.dataset[number] for number in range(first, last)])

    def at(self, step: int) -> Any:
        """The batch of a step, counted from 0; no larger than the dataset."""
        total, size = len(self.dataset), min(self.size, len(self.dataset))
        first = step // self.refresh_every * size
        passes = range(first // total, (first + size - 1) // total + 1)
        order = [number for one in passes for number in shuffled(total, f"{self.seed}/{one}/target order")]
        offset = first - passes.start * total
        return self.collate([self.dataset[number] for number in order[offset : offset + size]])


def shuffled(total: int, seed: str) -> list[int]:
    """The numbers below ``total`` in an order that the seed alone decides."""
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return order


@final
class CycledBatches:
    """The batches of a loader in endless rounds, with a position that can be saved and restored.

    Each round starts from a random state of its own, which depends on the seed and the number of the round: so a loader
    that shuffles by the global generator gives the same order when a run is resumed in the middle of a round. The
    global generator itself is not changed.

    Args:
        batches: the loader, iterated anew for each round.
        seed: seed of the orders.

    Raises:
        ValueError: the loader has no batch.
    """

    def __init__(self, batches: Iterable[Any], *, seed: int = 0) -> None:
        self._batches, self._seed = batches, seed
        self._round = self._position = 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._iterator is not None:
            for batch in self._iterator:
                self._position += 1
                return batch
            self._round, self._position = self._round + 1, 0
        return self._first()

    def _first(self) -> Any:
        """Begin the present round, and return the batch at the present position in it."""
        # Samplers draw their order with the first batch.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{self._seed}/{self._round}").getrandbits(32))
            self._iterator = iter(self._batches)
            for number, batch in enumerate(self._iterator):
                if number == self._position:
                    self._position += 1
                    return batch
        if self._position:  # saved at the end of a round
            self._round, self._position = self._round + 1, 0
            return self._first()
        raise ValueError(f"Expected target batches, got none from {self._batches!r}.")

    def state_dict(self) -> dict[str, int]:
        """The number of the round and of the next batch in it."""
        return {"round": self._round, "position": self._position}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on where :meth:`state_dict` was called; earlier batches of the round are loaded once more."""
        self._round, self._position = int(state_dict["round"]), int(state_dict["position"])
        self._iterator = None
