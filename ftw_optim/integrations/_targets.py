"""Batches of target examples, round and round."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import torch


@final
class CycledBatches:
    """The batches of a loader without end; where it is in them can be saved and found again.

    Each round starts from a random state of its own, told by the seed and the number of the round: a loader that
    shuffles by the global generator gives the same order when a run is resumed in the midst of it. The global generator
    itself is left as it was.

    Args:
        batches: iterated anew for each round.
        seed: of the orders.

    Raises:
        ValueError: it has no batch.
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
        """The batch at the position of a round that has not been begun here."""
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
        """Go on where :meth:`state_dict` was taken; skipped batches of the round are loaded once more."""
        self._round, self._position = int(state_dict["round"]), int(state_dict["position"])
        self._iterator = None
