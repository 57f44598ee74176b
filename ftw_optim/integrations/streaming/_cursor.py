"""Cursors: the position in a source, and the order in which its records are given out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, final

from ftw_optim.integrations.streaming._records import Reader, Record, Unreadable


@final
class Cursor:
    """The position in one source.

    Records are read in blocks. Each block has an order of its own, drawn from the seed, the pass and the place of the
    block. So a position consists of that of the block's first record and the number of its records that were given out;
    a resumed run reads the block again.
    """

    def __init__(self, name: str, reader: Reader, *, seed: int, block_size: int) -> None:
        self.name, self.reader, self.seed, self.block_size = name, reader, seed, block_size
        self.restore({"passes": 0, "block": None, "index": 0, "used": 0, "given": 0})

    def snapshot(self) -> dict[str, Any]:
        """The position as JSON values, which are never changed afterwards."""
        return {
            "passes": self.passes,  # passes that have ended
            "block": self._block,  # the reader's position at the block's first record
            "index": self._index,  # the number of that record
            "used": self._used,  # records of the block that were taken
            "given": self.given,  # samples that came of this pass
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to the position of a snapshot."""
        self.passes, self._block, self._index = state["passes"], state["block"], state["index"]
        self._used, self.given = state["used"], state["given"]
        self._records: list[Record | Unreadable] | None = None
        self.reader.begin(self._block)

    def take(self) -> tuple[int, Record | Unreadable] | None:
        """The next record with its number in the pass; None at the end of the pass, once."""
        records = self._block_records()
        if self._used == len(records) == self.block_size:
            self._block, self._index, self._used = self.reader.position(), self._index + self.block_size, 0
            self._records = None
            records = self._block_records()
        if self._used == len(records):
            self.restore({"passes": self.passes + 1, "block": None, "index": 0, "used": 0, "given": 0})
            return None
        offset = self._order[self._used]
        self._used += 1
        return self._index + offset, records[offset]

    def _block_records(self) -> list[Record | Unreadable]:
        if self._records is not None:
            return self._records
        records: list[Record | Unreadable] = []
        while len(records) < self.block_size and (record := self.reader.read()) is not None:
            records.append(record)
        if self._used > len(records):
            raise ValueError(
                f"Expected the source {self.name!r} to hold what it held at the checkpoint, got "
                f"{len(records)} records from record {self._index} on, of which {self._used} were given out: it "
                "changed."
            )
        self._order = list(range(len(records)))
        if self.block_size > 1:
            random.Random(f"{self.seed}/{self.name}/{self.passes}/{self._index}").shuffle(self._order)
        self._records = records
        return records
