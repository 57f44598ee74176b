"""What a run of selections tells: averages for a trainer's log, and every step for a selection log."""

from __future__ import annotations

from collections import defaultdict
from typing import final

from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations._trainers.window import COLUMNS, Recorder, Window

PREFIX = "selection/"
"""Of the names under which loggers get them."""


def numbers_of(selection: Selection) -> dict[str, float]:
    """What a logger is told of a selection; all of it is on the CPU already."""
    n = len(selection.losses)
    return {
        "kept_share": int((selection.weights > 0).sum()) / n,
        "effective_size": selection.effective_size,
        "residual": selection.residual,
        "cosine": selection.cosine,
        "predicted_decrease": selection.predicted_decrease,
        "rejected": float(len(selection.rejected)),
        "skipped": float(selection.skipped),
        **{f"ms_{phase}": spent for phase, spent in selection.milliseconds.items()},
    }


@final
class Metrics:
    """Numbers of the steps since they were last asked for, and the step that is not in the selection log yet.

    Args:
        log: the selection log, if there is one.
    """

    def __init__(self, log: Recorder | None) -> None:
        self._log = log
        self._values: dict[str, list[float]] = defaultdict(list)
        self._last: tuple[Selection, Window, dict[str, float]] | None = None

    def note(self, selection: Selection, window: Window) -> None:
        """A selection among a window."""
        for name, value in numbers_of(selection).items():
            self._values[name].append(value)
        self._last = selection, window, {}  # all of these are the selection's own, which a log takes from it

    def note_realised(self, decrease: Tensor) -> None:
        """The realised decrease of the step that was noted last; waits for the device."""
        self._values["realised_decrease"].append(float(decrease))
        if self._last is not None:
            self._last[-1]["realised_decrease"] = self._values["realised_decrease"][-1]

    def record(self, step: int) -> None:
        """Hand over to the selection log what was noted last, if it has not been, as that step."""
        if self._log is not None and self._last is not None:
            selection, window, found = self._last
            ids, sources, texts = map(window.column, COLUMNS)
            self._log.record(
                step,
                selection,
                ids=[f"{step}.{number}" for number in range(len(selection.losses))] if ids is None else ids,
                sources=None if sources is None else list(map(str, sources)),
                texts=None if texts is None else list(map(str, texts)),
                metrics=found,
            )
        self._last = None

    def averages(self) -> dict[str, float]:
        """Over the steps since this was last called."""
        found = {PREFIX + name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return found
