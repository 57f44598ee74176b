"""The micro-batches of one accumulation window, which are the candidates of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations._trainers.micro_batch import MicroBatch, columns_of, joined_batches
from ftw_optim.integrations._trainers.packing import Documents
from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.integrations._trainers.weighting import Weighting

Positions = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
"""A function ``inputs -> (losses (b, t), counted (b, t))`` for the positions of a batch."""


class Recorder(Protocol):
    """The interface of logs for a trainer's selections, such as ``ftw_optim.selection_log.SelectionLog``."""

    def record(
        self,
        step: int,
        selection: Selection,
        *,
        ids: Sequence[Any],
        sources: Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Take one step's selection, with the id, source and text of each of its candidates."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint must hold to go on from here, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that state: selections that were taken after it are dropped."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """All candidates of one step.

    Attributes:
        batches: the micro-batches; those without any candidate are left out.
        weighting: how the token losses of a candidate become its loss.
        positions: gives the losses of a batch's positions.
        passed: called after each micro-batch, but not where some rows are run again.
    """

    batches: Sequence[MicroBatch]
    weighting: Weighting
    positions: Positions
    passed: Callable[[], None] | None = None

    @classmethod
    def of(
        cls,
        given: Sequence[Mapping[str, Any]],
        positions: Positions,
        weighting: str,
        *,
        over_window: bool,
        micro_batch: Callable[[Mapping[str, Any]], MicroBatch] | None = None,
        joined: bool = False,
        passed: Callable[[], None] | None = None,
        processes: Processes | None = None,
    ) -> Window:
        """A window of collated batches.

        Args:
            given: the collated micro-batches, on the device.
            positions: see :class:`Window`.
            weighting: ``"token_sum"`` or ``"token_mean"``.
            over_window: see :meth:`Weighting.of`.
            micro_batch: makes the micro-batch of a collated one; None: :meth:`MicroBatch.of`.
            joined: whether to pad the micro-batches and join them to one batch.
            passed: see :class:`Window`.
            processes: see :meth:`Weighting.of`.
        """
        batches = list(map(micro_batch or MicroBatch.of, given))
        if not (over_window and weighting == "token_sum"):
            batches = [replace(batch, divides=batch.counted) for batch in batches]
        batches = [batch for batch in batches if len(batch)]
        if joined and len(batches) > 1:
            batches = [joined_batches(batches)]
        how = Weighting.of(
            weighting,
            [batch.divides for batch in batches],
            [batch.documents for batch in batches],
            over_window=over_window,
            processes=processes,
        )
        return cls(batches=batches, weighting=how, positions=positions, passed=passed)

    def closure(self) -> Callable[..., Any]:
        """The closure for :meth:`SelectiveOptimizer.backward`."""
        if not self.batches:
            return lambda: torch.zeros(0)  # of other processes there may be candidates
        if len(self.batches) == 1:
            return self._one_batch
        return self._in_turn

    def sample_ids(self) -> Tensor | list[Tensor] | None:
        """The argument ``sample_ids`` for :meth:`SelectiveOptimizer.backward`."""
        if all(batch.documents is None and batch.rows_each == 1 for batch in self.batches):
            return None
        ids = [batch.sample_ids() for batch in self.batches]
        return ids[0] if len(ids) == 1 else ids

    def losses(self, rows: Tensor | None = None) -> Tensor:
        """The losses of all candidates, or of those at the indices ``rows``, in a window of a single batch."""
        return self._one_batch(rows)

    def token_loss(self, selection: Selection, processes: Processes | None = None) -> Tensor:
        """The mean loss of a token under the weights, a scalar on the device.

        Under equal weights this is the loss that a trainer without selection reports. The weighted mean of the
        candidates' own losses is not a loss per token where candidates have different numbers of tokens. For a skipped
        selection, accepted candidates get equal weights. Target rows that take part count where no candidate does.

        Args:
            selection: among the candidates of all processes.
            processes: those that have parts of the window; None: this is the whole of it.
        """
        units = torch.cat(
            [
                self.weighting.losses(number, batch.divides.to(torch.float32), batch.counted, batch.documents)
                for number, batch in enumerate(self.batches)
            ]
            or [torch.zeros(0)]
        )
        share = torch.zeros(len(selection.losses), dtype=torch.float64)
        if selection.skipped:
            share.fill_(1.0)[selection.rejected] = 0.0
        else:
            share[selection.kept] = selection.weights.to(share)
        if not bool(share.any()):
            if bool(selection.target_weights.any()):
                return selection.weighted_loss().to(units)
            return units.new_full((), torch.nan)
        counts = share > 0  # the others' losses may not be finite, and stay so when multiplied by zero
        total = (share[counts] * selection.losses[counts].to(share)).sum().to(units)
        tokens = (share[selection.mine].to(units) * units).sum()
        if processes is not None:
            tokens = processes.total(tokens)
        return total / tokens.clamp(min=torch.finfo(units.dtype).tiny)

    def column(self, key: str) -> list[Any] | None:
        """The values of a column for all candidates; None if the data do not have it."""
        return columns_of(self.batches).get(key)

    def _one_batch(self, rows: Tensor | None = None) -> Tensor:
        (batch,) = self.batches
        if rows is None:
            return self._first_pass(0, batch)
        if batch.documents is not None:
            return self._of(0, batch.inputs, batch.counted, batch.documents)[rows.to(batch.counted.device)]
        return self._of(0, batch.rows(rows), batch.counted[rows.to(batch.counted.device)], None)

    def _in_turn(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self.batches):
            yield self._first_pass(number, batch)

    def _first_pass(self, number: int, batch: MicroBatch) -> Tensor:
        losses = self._of(number, batch.inputs, batch.counted, batch.documents)
        if self.passed is not None:
            self.passed()
        return losses

    def _of(self, number: int, inputs: dict[str, Any], counted: Tensor, documents: Documents | None) -> Tensor:
        values, found = self.positions(dict(inputs))
        if found.shape != counted.shape:
            raise ValueError(
                f"Expected losses of positions of the labels' shape {tuple(counted.shape)}, got {tuple(found.shape)}."
            )
        return self.weighting.losses(number, values, counted, documents)
