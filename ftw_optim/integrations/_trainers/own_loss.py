"""The comparison of the losses that are selected on with the loss that the trainer would have trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from ftw_optim._capture.armed_hooks import passing_without_trace
from ftw_optim._layers.randomness import own_randomness
from ftw_optim.integrations._trainers.micro_batch import MicroBatch

Loss = Callable[[dict[str, Any], Tensor], Tensor]
"""A function ``(inputs, number of labels) -> loss``, a scalar."""


@final
class LossComparison:
    """Compares the mean loss of a token by the losses of positions with the trainer's own loss.

    Both are computed without gradients, from the same random state, in evaluation mode and as trained: a loss may add
    terms in training alone, and a model may draw dropout.

    Args:
        check: the option ``self_check`` of :class:`SelectiveOptimizer`.
        again: whether to compare again, after 1, 2, 4, 8 windows and so on, and at every ``check``-th: a loss of one's
            own may have terms that are nothing at first, or come in mid-run.
    """

    def __init__(self, check: bool | int | str, *, again: bool) -> None:
        self._every = int(check) if again and not isinstance(check, str) else 0
        self._again, self._windows, self._compared = again, 0, check is False

    def due(self) -> bool:
        """Whether this window is to be compared; called once for each."""
        self._windows += 1
        number = self._windows - 1
        return not self._compared or (self._every > 0 and (number & (number - 1) == 0 or number % self._every == 0))

    def compare_number(self, given: Any, counted: int) -> None:
        """Compare the number of labels that the training step was called with, ``given``, with that of the window.

        Raises:
            RuntimeError: they are not the same.
        """
        if given is None or int(given) != counted:
            raise RuntimeError(
                f"Expected the selective training_step to be called with num_items_in_batch={counted}, the number of "
                f"labels in the window, got {given if given is None else int(given)}: a training_step of your own "
                "leaves it out or changes it, or changes the labels after they have been counted. Hand on what the "
                "trainer gave, change labels in the collator, and losses in position_losses."
            )

    def compare(
        self, model: nn.Module, batch: MicroBatch, *, own: Loss, positions: Loss, low_precision: bool, divides: bool
    ) -> None:
        """Compare on one micro-batch; one without labels says nothing.

        Args:
            model: the model.
            batch: the micro-batch.
            own: the trainer's own loss.
            positions: the mean loss of a label by the losses of positions.
            low_precision: whether anything is computed in a short dtype.
            divides: whether the trainer's own loss is to be divided by the number of labels that it is given.

        Raises:
            RuntimeError: the two losses are not the same.
        """
        labels = batch.counted.sum()
        if not bool(labels):
            return

        def losses(*, training: bool) -> tuple[float, float]:
            return _loss_of(model, batch, own, labels, training=training), _loss_of(
                model, batch, positions, labels, training=training
            )

        expected, found = losses(training=False)
        apart = (2e-2 if low_precision else 1e-4) * max(1.0, abs(expected))
        when, fits = "", abs(found - expected) <= apart
        if fits:
            expected, found = losses(training=True)
            when, fits = "in training mode, ", abs(found - expected) <= apart
            # What cannot be repeated cannot be compared either.
            fits = fits or abs(_loss_of(model, batch, own, labels, training=True) - expected) > apart / 10
            if fits and divides and self._again:
                half = _loss_of(model, batch, own, 2 * labels, training=False)
                self._check_divided(2 * half, _loss_of(model, batch, own, labels, training=False), apart)
        if not fits:
            raise RuntimeError(
                f"Expected the losses of positions to have the trainer's own loss as their mean, {when}{expected:.6g} "
                f"on the first micro-batch of the window, got {found:.6g}: compute_loss or the model adds something "
                "else. Override position_losses to return what is trained on, or switch this check off by "
                'selective={"self_check": False}.'
            )
        self._compared = True

    def _check_divided(self, found: float, expected: float, apart: float) -> None:
        if abs(found - expected) > 2 * apart:
            raise RuntimeError(
                "Expected compute_loss to divide by num_items_in_batch, the number of labels in the window, as the "
                f"loss of the model does: with twice the number it gave {found / 2:.6g}, and not half of "
                f"{expected:.6g}. Hand the number on to super().compute_loss or to the model; without it the trainer "
                "takes the mean of the means of micro-batches, for which set model.accepts_loss_kwargs = False."
            )


def _loss_of(model: nn.Module, batch: MicroBatch, loss: Loss, labels: Tensor, *, training: bool) -> float:
    modes = {module: module.training for module in model.modules()}
    try:
        if not training:
            model.eval()
        with passing_without_trace(model), own_randomness(model.parameters(), 0):
            return float(loss(dict(batch.inputs), labels))
    finally:
        for module, mode in modes.items():
            module.training = mode
