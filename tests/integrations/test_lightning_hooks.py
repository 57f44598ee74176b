"""Hooks of Lightning under selection: each is called where, as often and with what it is called without."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from ftw_optim import SelectiveOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.plugins import MixedPrecision

from ftw_optim.integrations.lightning import Selecting, SelectiveModuleMixin
from tests.support.lightning_runs import EVERYONE, QUIET, trainer_of

pytestmark = QUIET

X = torch.randn(28, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(28) % 3
STEPS = {"training_step", "validation_step", "test_step", "predict_step"}
REFUSED = {"training_step", "backward"}


class Base(LightningModule):
    """Seven batches of four, validated twice, with three schedulers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.calls: list[Any] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        plateau = {"scheduler": ReduceLROnPlateau(optimizer, patience=0, factor=0.5), "monitor": "val"}
        each = {"scheduler": StepLR(optimizer, 1, gamma=0.9), "interval": "step", "frequency": 2}
        return [optimizer], [each, StepLR(optimizer, 1, gamma=0.8), plateau]

    def losses_of(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.losses_of(batch).mean())

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X[:8], Y[:8]), batch_size=4)


class Plain(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses_of(batch).mean()


class Selective(SelectiveModuleMixin, Base):
    select_from = "batch"

    def candidate_losses(self, batch: Any) -> Tensor:
        return self.losses_of(batch)

    def target_dataloader(self) -> Any:
        return [(X[:3], Y[:3])]

    def configure_selection(self) -> dict[str, Any]:
        return EVERYONE


def seen(value: Any) -> Any:
    """What can be compared of an argument of a hook."""
    if isinstance(value, torch.optim.Optimizer):
        return [group["lr"] for group in value.param_groups]
    if isinstance(value, dict) and "state_dict" in value:  # a checkpoint
        return sorted(key for key in value if key != "callbacks")
    if isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, list | tuple | dict):
        return [seen(one) for one in (value.values() if isinstance(value, dict) else value)]
    return None


def hooks_of_modules() -> set[str]:
    """All that Lightning documents as hooks, and what it names as such in :class:`LightningModule`."""
    documented = {name for kind in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(kind)}
    own = {
        "backward",
        "configure_callbacks",
        "configure_gradient_clipping",
        "configure_optimizers",
        "lr_scheduler_step",
        "optimizer_step",
        "optimizer_zero_grad",
        "setup",
        "teardown",
    }
    return {name for name in documented | own | STEPS if not name.startswith("_")}


