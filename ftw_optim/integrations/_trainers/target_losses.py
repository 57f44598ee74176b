"""The losses of a trainer's target examples: those that guide, those that are trained on, and those held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.integrations._trainers.targets import TargetBatches
from ftw_optim.integrations._trainers.window import Window


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TargetLosses:
    """The losses of target examples, of those rows of a batch that this process runs.

    Attributes:
        guides: batches of the examples that guide.
        trained: of those that take part in every step, where others guide; None: there are none.
        held_out: of those that nothing is trained on; None: there are none.
        window: makes the window of a batch, which the collator gave.
        step: the number of the step.
        processes: those that share the rows.
        device: where losses are.
    """

    guides: TargetBatches
    trained: TargetBatches | None
    held_out: TargetBatches | None
    window: Callable[[Any], Window]
    step: Callable[[], int]
    processes: Processes
    device: torch.device

    def check_shares(self, *, trains: bool) -> None:
        """Check that every process has target rows of its own, where these are trained on.

        Args:
            trains: whether the examples that guide are.

        Raises:
            ValueError: there are fewer in a step than processes.
        """
        batches = self.guides if self.trained is None and trains else self.trained
        if batches is not None and (rows := min(batches.size, len(batches.dataset))) < self.processes.count:
            raise ValueError(
                f"Expected a target example for each of {self.processes.count} processes in every step, where they "
                f"are trained on, got {rows}: raise target_batch_size."
            )

    def of_guides(self) -> Tensor:
        """The losses of this step's guides, shape ``(m,)``."""
        return self._of(self.guides.at(self.step()), self.processes.rows)

    def of_trained(self) -> Tensor:
        """The losses of this step's examples that take part while others guide, shape ``(m,)``."""
        assert self.trained is not None
        return self._of(self.trained.at(self.step()), self.processes.rows)

    def of_held_out(self) -> Tensor:
        """The losses of all held-out examples."""
        assert self.held_out is not None
        enough = len(self.held_out.dataset) >= self.processes.count
        return torch.cat(
            [
                self._of(batch, partial(self.processes.dealt, turn=number) if enough else self.processes.rows)
                for number, batch in enumerate(self.held_out.in_order())
            ]
        )

    def _of(self, batch: Any, rows: Callable[[int], Tensor | None]) -> Tensor:
        window = self.window(batch)
        if not any(bool(one.counted.any()) for one in window.batches):
            raise ValueError(
                f"Expected target examples with labels, but none of the batch of step {self.step()} has any (all are "
                "-100): look at the labels of target_dataset and held_out_dataset."
            )
        own = rows(window.weighting.count)
        return torch.zeros(0, device=self.device) if own is not None and not len(own) else window.losses(own)
