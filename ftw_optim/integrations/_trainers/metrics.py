"""Metrics of selections: averages for a trainer's log, and the single steps for a selection log."""

from __future__ import annotations

from collections import defaultdict
from typing import final

from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations._trainers.micro_batch import COLUMNS
from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.integrations._trainers.window import Recorder, Window
from ftw_optim.selection_log import Cost

PREFIX = "selection/"
"""Prefix of the names under which loggers get the metrics."""


def numbers_of(selection: Selection) -> dict[str, float]:
    """The metrics of a selection for a logger; all of them are on the CPU already."""
    n = len(selection.losses)
    return {
        **selection.target_numbers(),
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
    """The metrics of the steps since the last call of :meth:`averages`, and the step that is not logged yet.

    Args:
        log: the selection log, if there is one; that of the first process is written.
        processes: those that have parts of the window.
    """

    def __init__(self, log: Recorder | None, processes: Processes) -> None:
        self._log, self._processes = log, processes
        self.logs = bool(processes.gathered(log is not None)[0])
        """Whether the first process has a log, for which the others give what they know of their candidates."""
        self.cost = Cost()
        """The seconds of all selections so far."""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._last: tuple[Selection, Window, dict[str, float]] | None = None

    def note(self, selection: Selection, window: Window) -> None:
        """Note the selection among the candidates of a window."""
        for name, value in numbers_of(selection).items():
            self._values[name].append(value)
        kept = int((selection.weights > 0).sum())
        self.cost.add(selection.milliseconds, combine=selection.combine, offered=len(selection.losses), kept=kept)
        self._last = selection, window, {}  # all of these are the selection's own, which a log takes from it

    def note_realised(self, decrease: Tensor) -> None:
        """Note the realised decrease of the step that was noted last; this waits for the device."""
        self._values["realised_decrease"].append(float(decrease))
        if self._last is not None:
            self._last[-1]["realised_decrease"] = self._values["realised_decrease"][-1]

    def record(self, step: int) -> None:
        """Record the last noted selection in the selection log, as that ``step``, unless it has been recorded."""
        if self.logs and self._last is not None:
            selection, window, found = self._last
            ids, sources, texts = (self._processes.joined(window.column(key)) for key in COLUMNS)
            if self._log is not None and self._processes.own == 0:
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
        """The averages of all metrics over the steps since the last call."""
        found = {PREFIX + name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return found
