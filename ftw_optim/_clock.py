"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final


@final
class Clock:
    """Adds up the milliseconds of each phase, as the host sees them.

    An accelerator works on behind the host: what is waited for counts where it is waited for. A phase inside of another
    does not count for that.
    """

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._inside = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it, time counts for ``name``."""
        outer, self._inside = self._inside, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = 1e3 * (time.perf_counter() - start)
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent - self._inside
            self._inside = outer + spent