def recorded(kind: type, *, hooks: set[str], who: str, calls: list[Any]) -> type:
    """A subclass that notes each call of a hook, with its arguments, and goes on."""

    def hook(name: str) -> Callable[..., Any]:
        inherited = getattr(kind, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            calls.append((who, name, seen([*arguments, *options.values()])))
            return inherited(self, *arguments, **options)

        # Lightning looks at the names of arguments.
        call.__signature__ = inspect.signature(inherited)  # type: ignore[attr-defined]
        call.__wrapped__ = inherited  # type: ignore[attr-defined]
        return call

    return type(kind.__name__, (kind,), {name: hook(name) for name in hooks})


class Unscaled(MixedPrecision):
    """Loss scaling without the casts."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


def plugins(precision: str) -> list[Any]:
    return [Unscaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**6))] if precision == "16" else []


def run(kind: type, steps: int, precision: str, **attributes: Any) -> tuple[list[Any], list[Tensor]]:
    """All calls of a fit, and its parameters."""
    calls: list[Any] = []
    hooks = hooks_of_modules() - REFUSED
    module = recorded(kind, hooks=hooks, who="module", calls=calls)()
    for name, value in attributes.items():
        setattr(module, name, value)
    names = {name for name in vars(Callback) if not name.startswith("_")} - {"state_key"}
    callback = recorded(Callback, hooks=names, who="callback", calls=calls)()
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(
            callback,
            ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1),
            enable_checkpointing=True,
            accumulate_grad_batches=steps,
            gradient_clip_val=0.1,
            val_check_interval=3,
            plugins=plugins(precision),
        ).fit(module)
    return calls, [parameter.detach() for parameter in module.parameters()]


def of_targets(calls: list[Any]) -> list[Any]:
    """The calls without those for the transfer of target batches, of three rows."""
    return [call for call in calls if not ("transfer" in call[1] and len(call[2][0][0]) == 3)]


@pytest.mark.parametrize("precision", ["32", "16"])
@pytest.mark.parametrize(("steps", "select_from"), [(1, "window"), (1, "batch"), (3, "batch"), (3, "window")])
def test_every_hook_is_called_as_without_selection(steps: int, select_from: str, precision: str) -> None:
    """In the same order, with the same arguments, of module and callback; losses and parameters too.

    Windows of three batches: the epoch cuts one short. One selection over them gives its loss and gradient at the end.
    """
    plain, parameters = run(Plain, steps, precision)
    selective, others = run(Selective, steps, precision, select_from=select_from)
    ours = of_targets(selective)
    assert len(selective) - len(ours) == 3 * 2 * (7 if select_from == "batch" or steps == 1 else 3)
    assert [call[:2] for call in ours] == [call[:2] for call in plain]
    names = {call[:2] for call in plain}
    assert {name for who, name in names if who == "module"} >= {
        *("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "on_after_backward", "optimizer_step"),
        *("on_before_optimizer_step", "configure_gradient_clipping", "lr_scheduler_step", "on_validation_start"),
        *("on_save_checkpoint", "on_validation_model_zero_grad", "transfer_batch_to_device", "on_train_batch_end"),
    }
    assert sum(name == "on_after_backward" for _, name, _ in plain) == 2 * 14
    for one, other in zip(ours, plain, strict=True):
        if steps == 3 and select_from == "window" and one[1] in ("on_before_backward", "on_train_batch_end"):
            continue  # these have losses: see the next test
        for value, expected in zip(tree_leaves(one), tree_leaves(other), strict=True):
            if isinstance(value, Tensor | float):
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
            else:
                assert value == expected, one
    torch.testing.assert_close(others, parameters, rtol=1e-9, atol=1e-12)


def test_losses_of_a_window_come_with_its_last_batch() -> None:
    """Whose sum is that of the batches; those that wait say 0, and have no gradient yet."""
    sums: dict[str, list[float]] = {}
    for kind in (Plain, Selective):

        class Summed(kind):  # type: ignore[misc, valid-type]
            select_from = "window"

            def on_train_start(self) -> None:
                self.losses: list[float] = []
                self.outputs: list[float] = []

            def on_before_backward(self, loss: Tensor) -> None:
                self.losses.append(float(loss.detach()))

            def on_after_backward(self) -> None:
                waits = isinstance(self, Selective) and self.losses[-1] == 0
                assert all((parameter.grad is None) == waits for parameter in self.parameters())

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.outputs.append(float(outputs["loss"]))

        module = Summed()
        trainer_of(max_epochs=1, accumulate_grad_batches=3).fit(module)
        assert module.losses == module.outputs
        losses = module.losses
        sums[kind.__name__] = [sum(losses[:3]), sum(losses[3:6]), losses[6]]
        if kind is Selective:
            assert [loss == 0 for loss in losses] == [True, True, False, True, True, False, False]
    assert sums["Selective"] == pytest.approx(sums["Plain"], rel=1e-9)


def stepped(module: Any, choice: str) -> Any:
    """An ``optimizer_step`` of users' code."""

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + module.trainer.global_step)
        if choice == "warm-up, of the optimizer":
            optimizer.step(closure=optimizer_closure)
        elif choice == "warm-up, inherited":
            type(module).optimizer_step(module, epoch, batch_idx, optimizer, optimizer_closure)
        elif choice == "closure first":
            optimizer_closure()
            optimizer.step()
        elif batch_idx != 2:
            optimizer.step(closure=optimizer_closure)
        elif choice == "closure without a step":
            optimizer_closure()  # Lightning demands it

    return optimizer_step


