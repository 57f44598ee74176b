"""The folder of a scored pool: settings, rows of gradients, records, and the place up to which they are there.

A block of records counts once its place is written; what lies behind it, of a killed run, is cut off. So a run that is
started again ends with the files of one that was never stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim.selection_log._whole_file import whole_file

SETTINGS, PLACE, ROWS, RECORDS, METRIC = "settings.json", "place.json", "gradients.bin", "records.jsonl", "metric.pt"
AT_ONCE = 32 * 2**20
"""Bytes of rows that are in memory at a time while a file of them is read."""


@final
class Rows:
    """A file of rows of numbers, which grows, and is never in memory as a whole.

    Args:
        path: the file.
        width: numbers of a row.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, *, width: int, dtype: torch.dtype) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        self.row_bytes = width * dtype.itemsize

    def __len__(self) -> int:
        return self.path.stat().st_size // self.row_bytes if self.path.exists() else 0

    def append(self, rows: Tensor) -> None:
        """Add rows ``(n, width)``; they are on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write(rows.to(self.dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())

    def some(self, indices: Sequence[int]) -> Tensor:
        """The rows at these indices, ``(len(indices), width)``."""
        found = torch.empty(len(indices), self.width, dtype=self.dtype)
        with self.path.open("rb") as file:
            for at, index in enumerate(indices):
                file.seek(index * self.row_bytes)
                found[at] = self._tensor(file.read(self.row_bytes))[0]
        return found

    def chunks(self) -> Iterator[Tensor]:
        """All rows in order, some at a time: each (b, width)."""
        size = max(1, AT_ONCE // self.row_bytes) * self.row_bytes
        with self.path.open("rb") as file:
            while content := file.read(size):
                yield self._tensor(content)

    def _tensor(self, content: bytes) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(-1, self.width)


@final
class Store:
    """One folder.

    Args:
        folder: it is made if it is not there.
        settings: everything that the rows depend on, as JSON values.

    Raises:
        ValueError: the folder holds rows that were made with other settings.
        FileExistsError: it holds something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))
        path = folder / SETTINGS
        if path.exists():
            there = json.loads(path.read_text("utf-8"))
            other = [name for name in sorted({*there, *settings}) if there.get(name) != settings.get(name)]
            if other:
                told = "; ".join(f"{name} = {there.get(name)!r}, not {settings.get(name)!r}" for name in other)
                raise ValueError(
                    f"The gradients in {folder} were made with other settings: {told}. Take these, or another --out."
                )
        else:
            if folder.is_dir() and any(folder.iterdir()):
                raise FileExistsError(f"Expected an empty folder, or one of a scored pool, got {folder}: name another.")
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(settings, indent=1))

    def rows(self, *, width: int, dtype: torch.dtype) -> Rows:
        """The rows of the pool's records."""
        return Rows(self.folder / ROWS, width=width, dtype=dtype)

    def metric(self) -> dict[str, Any] | None:
        """The metric that was kept; None where there is none yet."""
        path = self.folder / METRIC
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def keep_metric(self, state: Mapping[str, Any]) -> None:
        """Keep a metric for all that is scored here later."""
        with whole_file(self.folder / METRIC) as path:
            torch.save(state, path)

    @property
    def place(self) -> dict[str, Any] | None:
        """The place up to which records are there: ``count``, ``bytes``, ``done`` and ``position``; None: none are."""
        path = self.folder / PLACE
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def begin(self, rows: Rows) -> None:
        """Cut off what a killed run wrote behind its last place.

        Raises:
            ValueError: the folder holds less than its place says.
        """
        place = self.place or {"count": 0, "bytes": 0}
        for path, size in ((rows.path, place["count"] * rows.row_bytes), (self._records, place["bytes"])):
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise ValueError(f"Expected {size} bytes in {path}, got {there}: it was cut. Remove {self.folder}.")
            if there > size:
                os.truncate(path, size)

    def add(self, rows: Rows, found: Tensor, records: Sequence[Mapping[str, Any]], position: Mapping[str, Any]) -> None:
        """Add the rows and records of a block; ``position`` is that of the pool after it."""
        rows.append(found)
        with self._records.open("ab") as file:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            file.write("".join(lines).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self._write_place({"count": len(rows), "bytes": size, "done": False, "position": position})

    def end(self, position: Mapping[str, Any]) -> None:
        """Note that all records are there."""
        self._write_place({**(self.place or {}), "done": True, "position": position})

    def records(self) -> Iterator[dict[str, Any]]:
        """The records, in the order of the rows."""
        with self._records.open("rb") as lines:
            yield from map(json.loads, lines)

    @property
    def _records(self) -> Path:
        return self.folder / RECORDS

    def _write_place(self, place: Mapping[str, Any]) -> None:
        write_whole(self.folder / PLACE, json.dumps(place))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole, or as it was before; it is on the disk when this returns."""
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
