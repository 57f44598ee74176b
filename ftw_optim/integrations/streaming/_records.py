"""Readers of records: from local files, sequences and streams, each of which can go on from a position."""

from __future__ import annotations

import gzip
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, final, runtime_checkable

from ftw_optim._private_names import DATASETS, check_private_names

Record = Mapping[str, Any]


@runtime_checkable
class StatefulStream(Protocol):
    """The part of a ``datasets.IterableDataset`` that is used."""

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the records from the loaded state on."""

    def state_dict(self) -> dict[str, Any]:
        """The state after the record that was read last."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Set the state at which the next iteration begins; None: at the first record."""


Source = str | Path | Sequence[str] | Sequence[Path] | Sequence[Record] | StatefulStream


@final
@dataclass(frozen=True)
class Unreadable:
    """The stand-in for a record that cannot be read."""

    reason: str
    detail: str


class Reader(ABC):
    """One pass over records, from any position."""

    @abstractmethod
    def begin(self, position: Any) -> None:
        """Go on from a position that :meth:`position` returned; None: from the first record."""

    @abstractmethod
    def read(self) -> Record | Unreadable | None:
        """The next record; None after the last."""

    @abstractmethod
    def position(self) -> Any:
        """The position of the next record, as JSON values."""

    def fingerprint(self) -> Any:
        """The facts about the source that must be equal for a position to be valid in it, as JSON values."""
        return None


@final
class _Lines(Reader):
    """Files of JSON lines, plain or gzip, one after the other. A broken line costs one record, not the file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._file: BinaryIO | None = None
        self.begin(None)

    def begin(self, position: Any) -> None:
        self._close()
        start: Sequence[int] = (0, 0, 0) if position is None else position
        self._number, self._offset, self._line = start

    def read(self) -> Record | Unreadable | None:
        while self._number < len(self.paths):
            path = self.paths[self._number]
            try:
                if self._file is None:
                    # Open until the end of the pass: a compressed file is read from its start to get to a place in it.
                    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
                    self._file = cast("BinaryIO", opened)
                    self._file.seek(self._offset)
                line = self._file.readline()
            except EOFError as error:
                raise OSError(f"Expected a whole gzip file, but {path} ends in the middle: it was cut.") from error
            if not line:
                self._close()
                self._number, self._offset, self._line = self._number + 1, 0, 0
                continue
            self._offset += len(line)
            self._line += 1
            if line.strip():
                return _parsed(line, f"{path}, line {self._line}")
        return None

    def position(self) -> Any:
        return [self._number, self._offset, self._line]

    def fingerprint(self) -> Any:
        return [[path.name, path.stat().st_size] for path in self.paths]

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def __del__(self) -> None:
        self._close()


def _parsed(line: bytes, place: str) -> Record | Unreadable:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Unreadable("not UTF-8", f"{place}: {error}")
    except (ValueError, RecursionError) as error:
        return Unreadable("not JSON", f"{place}: {error}")
    return record if isinstance(record, dict) else Unreadable("not a JSON object", f"{place}: {type(record).__name__}")


@final
class _Items(Reader):
    """A sequence of records, such as a list or a ``datasets.Dataset``."""

    def __init__(self, items: Sequence[Record]) -> None:
        self.items = items
        self._index = 0

    def begin(self, position: Any) -> None:
        self._index = position or 0

    def read(self) -> Record | Unreadable | None:
        if self._index >= len(self.items):
            return None
        self._index += 1
        return _mapping(self.items[self._index - 1], self._index - 1)

    def position(self) -> Any:
        return self._index

    def fingerprint(self) -> Any:
        return len(self.items)


@final
class _Stream(Reader):
    """A stream with a ``state_dict`` of its own, such as a ``datasets.IterableDataset``."""

    def __init__(self, stream: StatefulStream) -> None:
        self.stream = stream
        self.begin(None)

    def begin(self, position: Any) -> None:
        self._position = position
        self._iterator: Iterator[Any] | None = None
        self._count = 0

    def read(self) -> Record | Unreadable | None:
        if self._iterator is None:
            self.stream.load_state_dict(self._position)
            self._iterator = iter(self.stream)
        try:
            record = next(self._iterator)
        except StopIteration:
            return None
        self._count += 1
        return _mapping(record, self._count - 1)

    def position(self) -> Any:
        return self.stream.state_dict() if self._count else self._position


def _mapping(record: Any, index: int) -> Record | Unreadable:
    if isinstance(record, Mapping):
        return record
    return Unreadable("not a mapping", f"record {index}: {type(record).__name__}")


def reader_of(name: str, source: Source) -> Reader:
    """The reader of a source.

    Raises:
        TypeError: the source is of a kind that cannot be read on from a position.
        ValueError: the source is empty, or it shuffles through a buffer that its state does not hold.
        FileNotFoundError: a file is missing.
    """
    if isinstance(source, str | Path):
        source = cast("Sequence[str]", [source])
    if isinstance(source, StatefulStream):
        if type(source).__module__.startswith("datasets."):
            check_private_names(DATASETS)
        if _buffers(getattr(source, "_ex_iterable", None)):
            raise ValueError(
                f"Expected the source {name!r} without a shuffle buffer, whose samples are lost when it is resumed. "
                "Leave out .shuffle() and pass shuffle_buffer= here."
            )
        return _Stream(source)
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__") or isinstance(source, Mapping):
        raise TypeError(
            f"Expected the source {name!r} as a path or paths of JSON lines, a datasets.IterableDataset (or another "
            "iterable with state_dict and load_state_dict), or a sequence of records, got "
            f"{type(source).__name__}: what cannot be read on from a position cannot be resumed."
        )
    if not len(source):
        raise ValueError(f"Expected the source {name!r} to hold something, got an empty {type(source).__name__}.")
    if not isinstance(source[0], str | Path):
        return _Items(cast("Sequence[Record]", source))
    paths = [Path(cast("str | Path", path)) for path in source]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected the source {name!r} in local files, but there is no file {path}. For a data set of a hub "
                "pass datasets.load_dataset(..., streaming=True)."
            )
    return _Lines(paths)


def _buffers(examples: Any) -> bool:
    """Whether a shuffle buffer is among the layers of a ``datasets.IterableDataset``."""
    if examples is None:
        return False
    if type(examples).__name__ == "BufferShuffledExamplesIterable" and getattr(examples, "buffer_size", 2) > 1:
        return True
    below = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return any(map(_buffers, below))
