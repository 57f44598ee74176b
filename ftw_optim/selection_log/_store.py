"""Tables of rows on disk that only grow, and can be cut back to their size at a checkpoint."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, final

Row = dict[str, Any]
TABLES = ("texts", "candidates", "times", "steps")  # in writing order: a step counts once its row in "steps" is there
ROWS_PER_PART = 20_000


class Store(ABC):
    """The tables of one directory, in one format."""

    format: str

    @abstractmethod
    def append(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Add rows to the tables, in the order of ``TABLES``."""

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """The size of the tables as JSON values; all rows appended before are on the disk when this returns."""

    @abstractmethod
    def cut(self, position: Mapping[str, Any]) -> None:
        """Remove all rows that were appended after :meth:`position` returned this ``position``.

        Raises:
            ValueError: the tables are smaller than that.
        """

    @abstractmethod
    def rows(self, table: str) -> Iterator[Row]:
        """The rows of a table that are on the disk, from the first on; a half-written last line is left out."""

    @abstractmethod
    def close(self) -> None:
        """Write all rows that are not written yet."""


@final
class JsonLines(Store):
    """One file of JSON lines for each table, written at once."""

    format = "jsonl"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _path(self, table: str) -> Path:
        return self.directory / f"{table}.jsonl"

    def append(self, rows: Mapping[str, Sequence[Row]]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            if lines := [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows.get(table, ())]:
                with self._path(table).open("ab") as file:
                    file.write("".join(lines).encode())

    def position(self) -> dict[str, Any]:
        for path in log_files(self.directory, self.format):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return self._sizes()

    def _sizes(self) -> dict[str, int]:
        return {table: path.stat().st_size if (path := self._path(table)).exists() else 0 for table in TABLES}

    def cut(self, position: Mapping[str, Any]) -> None:
        sizes = self._sizes()
        for table, size in sizes.items():
            if size < position[table]:
                raise ValueError(
                    f"Expected {self._path(table)} to hold at least the {position[table]} bytes it held at the "
                    f"checkpoint, got {size}: it is the log of another run, or was removed. Resume with the directory "
                    "that the checkpoint's run logged to, or start a new log in an empty one."
                )
        for table, size in sizes.items():
            if size > position[table]:
                os.truncate(self._path(table), position[table])

    def rows(self, table: str) -> Iterator[Row]:
        if not self._path(table).exists():
            return
        with self._path(table).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # torn when the process was killed
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"Expected JSON in line {number} of {self._path(table)}: {error}.") from error
                yield row

    def close(self) -> None:
        pass


@final
class Parquet(Store):
    """Numbered Parquet files, one set whenever enough rows have been collected, and at each checkpoint.

    A Parquet file cannot grow, and one without its end cannot be read. So each is written as a whole under another
    name, and renamed afterwards.

    Args:
        directory: the directory of the files.
        rows_per_part: number of candidates after which a set is written.
    """

    format = "parquet"

    def __init__(self, directory: Path, *, rows_per_part: int = ROWS_PER_PART) -> None:
        try:
            pyarrow, self._parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        except ImportError as error:
            raise ImportError(
                'format="parquet" needs pyarrow: pip install "ftw-optim[datasets]", or take format="jsonl", which '
                "needs nothing."
            ) from error
        self.directory, self._arrow = directory, pyarrow
        text, number = pyarrow.string(), pyarrow.float64()
        numbers = ("kept_share", "effective_size", "residual", "cosine", "predicted_decrease", "fitted_scale")
        self._schemas = {
            "texts": pyarrow.schema({"id": text, "text": text}),
            "candidates": pyarrow.schema(
                {"step": pyarrow.int64(), "id": text, "source": text}
                | dict.fromkeys(("weight", "loss", "utility"), number)
            ),
            "times": pyarrow.schema({"step": pyarrow.int64(), "ms": pyarrow.map_(text, number)}),
            "steps": pyarrow.schema(
                dict.fromkeys(("step", "offered", "kept"), pyarrow.int64())
                | dict.fromkeys(numbers, number)
                | {"rejected": pyarrow.list_(text), "skipped": pyarrow.bool_(), "converged": pyarrow.bool_()}
                | {"combine": text, "metrics": pyarrow.map_(text, number)}
            ),
        }
        self._held: dict[str, list[Row]] = {table: [] for table in TABLES}
        self._parts, self._rows_per_part = 0, rows_per_part

    def _path(self, table: str, part: int) -> Path:
        return self.directory / f"{table}-{part:06}.parquet"

    def append(self, rows: Mapping[str, Sequence[Row]]) -> None:
        for table, held in self._held.items():
            held.extend(rows.get(table, ()))
        if len(self._held["candidates"]) >= self._rows_per_part:
            self._write()

    def _write(self) -> None:
        if not self._held["steps"]:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            unfinished = self.directory / f"{table}.unfinished"
            rows = self._arrow.Table.from_pylist(self._held[table], schema=self._schemas[table])
            with unfinished.open("wb") as file:
                self._parquet.write_table(rows, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path(table, self._parts))
            self._held[table] = []
        self._parts += 1

    def position(self) -> dict[str, Any]:
        self._write()
        return {"parts": self._parts}

    def cut(self, position: Mapping[str, Any]) -> None:
        self._held = {table: [] for table in TABLES}
        self._parts = position["parts"]
        if self._parts and not self._path("steps", self._parts - 1).exists():
            raise ValueError(
                f"Expected {self.directory} to hold the {self._parts} parts it held at the checkpoint, but "
                f"{self._path('steps', self._parts - 1).name} is missing: it is the log of another run, or was "
                "removed. Resume with the directory that the checkpoint's run logged to, or start a new log in an "
                "empty one."
            )
        for path in log_files(self.directory, self.format):
            if int(path.stem.rpartition("-")[2]) >= self._parts:
                path.unlink()

    def rows(self, table: str) -> Iterator[Row]:
        for path in sorted(self.directory.glob(f"{table}-*.parquet")):
            with self._parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    for row in batch.to_pylist():
                        for name in ("metrics", "ms"):
                            if name in row:
                                row[name] = dict(row[name])
                        yield row

    def close(self) -> None:
        self._write()


FORMATS = ("jsonl", "parquet")


def store(format: str, directory: Path, *, rows_per_part: int = ROWS_PER_PART) -> Store:
    """The tables of a directory, in one of :data:`FORMATS`."""
    return JsonLines(directory) if format == "jsonl" else Parquet(directory, rows_per_part=rows_per_part)


def log_files(directory: Path, format: str) -> list[Path]:
    """The files of a log in that format, in no order; only those of :data:`TABLES`."""
    pattern = {"jsonl": "{}.jsonl", "parquet": "{}-*.parquet"}[format]
    return [path for table in TABLES for path in directory.glob(pattern.format(table))]
