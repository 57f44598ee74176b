"""The processes of a trainer's run: what they add up and gather, and which target rows each of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor

from ftw_optim.integrations._trainers.dealing import part_of


@final
class Processes:
    """The processes that share one selection; a process that is alone adds up and gathers its own.

    Args:
        accelerator: the trainer's.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.count = int(accelerator.num_processes)
        self.own = int(accelerator.process_index)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count == 1:
            return value
        summed: Tensor = self._accelerator.reduce(value.clone(), reduction="sum")
        return summed

    def totals(self, *numbers: int) -> list[int]:
        """The sums of some numbers over all processes."""
        if self.count == 1:
            return list(numbers)
        return [int(n) for n in self.total(torch.tensor(numbers, device=self._accelerator.device)).tolist()]

    def agreed(self, work: Callable[[], Any]) -> Any:
        """The result of some work, which is to be the same on each process and fails on all where it fails on one.

        Raises:
            RuntimeError: it failed elsewhere, or its results differ.
        """
        if self.count == 1:
            return work()
        found, failure = None, None
        try:
            found = work()
        except Exception as error:
            failure = error
        told = self.gathered((found, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        if texts := [(rank, text) for rank, (_, text) in enumerate(told) if text is not None]:
            raise RuntimeError(f"Rank {texts[0][0]} raised {texts[0][1]}")
        if any(other != found for other, _ in told):
            raise RuntimeError(
                "Expected all processes to propose the same records, but they differ. Give all of them the same data, "
                "target examples and seed, and load the same checkpoint."
            )
        return found

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives."""
        return [value] if self.count == 1 else list(gather_object([value]))

    def joined(self, values: Sequence[Any] | None) -> list[Any] | None:
        """The entries of all processes, in their order; None where one of them has none."""
        parts = self.gathered(None if values is None else list(values))
        return None if any(part is None for part in parts) else [entry for part in parts for entry in part]

    def rows(self, count: int) -> Tensor | None:
        """Which of so many rows this process runs; None: all, where it is alone, or there are fewer than processes.

        Rows that each process runs count once for each, which leaves their mean what it is.
        """
        return None if count < self.count else self.dealt(count, 0)

    def dealt(self, count: int, turn: int) -> Tensor | None:
        """Which of so many rows this process runs, perhaps none; None: all, where it is alone.

        Args:
            count: number of rows.
            turn: process that gets the first of them, modulo their number.
        """
        if self.count == 1:
            return None
        return torch.tensor(part_of(range(count), (self.own - turn) % self.count, self.count), dtype=torch.int64)
