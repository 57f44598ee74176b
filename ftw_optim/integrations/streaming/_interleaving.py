"""Interleaving: the next sample, from the source whose turn it is."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, final

from ftw_optim.integrations.streaming._cursor import Cursor
from ftw_optim.integrations.streaming._screening import Sample, Screening

_LOG = logging.getLogger("ftw_optim")


@final
class Interleaving:
    """The samples of all sources, in rounds; the arguments are those of :class:`CandidateStream`.

    Attributes:
        given: number of samples that came of this round.
        probabilities: of each source; they may change between items.
    """

    def __init__(
        self,
        cursors: Mapping[str, Cursor],
        screening: Screening,
        *,
        seed: int,
        probabilities: Mapping[str, float],
        passes: int | None,
        give_up_after: int,
    ) -> None:
        self._cursors, self._screening, self._seed = cursors, screening, seed
        self.probabilities, self._passes, self._give_up_after = probabilities, passes, give_up_after
        self._draws = self._rounds = self.given = 0

    def next_round(self) -> None:
        """Begin a new round through all sources."""
        self._rounds, self.given = self._rounds + 1, 0

    def sample(self) -> Sample | None:
        """The next sample; None at the end of the round.

        Raises:
            ValueError: a source has no samples, see :class:`CandidateStream`.
        """
        while alive := [cursor for cursor in self._cursors.values() if not self._exhausted(cursor)]:
            drawn = random.Random(f"{self._seed}/{self._draws}").random()
            self._draws += 1
            shares = list(accumulate(self.probabilities[cursor.name] for cursor in alive))
            cursor = next((c for c, share in zip(alive, shares, strict=True) if drawn * shares[-1] < share), alive[-1])
            if (sample := self._sample_of(cursor)) is not None:
                self.given += 1
                return sample
        return None

    def _exhausted(self, cursor: Cursor) -> bool:
        return self._passes is not None and cursor.passes >= (self._rounds + 1) * self._passes

    def _sample_of(self, cursor: Cursor) -> Sample | None:
        """The source's next sample; None where its last pass has ended."""
        in_a_row = 0
        while not self._exhausted(cursor):
            given = cursor.given
            found = cursor.take()
            if found is None:
                if cursor.passes == 1 and self._screening.skipped:
                    _LOG.warning(
                        "The source %r was read once; skipped so far, of all sources:\n%s",
                        cursor.name,
                        self._screening.table(),
                    )
                if self._passes is None and not given:
                    raise ValueError(self.nothing(f"the source {cursor.name!r}"))
                continue
            index, record = found
            sample = self._screening.sample(record, cursor.name, index)
            if sample is not None:
                cursor.given += 1
                return sample
            in_a_row += 1
            if in_a_row >= self._give_up_after:
                raise ValueError(self.nothing(f"{in_a_row:,} records in a row of the source {cursor.name!r}"))
        return None

    def nothing(self, where: str) -> str:
        """The message that ``where`` has no samples."""
        first = f" The first: {self._screening.first}." if self._screening.first else " There was no record."
        return f"Expected candidates, got none from {where}.{first} Skipped so far:\n{self._screening.table()}"

    def snapshot(self) -> dict[str, Any]:
        """The position as JSON values, which are never changed afterwards."""
        return {
            "draws": self._draws,
            "rounds": self._rounds,
            "given": self.given,
            "cursors": {name: cursor.snapshot() for name, cursor in self._cursors.items()},
            "skipped": self._screening.skipped,
            "first_skipped": self._screening.first,
        }

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go back to the position of a snapshot."""
        self._draws, self._rounds, self.given = position["draws"], position["rounds"], position["given"]
        self._screening.skipped, self._screening.first = position["skipped"], position["first_skipped"]
        for name, cursor in self._cursors.items():
            cursor.restore(position["cursors"][name])
