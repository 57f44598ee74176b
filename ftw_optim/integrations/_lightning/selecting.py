"""The callback that adds selection to a fit: the wrapped optimizer, the target's batches, the unfinished window."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Protocol, cast, final

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from ftw_optim._matching.selection import Selection
from ftw_optim._ranks.wrapping import refuse_wrapper
from ftw_optim._step.optimizer import SelectiveOptimizer
from ftw_optim._step.target import TargetGradient
from ftw_optim.integrations._lightning.halves import Halves
from ftw_optim.integrations._lightning.refusals import refuse_replaced_hooks, refuse_settings
from ftw_optim.integrations._lightning.settings import Settings
from ftw_optim.integrations._trainers.dealing import part_of
from ftw_optim.integrations._trainers.rows import has_rows, rows_of
from ftw_optim.integrations._trainers.targets import CycledBatches

_OF_TARGET = tuple(one.name for one in fields(TargetGradient) if one.name != "closure")


class Selectable(Protocol):
    """What the callback needs of a module, beside all that is Lightning's."""

    _selecting: Selecting | None

    def candidate_losses(self, batch: Any) -> Tensor: ...

    def target_losses(self, batch: Any) -> Tensor: ...

    def target_dataloader(self) -> Iterable[Any]: ...

    def configure_selection(self) -> dict[str, Any]: ...


