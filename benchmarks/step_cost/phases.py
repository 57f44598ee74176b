"""The time of each phase of a selective step, from the ranges that it opens for ``torch.profiler``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .arms import wait

MATERIALISE, PRODUCTS, REST_OF_GRAM, SOLVE = "materialise", "Gram products", "rest of the Gram matrix", "solve"
REST = "forward and the rest"

PHASES = {
    "ftw_optim/target": "target",
    "ftw_optim/backward": "backward to the factors",
    "ftw_optim/gram": REST_OF_GRAM,
    "ftw_optim/materialise": MATERIALISE,
    "ftw_optim/products": PRODUCTS,
    "ftw_optim/solve": SOLVE,
    "ftw_optim/combine": "combine",
    "ftw_optim/candidates": REST,
    "Optimizer.step#AdamW.step": "inner step",  # torch's own; that of the wrapper bears the wrapper's name
}
"""Labels of the profiler's ranges."""


@dataclass(frozen=True)
class Range:
    """A stretch of time with a label, in seconds.

    Attributes:
        start: of it.
        end: of it.
        label: what the time counts for.
        on_device: whether the device spent it, rather than the host.
    """

    start: float
    end: float
    label: str
    on_device: bool = False


class PhaseClock:
    """Adds up, while it is entered, the seconds spent in each phase and in no phase inside of it.

    ``REST_OF_GRAM`` holds the reading of the preconditioner, the mean gradient it looks ahead with, the scaling of the
    rows by its root, and products of metrics that need no gradient multiplied out. ``SOLVE`` is filter and weights,
    with the copy of the small Gram system to the host before them. The profiler notes every operation, which takes
    microseconds each: phases of many small ones come out too long.
    """

    def __init__(self, device: str) -> None:
        self.spent: dict[str, float] = {}
        self._device = device
        activities = [ProfilerActivity.CPU] + ([] if device == "cpu" else [ProfilerActivity.CUDA])
        self._profile = profile(activities=activities)

    def __enter__(self) -> PhaseClock:
        self._profile.__enter__()
        self._start = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = self._now() - self._start
        self._profile.__exit__(kind, error, trace)
        self.spent = exclusive(
            Range(
                1e-6 * event.time_range.start,
                1e-6 * event.time_range.end,
                PHASES[event.name],
                event.device_type != DeviceType.CPU,
            )
            for event in self._profile.events() or ()
            if event.name in PHASES
        )
        self.spent.pop(REST, None)
        self.spent[REST] = whole - sum(self.spent.values())

    def _now(self) -> float:
        wait(self._device)
        return time.perf_counter()


def exclusive(ranges: Iterable[Range]) -> dict[str, float]:
    """Seconds by label, each counted once: for the innermost range.

    A device works on behind the host, which waits for it or runs ahead: while it works, its range counts.
    """
    every = list(ranges)
    spent = dict.fromkeys((one.label for one in every), 0.0)
    # At the same time what ends goes before what begins, and what is around before what is inside.
    edges = [(one.start, 1, -one.end, one) for one in every] + [(one.end, 0, 0.0, one) for one in every]
    open_: list[Range] = []
    last = 0.0
    for now, begins, _, one in sorted(edges, key=lambda edge: edge[:3]):
        if open_:
            spent[max(open_, key=lambda each: each.on_device).label] += now - last
        last = now
        if begins:
            open_.insert(0, one)  # max takes the first of several: the innermost
        else:
            open_.remove(one)
    return spent
