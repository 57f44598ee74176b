"""How a trainer forms the losses of a window of candidates, and compares them with the loss that it would train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ftw_optim.integrations._trainers.micro_batch import MicroBatch
from ftw_optim.integrations._trainers.own_loss import LossComparison
from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.integrations._trainers.releases import counts_first_label, loss_shifts_labels
from ftw_optim.integrations._trainers.window import Window

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class WindowLossesMixin(_Base):
    """The part of :class:`SelectiveTrainerMixin` between the losses of positions and those of candidates."""

    sample_weighting: str
    _loss_comparison: LossComparison
    _own_step: bool
    _processes: Processes

    if TYPE_CHECKING:

        def position_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
            """See :meth:`SelectiveTrainerMixin.position_losses`."""

    def _window(self, model: nn.Module, batches: Sequence[Mapping[str, Any]], **options: Any) -> Window:
        return Window.of(
            batches,
            lambda inputs: self.position_losses(model, inputs),
            self.sample_weighting,
            over_window=self._divides_by_window,
            micro_batch=self._prepared_micro_batch,
            **options,
        )

    @property
    def _divides_by_window(self) -> bool:
        """Whether the trainer's loss is the mean over all labels of a window, and not the mean of means of batches."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        return bool(self.model_accepts_loss_kwargs if scaled is None else scaled)

    def _micro_batch(self, batch: Mapping[str, Any]) -> MicroBatch:
        """The micro-batch of what the collator gave, on the device."""
        return MicroBatch.of(batch, shifts=loss_shifts_labels(self), counts_first=counts_first_label(self))

    def _prepared_micro_batch(self, batch: Mapping[str, Any]) -> MicroBatch:
        """The micro-batch with what is computed of it before its losses are, once."""
        return self._micro_batch(batch)

    def _note_batch(self) -> None:
        """Called when the candidates of a micro-batch have passed through the model."""

    def _compare_losses(self, model: nn.Module, batches: Sequence[Mapping[str, Any]], given: Any) -> None:
        """Compare what is selected on with what the trainer would train on: the losses, and the number of labels.

        Raises:
            RuntimeError: they are not the same.
        """
        divides = self._divides_by_window
        if divides and self._own_step:
            (labels,) = self._processes.totals(sum(int(self._micro_batch(one).divides.sum()) for one in batches))
            self._loss_comparison.compare_number(given, labels)
        self._loss_comparison.compare(
            model,
            self._micro_batch(batches[0]),
            own=lambda inputs, labels: self._trainers_loss(model, inputs, labels if divides else None),
            positions=lambda inputs, labels: self.position_losses(model, inputs)[0].sum() / labels,
            divides=divides,
            low_precision=self.accelerator.mixed_precision != "no"
            or any(p.is_floating_point() and p.itemsize < 4 for p in model.parameters()),
        )

    def _trainers_loss(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor | None) -> Tensor:
        """The trainer's own loss of one batch; nothing is added to the trainer's metrics."""
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=tokens)
        assert isinstance(loss, Tensor)
        # Where it divides by the labels of all processes, the trainer undoes the mean that DDP would take.
        return loss if tokens is None else loss / self._processes.count