@final
class Selecting(Callback):
    """The state that a fit adds to its module: the wrapped optimizer, the target's batches, the unfinished window.

    It is a callback, since modules often override hooks without calling the inherited ones, and the first one: others,
    such as the learning rate finder, train in their ``on_fit_start``, and take the trainer's callbacks away meanwhile.
    So the module knows it too, from ``setup`` to ``teardown``.

    Attributes:
        window: batches that wait for the selection.
    """

    def __init__(self) -> None:
        self.window: list[Any] = []
        self._halves: Halves | None = None
        self._targets: CycledBatches | None = None
        self._position: dict[str, int] | None = None
        self._settings: Settings | None = None
        self._wrapper: DistributedDataParallel | None = None
        self._several = False  # of the last fit: after an exception others still save

    @property
    def selective(self) -> SelectiveOptimizer:
        """The wrapped optimizer."""
        return self.halves.selective

    @property
    def halves(self) -> Halves:
        """The wrapped optimizer, in the two halves that Lightning calls."""
        assert self._halves is not None
        return self._halves

    # ------------------------------------------------------------------ what Lightning calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what selection does not support, before the fit starts, and apply the module's settings."""
        if stage != "fit" or not hasattr(pl_module, "_selecting"):  # another module, after a fit of the mixin's
            return
        refuse_replaced_hooks(pl_module)
        refuse_settings(pl_module, trainer)
        self._settings = Settings(trainer, pl_module)
        _selectable(pl_module)._selecting = self
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizer, before a checkpoint is loaded into it."""
        if self._settings is None:
            return
        (inner,) = trainer.optimizers  # Lightning refuses several
        selective = inner if isinstance(inner, SelectiveOptimizer) else self._wrapped(trainer, pl_module, inner)
        self._halves = Halves(selective)
        trainer.optimizers = [selective]
        if isinstance(wrapper := trainer.strategy.model, DistributedDataParallel):
            refuse_wrapper(wrapper, range(trainer.world_size))
            wrapper.require_backward_grad_sync = False  # it runs the selection, but no backward pass of its own
            self._wrapper = wrapper
        self._several = self._wrapper is not None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizer, the trainer and the module as they were."""
        if self._settings is None:
            return
        self._settings.restore()
        self._settings = None
        _selectable(pl_module)._selecting = None
        if self._halves is not None:
            self._halves.detach()
        if self._wrapper is not None:
            self._wrapper.require_backward_grad_sync, self._wrapper = True, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Call :meth:`teardown`, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The place in the target's batches, and the batches of an unfinished window, those of each process."""
        return {
            "window": _of_all_processes(self.window) if self._several and dist.is_initialized() else list(self.window),
            "targets": self._position if self._targets is None else self._targets.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; a checkpoint's before the optimizer is wrapped, a tuner's in the midst of a fit."""
        window, self._position = state_dict["window"], state_dict["targets"]
        processes, own = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        windows = window if isinstance(window, dict) else {0: window}
        if len(windows) != processes and any(windows.values()):
            raise ValueError(
                f"Expected as many processes as were there when a window was cut short, {len(windows)}, got "
                f"{processes}: resume from a checkpoint at the end of a window."
            )
        self.window = list(windows.get(own, []))
        if self._targets is not None and self._position is not None:
            self._targets.load_state_dict(self._position)

    # ------------------------------------------------------------------ one selection

    def select(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any], *, first: bool) -> _Selected:
        """Select among the candidates of some batches, and withhold the gradient until Lightning's backward.

        Args:
            trainer: the trainer of the fit.
            pl_module: the module.
            batches: the batches.
            first: Lightning clears the gradients before its backward.
        """
        module = _selectable(pl_module)
        # Those of a checkpoint are on the CPU. The last one is as the loader has given it.
        batches = [*move_data_to_device(batches[:-1], pl_module.device), batches[-1]]
        closure: Callable[..., Any]
        if len(batches) > 1:

            def closure() -> Any:
                return map(module.candidate_losses, batches)

        elif has_rows(batches[0]):

            def closure(rows: Tensor | None = None) -> Any:
                return module.candidate_losses(batches[0] if rows is None else rows_of(batches[0], rows))

        else:

            def closure() -> Any:
                return module.candidate_losses(batches[0])

        scale = len(batches) / trainer.accumulate_grad_batches  # as Lightning does in a window that is cut short
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # not get_scale(): a fresh scaler makes its scale at its first call of scale()
            scale *= float(scaler.scale(torch.ones((), device=pl_module.device)))
        forget = first and not _sees_old_gradients(trainer, pl_module)
        return self.halves.select(closure, grad_scale=scale, forget=forget)

    def _wrapped(
        self, trainer: Trainer, pl_module: LightningModule, inner: torch.optim.Optimizer
    ) -> SelectiveOptimizer:
        module = _selectable(pl_module)
        options = dict(module.configure_selection())
        of_target = {name: options.pop(name) for name in _OF_TARGET if name in options}
        targets = self._targets = CycledBatches(module.target_dataloader(), seed=options.get("seed", 0))
        if self._position is not None:
            targets.load_state_dict(self._position)

        def target() -> Tensor:
            batch = trainer.precision_plugin.convert_input(next(targets))
            batch = pl_module._on_before_batch_transfer(batch)  # a data module's, where it has one
            trained = options.get("train_on_target") is True
            batch = _dealt(batch, trainer.global_rank, trainer.world_size, trained=trained)
            return module.target_losses(trainer.strategy.batch_to_device(batch))

        model = options.pop("model", None)
        return SelectiveOptimizer(
            inner,
            _called(pl_module, inner) if model is None else model,
            TargetGradient(target, **of_target),
            **options,
        )


_Selected = tuple[Tensor, Selection]


def _of_all_processes(window: list[Any]) -> dict[int, list[Any]]:
    """The batches that wait in each process; a checkpoint is made by all, and written by one."""
    windows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(windows, list(window))
    return dict(enumerate(windows))


def _dealt(batch: Any, rank: int, ranks: int, *, trained: bool) -> Any:
    """The rows of a target batch that are this process's; all, where they cannot be told apart or are too few.

    Rows that each process runs count once for each, which leaves their mean what it is. Where they are trained on, and
    weighed by what others of them ask for, they must not meet themselves.

    Raises:
        ValueError: they would.
    """
    if ranks == 1:
        return batch
    count = len(tree_leaves(batch)[0]) if has_rows(batch) else 0
    if count < ranks and trained:
        raise ValueError(
            f"Expected target batches of tensors with a row for each of {ranks} processes at least, where they are "
            f"trained on, got {f'{count} rows' if count else 'another structure'}."
        )
    return batch if count < ranks else rows_of(batch, torch.tensor(part_of(range(count), rank, ranks)))


def _selectable(module: LightningModule) -> Selectable:
    return cast(Selectable, module)


def _sees_old_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Whether somebody sees, or keeps, the gradients that Lightning clears between a training step and its backward."""
    if is_overridden("on_before_zero_grad", module) or is_overridden("optimizer_zero_grad", module):
        return True
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(is_overridden("on_before_zero_grad", callback) for callback in callbacks)


def _called(module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The child that holds all of the optimizer's parameters, since that is what losses call; else the module."""
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for child in module.children():
        if updated <= {id(parameter) for parameter in child.parameters()}:
            return module if isinstance(child, nn.ModuleList | nn.ModuleDict) else child
    return module
