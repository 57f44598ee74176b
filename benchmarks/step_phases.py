"""Where the time of a selective step goes: a clock on the functions that are its phases."""

from __future__ import annotations

import importlib
import time
from types import TracebackType
from typing import Any

from step_arms import wait

MATERIALISE, PRODUCTS, REST_OF_GRAM, SOLVE = "materialise", "Gram products", "rest of the Gram matrix", "solve"
REST = "forward and the rest"

PHASES = (
    ("target", "ftw_optim._target", "TargetGradient.gradients"),
    ("backward to the factors", "ftw_optim._capture", "Capture.differentiate"),
    ("backward to the factors", "ftw_optim._capture", "Capture.stream"),
    (REST_OF_GRAM, "ftw_optim._gram", "GramSums.add"),
    (MATERIALISE, "ftw_optim._blocks", "Block.out"),
    (PRODUCTS, "ftw_optim._products", "Products.add"),
    (PRODUCTS, "ftw_optim._products", "Products.add_square"),
    (SOLVE, "ftw_optim._decision", "select"),
    ("combine", "ftw_optim._decision", "combined_gradients"),
    ("inner step", "torch.optim.adamw", "AdamW.step"),
)


class PhaseClock:
    """Adds up, while it is entered, the seconds spent in each phase and in no phase inside of it.

    ``REST_OF_GRAM`` holds the reading of the preconditioner, the mean gradient it looks ahead with, the scaling of the
    rows by its root, and products of metrics that need no gradient multiplied out.
    """

    def __init__(self, device: str) -> None:
        self.spent: dict[str, float] = {}
        self._device = device
        self._inside: list[float] = []  # of each open phase, the seconds of the phases inside
        self._restored: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> PhaseClock:
        self._start = self._now()
        for label, module, path in PHASES:
            *owners, name = path.split(".")
            owner: Any = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            function = getattr(owner, name)
            self._restored.append((owner, name, function))
            setattr(owner, name, self._timed(label, function))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, function in self._restored:
            setattr(owner, name, function)
        self._restored.clear()
        self.spent[REST] = self._now() - self._start - sum(self.spent.values())

    def _now(self) -> float:
        wait(self._device)
        return time.perf_counter()

    def _timed(self, label: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = self._now() - start
                self.spent[label] = self.spent.get(label, 0.0) + whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return timed