@pytest.mark.slow
@pytest.mark.parametrize("select_from", ["window", "batch"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "choice",
    [
        "warm-up, of the optimizer",
        "warm-up, inherited",
        "closure first",
        "closure without a step",
    ],
)
def test_an_optimizer_step_of_ones_own_decides(choice: str, steps: int, select_from: str) -> None:
    """Learning rates, when the closure is run, and whether there is a step at all: set on an instance, too."""
    found = []
    for kind in (Plain, Selective):
        module: Any = kind()
        module.optimizer_step = stepped(module, choice)
        module.select_from = select_from
        rates: list[Any] = []
        module.on_before_optimizer_step = lambda optimizer, rates=rates: rates.append(seen(optimizer))
        trainer = trainer_of(accumulate_grad_batches=steps)
        trainer.fit(module)
        found.append((rates, trainer.global_step, [parameter.detach() for parameter in module.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("select_from", ["window", "batch"])
def test_a_window_that_is_left_early_is_left_out(select_from: str) -> None:
    """Where ``on_train_batch_start`` ends the epoch in its midst: no step, and nothing that the next one finds."""
    found = []
    for kind in (Plain, Selective):
        module: Any = kind()
        module.select_from = select_from
        module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 5 else None
        trainer = trainer_of(accumulate_grad_batches=3, val_check_interval=3)
        trainer.fit(module)
        found.append((trainer.global_step, [parameter.detach() for parameter in module.parameters()]))
    assert found[0][0] == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_gradients_that_are_not_cleared_add_up() -> None:
    """``optimizer_zero_grad`` of one's own, every other time: what it keeps, and what hooks see before it."""
    found = []
    for kind in (Plain, Selective):

        class Kept(kind):  # type: ignore[misc, valid-type]
            def on_before_zero_grad(self, optimizer: Any) -> None:
                self.calls.append([None if p.grad is None else p.grad.clone() for p in self.parameters()])

            def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
                if batch_idx % 2:
                    optimizer.zero_grad()

        module = Kept()
        trainer_of().fit(module)
        found.append((module.calls, [parameter.detach() for parameter in module.parameters()]))
    assert found[0][0][2][0] is not None
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


class Nothing(SelectiveModuleMixin, Base):
    """In some batches no candidate has a loss that can be used."""

    def candidate_losses(self, batch: Any) -> Tensor:
        return self.losses_of(batch) * (float("nan") if self.unusable else 1.0)

    target_dataloader = Selective.target_dataloader
    configure_selection = Selective.configure_selection
    target_losses = Base.losses_of
    unusable, select_from = False, "batch"
    skipped: tuple[int, ...] = ()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.unusable = batch_idx in self.skipped


def steps_after_each_batch(module: Nothing, **options: Any) -> list[int]:
    """The steps that AdamW has counted, over an epoch."""
    steps = []

    class Watched(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states = trainer.optimizers[0].state.values()
            steps.append(max((int(state["step"]) for state in states), default=0))

    trainer_of(Watched(), max_epochs=1, **options).fit(module)
    return steps


@pytest.mark.parametrize("precision", ["32", "16"])
@pytest.mark.parametrize("skipped", [(2, 3), (2,), (3,)])
def test_windows_without_a_usable_candidate_make_no_step(skipped: tuple[int, ...], precision: str) -> None:
    """Of two batches: where one can be used the step is made; decay and momentum rest with the others."""
    module = Nothing()
    module.skipped = skipped
    expected = [0, 1, 1, 1, 1, 2, 3] if len(skipped) == 2 else [0, 1, 1, 2, 2, 3, 4]
    assert steps_after_each_batch(module, accumulate_grad_batches=2, plugins=plugins(precision)) == expected


@pytest.mark.parametrize("precision", ["32", "16"])
def test_a_selection_whose_step_was_left_out_does_not_count_for_the_next(precision: str) -> None:
    """Its gradient is cleared; the next window has no usable candidate, and makes no step either."""

    class Leaving(Nothing):
        skipped = (2,)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx == 1:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    assert steps_after_each_batch(Leaving(), plugins=plugins(precision)) == [1, 1, 1, 2, 3, 4, 5]


def test_callbacks_that_need_automatic_optimisation_have_it() -> None:
    """Accumulation by a schedule, and weights that are averaged, with a pass for batch norms."""
    found = []
    for kind in (Plain, Selective):

        class Normed(kind):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(5, affine=False).double()

            def losses_of(self, batch: Any) -> Tensor:
                self.norm(batch[0])
                return super().losses_of(batch)

            def target_losses(self, batch: Any) -> Tensor:
                self.calls.append("target")
                return Base.losses_of(self, batch)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        module = Normed()
        trainer = trainer_of(
            GradientAccumulationScheduler({1: 3, 2: 2}),
            StochasticWeightAveraging(0.05, swa_epoch_start=3, annealing_epochs=1),
            max_epochs=4,
        )
        trainer.fit(module)
        found.append((trainer.global_step, dict(module.state_dict())))
        assert len(module.calls) == (28 if kind is Selective else 0), "no selection where nothing is trained"
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_hooks_of_a_data_module_are_called_for_the_targets_batches() -> None:
    class Data(LightningDataModule):
        sizes: list[Any] = []  # noqa: RUF012

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(X, Y), batch_size=4)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(X[:8], Y[:8]), batch_size=4)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.sizes.append(len(batch[0]))
            return batch

    trainer_of(max_epochs=1, limit_train_batches=2).fit(Selective(), datamodule=Data())
    assert Data.sizes.count(3) == 2


def test_the_trainer_the_module_and_the_optimizer_are_left_as_they_were() -> None:
    """After a fit, and after one that failed: settings, the step of a user's own optimizer, what the module holds."""

    class Own(Selective):
        fails = scheduled = False

        def configure_optimizers(self) -> Any:
            inner = torch.optim.SGD(self.parameters(), lr=0.1)
            self.optimizer = SelectiveOptimizer(inner, self.net, lambda: self.losses_of((X[:3], Y[:3])), **EVERYONE)
            return [self.optimizer], [StepLR(self.optimizer, 1)] if self.scheduled else []

        def on_train_batch_end(self, *_: Any) -> None:
            if self.fails:
                raise ArithmeticError

    module: Any = Own()
    module.accumulate_grad_batches, module.gradient_clip_val, module.gradient_clip_algorithm = 3, 0.2, "value"
    for fails, scheduled in ((False, True), (False, False), (True, False)):
        module.fails, module.scheduled = fails, scheduled
        trainer = trainer_of()
        with pytest.raises(ArithmeticError) if fails else nullcontext():
            trainer.fit(module)
        assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (1, None)
        assert trainer.gradient_clip_algorithm is None
        assert module._selecting is None
        optimizer = module.optimizer
        assert trainer.optimizers == [optimizer]
        before = module.net[0].weight.detach().clone()
        optimizer.step(lambda: module.losses_of((X, Y)))  # it selects again
        assert len(optimizer.selection.losses) == len(X)
        assert not torch.equal(before, module.net[0].weight)
        assert not any(isinstance(value, Selecting) for value in vars(module).values())


def test_a_module_can_be_copied_in_the_midst_of_a_fit() -> None:
    """As callbacks do that average weights; what the fit has added stays behind."""
    copies = []

    class Copied(Selective):
        def target_dataloader(self) -> Any:
            return DataLoader(TensorDataset(X, Y), batch_size=4)  # whose iterators cannot be copied

        def on_train_batch_end(self, *_: Any) -> None:
            copies.append(copy.deepcopy(self))

    trainer_of(max_epochs=1).fit(Copied())
    assert [one._selecting for one in copies] == [None] * 7


def test_the_modules_settings_count_in_the_estimate_of_steps() -> None:
    """Which schedules are made with."""
    module: Any = Selective()
    module.accumulate_grad_batches, estimates = 3, []
    configured = module.configure_optimizers
    module.configure_optimizers = lambda: estimates.append(module.trainer.estimated_stepping_batches) or configured()
    trainer = trainer_of()
    trainer.fit(module)
    assert estimates == [trainer.global_step] == [6]
