"""The callback that looks at each step of a trainer, before the optimizer makes it and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class AroundStep(TrainerCallback):
    """Calls a function before the optimizer makes a step, and one with the step's number before anything is saved."""

    def __init__(self, before: Callable[[], None], after: Callable[[int], None]) -> None:
        self._before, self._after = before, after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See :class:`TrainerCallback`."""
        self._before()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See :class:`TrainerCallback`; the step is counted only afterwards."""
        self._after(state.global_step + 1)
