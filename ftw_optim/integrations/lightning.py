"""Lightning: a module whose training step selects, by manual optimisation.

Under automatic optimisation Lightning passes a closure that runs its own backward and returns a scalar: a
:class:`SelectiveOptimizer` then acts as its inner optimizer alone, with one warning. A module with
:class:`SelectiveModuleMixin` keeps its ``configure_optimizers`` and defines its candidates' losses:

    class Module(SelectiveModuleMixin, LightningModule):
        def candidate_losses(self, batch):  # in the place of training_step
            return token_losses(self.model, batch)

        def target_dataloader(self):
            return DataLoader(...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from ftw_optim._matching.selection import Selection
from ftw_optim._step.optimizer import SelectiveOptimizer
from ftw_optim._step.target import TargetGradient
from ftw_optim.integrations._trainers.metrics import PREFIX, numbers_of
from ftw_optim.integrations._trainers.rows import has_rows, rows_of
from ftw_optim.integrations._trainers.targets import CycledBatches

POOLS = ("window", "batch")
_OF_TARGET = ("refresh_every", "decay")


class SelectiveModuleMixin(LightningModule):
    """Makes a module train on the candidates that its target asks for; name it before other base classes.

    Lightning allows neither ``Trainer(accumulate_grad_batches=...)`` nor ``Trainer(gradient_clip_val=...)`` under
    manual optimisation: here they are attributes of the module, with the same names and meanings. Learning rates are
    scheduled as configured (``interval`` and ``frequency``), metrics are logged by :meth:`log_selection`, and a run
    resumed from a checkpoint goes on exactly, to the last bit. Only one device is supported.

    Attributes:
        accumulate_grad_batches: number of batches in a window, after which the optimizer steps; the last window of an
            epoch may be shorter, and counts less, as in Lightning.
        select_from: ``"window"``: one selection among all candidates of the window, whose batches wait for it.
            ``"batch"``: one selection for each batch; their gradients add up.
        gradient_clip_val: the limit with which ``configure_gradient_clipping`` is called; None: no clipping, unless the
            module overrides that method.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        lr_monitor: the logged metric that a ``ReduceLROnPlateau`` follows after each epoch. Under manual optimisation
            Lightning drops the ``monitor`` of a scheduler.
    """

    accumulate_grad_batches: int = 1
    select_from: str = "window"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    lr_monitor: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.training_step is not SelectiveModuleMixin.training_step:
            raise TypeError(
                f"Expected {cls.__name__} to define candidate_losses(batch) in the place of training_step, and to name "
                "SelectiveModuleMixin before its other bases: a training_step of its own would hide the selective one."
            )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

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
        """The options of :class:`SelectiveOptimizer`, and ``refresh_every`` and ``decay`` of :class:`TargetGradient`.

        ``model`` is the module that :meth:`candidate_losses` calls: by default the only child that holds all of the
        optimizer's parameters, or else the ``LightningModule`` itself.
        """
        return {}

    def log_selection(self, selection: Selection, loss: Tensor) -> None:
        """Log the loss and the metrics of a selection; the metrics are on the CPU already, the loss need not be.

        A logger repeats them for the batches that only wait for their window: ``log_every_n_steps`` counts batches.
        """
        metrics: dict[str, Any] = {"loss": loss, **numbers_of(selection)}
        self.log_dict({PREFIX + name: value for name, value in metrics.items()}, batch_size=len(selection.losses))

    # ------------------------------------------------------------------ what Lightning calls

    def configure_callbacks(self) -> list[Callback]:
        """The callback that wraps the optimizer; a module with callbacks of its own adds them to ``super()``'s."""
        inherited = super().configure_callbacks()
        return [*(inherited if isinstance(inherited, Sequence) else [inherited]), Selecting()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Select, and step at the end of a window; returns the weighted loss where a selection was made, else None."""
        selecting = _selecting(self.trainer)
        selective = selecting.selective
        ends_epoch = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
        ends_window = (batch_idx + 1) % self.accumulate_grad_batches == 0 or ends_epoch
        loss = None
        if self.select_from == "batch":
            if batch_idx % self.accumulate_grad_batches == 0:
                selective.zero_grad()
            loss = self._select(selective, [batch])
        else:
            selecting.window.append(batch)
            if ends_window:
                selective.zero_grad()
                loss = self._select(selective, move_data_to_device(selecting.window, self.device))
                selecting.window = []
        if ends_window:
            optimizer: Any = self.optimizers()
            optimizer.step(select=False)  # with Lightning's closure, which only calls hooks
            self._schedule("step", batch_idx + 1)
        if ends_epoch:
            self._schedule("epoch", self.current_epoch + 1)
        return loss

    # ------------------------------------------------------------------ one selection

    def _select(self, selective: SelectiveOptimizer, batches: list[Any]) -> Tensor:
        closure: Callable[..., Any]
        if len(batches) > 1:

            def closure() -> Any:
                return map(self.candidate_losses, batches)

        elif has_rows(batches[0]):

            def closure(rows: Tensor | None = None) -> Any:
                return self.candidate_losses(batches[0] if rows is None else rows_of(batches[0], rows))

        else:

            def closure() -> Any:
                return self.candidate_losses(batches[0])

        scale = len(batches) / self.accumulate_grad_batches  # as Lightning does in a window that the epoch cuts short
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # not get_scale(): a fresh scaler makes its scale at its first call of scale()
            scale *= float(scaler.scale(torch.ones((), device=self.device)))
        loss = selective.backward(closure, grad_scale=scale)
        assert selective.selection is not None
        self.log_selection(selective.selection, loss)
        return loss

    def _schedule(self, interval: str, count: int) -> None:
        """Step the learning-rate schedulers that are due, as automatic optimisation does."""
        for config in self.trainer.lr_scheduler_configs:
            on_turn = config.interval == interval and count % config.frequency == 0
            if on_turn and not isinstance(config.scheduler, ReduceLROnPlateau):
                self.lr_scheduler_step(config.scheduler, None)


class Selecting(Callback):
    """The state that a fit adds to its module: the wrapped optimizer, the target's batches, the unfinished window.

    It is a callback, since modules often override hooks without calling the inherited ones.

    Attributes:
        window: batches that wait for the selection.
    """

    def __init__(self) -> None:
        self.window: list[Any] = []
        self._selective: SelectiveOptimizer | None = None
        self._targets: CycledBatches | None = None
        self._position: dict[str, int] | None = None
        self._clipping: RemovableHandle | None = None

    @property
    def selective(self) -> SelectiveOptimizer:
        """The wrapped optimizer."""
        assert self._selective is not None
        return self._selective

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings that selection does not support, before the fit starts."""
        if stage != "fit":
            return
        module = _mixed_in(pl_module)
        if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise NotImplementedError(
                f"Expected one process and SingleDeviceStrategy, got {trainer.world_size} and "
                f"{type(trainer.strategy).__name__}: each process would select for itself, and the parameters would "
                "drift apart. Use Trainer(devices=1) with its default strategy."
            )
        if module.automatic_optimization:
            raise ValueError(
                "Expected automatic_optimization to be False, as SelectiveModuleMixin sets it: Lightning's own closure "
                "gives one loss for all candidates."
            )
        steps = module.accumulate_grad_batches
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"accumulate_grad_batches must be a positive integer, got {steps!r}.")
        if module.select_from not in POOLS:
            raise ValueError(f"select_from must be one of {POOLS}, got {module.select_from!r}.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizer, before a checkpoint is loaded into it."""
        module = _mixed_in(pl_module)
        if len(trainer.optimizers) != 1:
            raise NotImplementedError(
                f"Expected configure_optimizers to return one optimizer, got {len(trainer.optimizers)}. Give all "
                "parameters to one, in groups."
            )
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and (not module.lr_monitor or config.interval == "step"):
                raise ValueError(
                    "A ReduceLROnPlateau follows a metric after each epoch: set lr_monitor to its name on the module "
                    '(Lightning drops the scheduler\'s "monitor" under manual optimisation), and interval to "epoch".'
                )
        inner = trainer.optimizers[0]
        self._selective = inner if isinstance(inner, SelectiveOptimizer) else self._wrapped(trainer, module, inner)
        trainer.optimizers = [self._selective]

        def clip(*_: Any) -> None:
            module.configure_gradient_clipping(
                self.selective,
                gradient_clip_val=module.gradient_clip_val,
                gradient_clip_algorithm=module.gradient_clip_algorithm,
            )

        # Right before the inner step: after a GradScaler's unscaling and all on_before_optimizer_step, as in Lightning.
        self._clipping = self._selective.optimizer.register_step_pre_hook(clip)

    def _wrapped(
        self, trainer: Trainer, module: SelectiveModuleMixin, inner: torch.optim.Optimizer
    ) -> SelectiveOptimizer:
        options = dict(module.configure_selection())
        of_target = {name: options.pop(name) for name in _OF_TARGET if name in options}
        targets = self._targets = CycledBatches(module.target_dataloader(), seed=options.get("seed", 0))
        if self._position is not None:
            targets.load_state_dict(self._position)

        def target() -> Tensor:
            batch = trainer.precision_plugin.convert_input(next(targets))
            batch = module.on_before_batch_transfer(batch, dataloader_idx=0)
            return module.target_losses(trainer.strategy.batch_to_device(batch))

        model = options.pop("model", None)
        return SelectiveOptimizer(
            inner,
            _called(module, inner) if model is None else model,
            TargetGradient(target, **of_target),
            **options,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the learning-rate schedulers that follow a metric."""
        module = _mixed_in(pl_module)
        for config in trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, ReduceLROnPlateau) or (trainer.current_epoch + 1) % config.frequency:
                continue
            assert module.lr_monitor is not None
            metric = trainer.callback_metrics.get(module.lr_monitor)
            if metric is None:
                raise RuntimeError(
                    f"Expected the metric {module.lr_monitor!r} to be logged, which lr_monitor names; logged are "
                    f"{sorted(trainer.callback_metrics)}."
                )
            module.lr_scheduler_step(config.scheduler, metric)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook for clipping from the inner optimizer."""
        if self._clipping is not None:
            self._clipping.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Call :meth:`teardown`, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The place in the target's batches, and the batches of an unfinished window."""
        return {"window": self.window, "targets": None if self._targets is None else self._targets.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; Lightning calls this before the optimizer is wrapped."""
        self.window, self._position = list(state_dict["window"]), state_dict["targets"]


def _selecting(trainer: Trainer) -> Selecting:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Selecting):
            return callback
    raise RuntimeError(
        "Expected configure_callbacks to return those of SelectiveModuleMixin too, of which one wraps the optimizer: "
        "return [*super().configure_callbacks(), ...]."
    )


def _mixed_in(module: LightningModule) -> SelectiveModuleMixin:
    assert isinstance(module, SelectiveModuleMixin)
    return module


def _called(module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The child that holds all of the optimizer's parameters, since that is what losses call; else the module."""
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for child in module.children():
        if updated <= {id(parameter) for parameter in child.parameters()}:
            return module if isinstance(child, nn.ModuleList | nn.ModuleDict) else child
    return module
