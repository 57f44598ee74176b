"""Lightning: a module whose training step selects, within Lightning's own (automatic) optimisation.

A :class:`SelectiveOptimizer` that ``configure_optimizers`` returns acts as its inner optimizer alone, with one warning:
Lightning passes a closure that runs its own backward and returns a scalar. A module with :class:`SelectiveModuleMixin`
keeps its ``configure_optimizers`` and defines its candidates' losses:

    class Module(SelectiveModuleMixin, LightningModule):
        def candidate_losses(self, batch):  # in the place of training_step
            return token_losses(self.model, batch)

        def target_dataloader(self):
            return DataLoader(...)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim._private_names import LIGHTNING, check_private_names
from ftw_optim.integrations._lightning.refusals import refuse_hidden_hooks
from ftw_optim.integrations._lightning.selecting import Selecting
from ftw_optim.integrations._trainers.metrics import PREFIX, numbers_of

check_private_names(LIGHTNING)

__all__ = ["Selecting", "SelectiveModuleMixin"]


class SelectiveModuleMixin(LightningModule):
    """Makes a module train on the candidates that its target asks for; name it before other base classes.

    Lightning's loop stays as it is: every hook of modules, data modules and callbacks is called where it is without
    selection, and as often; so are schedulers, loggers, clipping and the tuners (learning rate and batch size finder).
    Only two are refused by name: a ``training_step`` (:meth:`candidate_losses` takes its place) and a ``backward`` of
    one's own (gradients come from the selection). What hooks see:

    - ``on_before_backward`` and ``outputs["loss"]`` get the weighted loss of the kept candidates, divided by
      ``accumulate_grad_batches`` as always. With ``select_from="window"`` that is 0 for the batches that wait, and for
      the last one the sum over the window; ``.grad`` gets the whole window's gradient in the last one's backward.
    - The closure of ``optimizer_step`` runs the selection: learning rates that are set before it count.
    - Hooks for the transfer of batches are called for the target's batches too.

    A run resumed from a checkpoint goes on exactly, to the last bit; with ``select_from="batch"``, as in plain
    Lightning, from one at the end of a window. What ``candidate_losses`` logs, it logs for target batches too, unless
    ``target_losses`` is defined.

    With ``strategy="ddp"`` there is one selection among the candidates of all processes. Each runs its part of a target
    batch's rows. The other strategies for several devices are refused by name.

    Attributes:
        accumulate_grad_batches: number of batches in a window, after which the optimizer steps; the last window of an
            epoch may be shorter, and counts less, as in Lightning. This and the next two are the Trainer's settings of
            these names, for a module that brings them along; None: as the Trainer says.
        gradient_clip_val: the limit with which ``configure_gradient_clipping`` is called.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        select_from: ``"window"``: one selection among all candidates of the window, whose batches wait for it.
            ``"batch"``: one selection for each batch; their gradients add up.
    """

    accumulate_grad_batches: int | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    select_from: str = "window"
    _selecting: Selecting | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_hidden_hooks(cls, SelectiveModuleMixin)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_selecting"}

    # ------------------------------------------------------------------ what a module defines

    def candidate_losses(self, batch: Any) -> Tensor:
        """The candidates' own losses, shape ``(n,)``, such as ``token_losses(self.model, batch)``."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define candidate_losses(batch) -> (n,), one loss for each candidate."
        )

    def target_losses(self, batch: Any) -> Tensor:
        """The losses of target examples, shape ``(m,)``; by default :meth:`candidate_losses`."""
        return self.candidate_losses(batch)

    def target_dataloader(self) -> Iterable[Any]:
        """The batches of target examples, one for each target gradient, used in rounds: a ``DataLoader`` or a list."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define target_dataloader(), the batches of target examples."
        )

    def configure_selection(self) -> dict[str, Any]:
        """The options of :class:`SelectiveOptimizer`, and those of :class:`TargetGradient`.

        ``model`` is the module that :meth:`candidate_losses` calls: by default the only child that holds all of the
        optimizer's parameters, or else the ``LightningModule`` itself.
        """
        return {}

    def log_selection(self, selection: Selection, loss: Tensor) -> None:
        """Log the loss and the metrics of a selection; the metrics are on the CPU already, the loss need not be."""
        metrics: dict[str, Any] = {"loss": loss, **numbers_of(selection)}
        self.log_dict({PREFIX + name: value for name, value in metrics.items()}, batch_size=len(selection.losses))

    # ------------------------------------------------------------------ what Lightning calls

    def configure_callbacks(self) -> list[Callback]:
        """The callback that wraps the optimizer; a module with callbacks of its own adds them to ``super()``'s."""
        inherited = super().configure_callbacks()
        return [*(inherited if isinstance(inherited, Sequence) else [inherited]), Selecting()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Select, where a window ends or at each batch; returns the weighted loss, or 0 for a batch that waits."""
        if self._selecting is None:
            raise RuntimeError(
                "Expected configure_callbacks to return those of SelectiveModuleMixin too, of which one wraps the "
                "optimizer: return [*super().configure_callbacks(), ...]."
            )
        if self.trainer.fit_loop._skip_backward:  # a pass for the running statistics of batch norms
            return self.candidate_losses(batch).detach().mean()
        selecting, steps = self._selecting, self.trainer.accumulate_grad_batches
        first = batch_idx % steps == 0
        batches = [batch]
        if self.select_from == "window":
            # Batches of an earlier window are left over where an epoch ended early.
            batches = selecting.window = [batch] if first else [*selecting.window, batch]
            ends_epoch = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
            if (batch_idx + 1) % steps and not ends_epoch:
                return torch.zeros((), device=self.device)
            selecting.window = []
        loss, selection = selecting.select(self.trainer, self, batches, first=first)
        self.log_selection(selection, loss)
        return loss * len(batches)  # Lightning divides it by the number of batches in a window

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        """Hand over the gradient of the selection that was made in the training step."""
        assert self._selecting is not None
        self._selecting.halves.backward()
