"""The clock that measures the time of each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from ftw_optim._gram.profiling import profiled


@final
class Clock:
    """Adds up the milliseconds of each phase, as the host sees them.

    An accelerator runs asynchronously: its work counts in the phase in which the host waits for it. The time of a phase
    inside of another one counts only for the inner one.

    Phases are ranges of ``torch.profiler`` as well, named ``ftw_optim/PHASE``; within them are ``ftw_optim/backward``
    (the backward pass to the factors), ``ftw_optim/materialise`` (gradients multiplied out) and ``ftw_optim/products``.

    Args:
        now: returns the present time in seconds, from any start.
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.milliseconds: dict[str, float] = {}
        self._inside = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block whose time counts for the phase ``name``."""
        outer, self._inside = self._inside, 0.0
        start = self._now()
        try:
            with profiled(name):
                yield
        finally:
            spent = 1e3 * (self._now() - start)
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent - self._inside
            self._inside = outer + spent
