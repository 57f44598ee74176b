"""The selection log: writing the selection of every step to disk, and reading the log of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.selection_log._store import FORMATS, ROWS_PER_PART, Row, Store, log_files, store

__all__ = ["LoggedRun", "SelectionLog", "read_log"]

_MILLISECONDS = re.compile(r"(^|[/._ ])ms([/._ ]|$)")


@final
class SelectionLog:
    """Writes one row for each candidate and one for each step into a directory.

    Tables (``NAME.jsonl``, or ``NAME-NUMBER.parquet``):

    - ``candidates``: ``step``, ``id``, ``source``, ``weight`` (0 where not kept), ``loss``, ``utility`` (the
      candidate's inner product with the target gradient in the optimizer's metric);
    - ``steps``: ``step``, ``offered``, ``kept``, ``kept_share``, ``effective_size``, ``residual``, ``cosine``,
      ``predicted_decrease``, ``fitted_scale``, ``rejected`` (ids), ``skipped``, ``converged``, ``combine``,
      ``metrics`` (those given, and, where target rows take part in the step, their share of the weight
      ``target_share`` and their mean loss ``target_loss``);
    - ``times``: ``step``, ``ms``: the selection's milliseconds by phase, and other measured times. They have a table of
      their own, so that all other tables are the same in every repetition of a run;
    - ``texts``: ``id``, ``text``, once for each id.

    Numbers that are not finite are written as null. JSON lines are handed to the system step by step: a killed process
    loses at most a last line that is half written. Parquet is written every ``rows_per_part`` candidates and at every
    :meth:`state_dict`.

    A resumed run calls :meth:`load_state_dict` with the :meth:`state_dict` of its checkpoint: all rows that were
    written after the checkpoint are removed, and the log goes on as if the run had never stopped.

    Args:
        directory: the directory of the log; it is made at the first :meth:`record`.
        format: ``"jsonl"``, or ``"parquet"``, which needs pyarrow.
        overwrite: remove a log that is already there, unless it is resumed.
        rows_per_part: number of candidates that Parquet collects before it writes them; JSON lines are written at once.

    Raises:
        ValueError: the format is not known, or ``rows_per_part`` is less than one.
        ImportError: the format is Parquet and pyarrow is missing.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        format: str = "jsonl",
        overwrite: bool = False,
        rows_per_part: int = ROWS_PER_PART,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}.")
        if rows_per_part < 1:
            raise ValueError(f"rows_per_part must be at least 1, got {rows_per_part!r}.")
        self.directory = Path(directory)
        self._overwrite, self._rows_per_part = overwrite, rows_per_part
        self._store = store(format, self.directory, rows_per_part=rows_per_part)
        self._begun = False
        self._closed = False
        self._last: int | None = None
        self._ids_with_text: set[str] = set()

    def record(
        self,
        step: int,
        selection: Selection,
        *,
        ids: Sequence[str | int],
        sources: Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Add one selection.

        Args:
            step: the number of the step, greater than that of the record before.
            selection: the optimizer's selection among ``n`` candidates.
            ids: ``n`` names of samples, kept as text; a sample must have the same name whenever it is offered.
            sources: ``n`` names of the samples' sources.
            metrics: further numbers of the step. Those with ``ms`` as one part of their name, such as ``ms_target`` or
                ``selection/ms/gram``, are times in milliseconds. One that ends in ``realised_decrease`` is the realised
                decrease of the target loss, which reports show beside the predicted one.
            texts: ``n`` texts of the samples; the first text of each id is kept.

        Raises:
            ValueError: the step is not greater, or a sequence has another length than ``n``.
            TypeError: a metric is a tensor on an accelerator; writing it would wait for the device.
            FileExistsError: the directory holds a log that was not resumed and must not be overwritten.
            RuntimeError: the log is closed.
        """
        self._begin()
        if self._last is not None and step <= self._last:
            raise ValueError(
                f"Expected a step after {self._last}, the last one logged, got {step}. A resumed run loads the log's "
                "state of its checkpoint first: log.load_state_dict(state)."
            )
        n = len(selection.losses)
        for name, values in (("ids", ids), ("sources", sources), ("texts", texts)):
            if values is not None and len(values) != n:
                raise ValueError(f"Expected {n} {name}, one for each candidate, got {len(values)}.")
        names = list(map(_text, ids))
        numbers = {name: _number(name, value) for name, value in (metrics or {}).items()}
        numbers = {name: _finite(value) for name, value in selection.target_numbers().items()} | numbers
        weights = [0.0] * n
        for index, weight in zip(selection.kept.tolist(), selection.weights.tolist(), strict=True):
            weights[index] = weight
        candidates = [
            {"step": step, "id": name, "source": source, "weight": weight, "loss": loss, "utility": utility}
            for name, source, weight, loss, utility in zip(
                names,
                [None] * n if sources is None else map(_text, sources),
                map(_finite, weights),
                map(_finite, selection.losses.tolist()),
                map(_finite, selection.cross_gram.tolist()),
                strict=True,
            )
        ]
        of_step = {
            "step": step,
            "offered": n,
            "kept": sum(weight != 0.0 for weight in weights),
            "kept_share": sum(weight != 0.0 for weight in weights) / max(1, n),
            "effective_size": _finite(selection.effective_size),
            "residual": _finite(selection.residual),
            "cosine": _finite(selection.cosine),
            "predicted_decrease": _finite(selection.predicted_decrease),
            "fitted_scale": _finite(selection.fitted_scale),
            "rejected": [names[index] for index in selection.rejected.tolist()],
            "skipped": selection.skipped,
            "converged": selection.converged,
            "combine": selection.combine,
            "metrics": {name: value for name, value in numbers.items() if not _MILLISECONDS.search(name)},
        }
        times = {f"ms_{phase}": _finite(spent) for phase, spent in selection.milliseconds.items()}
        times |= {name: value for name, value in numbers.items() if _MILLISECONDS.search(name)}
        new_texts = {} if texts is None else dict(zip(reversed(names), reversed(texts), strict=True))
        fresh = [name for name in dict.fromkeys(names) if name in new_texts and name not in self._ids_with_text]
        self._store.append(
            {
                "texts": [{"id": name, "text": _text(new_texts[name])} for name in fresh],
                "candidates": candidates,
                "times": [{"step": step, "ms": times}] if times else [],
                "steps": [of_step],
            }
        )
        self._ids_with_text.update(fresh)
        self._last = step

    def state_dict(self) -> dict[str, Any]:
        """The end of the log, for a checkpoint, as plain values; all rows up to it are on the disk afterwards."""
        if not self._begun and not self._overwrite:
            self._refuse_what_is_there()
        position = self._store.position() if self._begun else None
        return {"format": self._store.format, "step": self._last, "position": position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, and remove all rows that were written after that.

        Raises:
            ValueError: the state is of a log in another format, or the directory holds less than it says.
        """
        if not {"format", "step", "position"} <= state_dict.keys():
            raise ValueError(f"Expected what SelectionLog.state_dict() returned, got the keys {sorted(state_dict)}.")
        if state_dict["format"] != self._store.format:
            raise ValueError(
                f"Expected the state of a log with format={self._store.format!r}, got that of one with "
                f"{state_dict['format']!r}. Resume with the same format."
            )
        if state_dict["position"] is None:
            self._remove()
        else:
            self._store.cut(state_dict["position"])
        self._begun, self._closed, self._last = True, False, state_dict["step"]
        self._ids_with_text = {row["id"] for row in self._store.rows("texts")}

    def close(self) -> None:
        """Write all rows that are not written yet, and close the log: nothing can be recorded afterwards."""
        self._store.close()
        self._closed = True

    def __enter__(self) -> SelectionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        if self._closed:
            raise RuntimeError(f"The log in {self.directory} is closed; make another SelectionLog to resume it.")
        if not self._begun:
            if self._overwrite:
                self._remove()
            self._refuse_what_is_there()
            self._begun = True

    def _refuse_what_is_there(self) -> None:
        if found := self._files():
            raise FileExistsError(
                f"Expected no log in {self.directory}, found {found[0].name}. Resume it with "
                "log.load_state_dict(the state in the checkpoint), take another directory, or pass overwrite=True."
            )

    def _files(self) -> list[Path]:
        return [path for format in FORMATS for path in log_files(self.directory, format)]

    def _remove(self) -> None:
        self._store.close()
        for path in self._files():
            path.unlink()
        self._store = store(self._store.format, self.directory, rows_per_part=self._rows_per_part)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LoggedRun:
    """A log as :func:`read_log` finds it.

    Attributes:
        directory: the directory of the log.
        steps: the rows of the table ``steps``, each with its times as ``ms``, a dict that may be empty.
    """

    directory: Path
    steps: list[Row]
    _store: Store

    def candidates(self) -> Iterator[Row]:
        """The rows of the table ``candidates``, read lazily, without those of a step that is not in ``steps`` yet."""
        last = self.steps[-1]["step"] if self.steps else -math.inf
        return (row for row in self._store.rows("candidates") if row["step"] <= last)

    def texts(self) -> Iterator[tuple[str, str]]:
        """The ids and texts of samples, read lazily."""
        return ((row["id"], row["text"]) for row in self._store.rows("texts"))


def read_log(directory: str | Path) -> LoggedRun:
    """The log that a :class:`SelectionLog` wrote, of a finished, running or killed run.

    Args:
        directory: the directory of the log, or one that has the log in one of its folders.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: there are several logs, or a complete line is not JSON.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"Expected a directory with a selection log, but there is no directory {directory}.")
    folders = [directory] if _formats(directory) else [path for path in sorted(directory.iterdir()) if _formats(path)]
    if len(folders) != 1 or len(_formats(folders[0])) != 1:
        if not folders:
            raise FileNotFoundError(
                f"Expected a selection log in {directory} or in a folder of it, that is steps.jsonl or "
                "steps-000000.parquet and their like, as SelectionLog(directory) writes; found none."
            )
        raise ValueError(
            f"Expected one selection log, found several: {', '.join(map(str, folders))}. Name one of them."
        )
    tables = store(_formats(folders[0])[0], folders[0])
    times = {row["step"]: row["ms"] for row in tables.rows("times")}
    steps = [{**row, "ms": times.get(row["step"], {})} for row in tables.rows("steps")]
    return LoggedRun(directory=folders[0], steps=steps, _store=tables)


def _formats(directory: Path) -> list[str]:
    return [name for name in FORMATS if directory.is_dir() and log_files(directory, name)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: str | int) -> str:
    # Half of a surrogate pair, as texts that were cut or decoded wrongly have it, cannot be written.
    return str(value).encode("utf-8", "replace").decode()


def _number(name: str, value: Any) -> float | None:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(
            f"Expected the metric {name!r} as a number, got a tensor on {value.device}: to write it would wait for the "
            "device. Collect such values there and log their numbers later."
        )
    return _finite(float(value))
