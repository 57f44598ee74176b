"""Modules of Lightning in a real Trainer: its own steps, the oracle's gradients, and a resumed run."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from ftw_optim import GreedyFilter, KeepAll, Selection, SelectiveOptimizer, UniformWeights, token_losses
from tests.support.models import Case, precision, transformers_model
from tests.support.oracles import candidate_gradients

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from ftw_optim.integrations._trainers.targets import CycledBatches
from ftw_optim.integrations.lightning import SelectiveModuleMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # by Lightning
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

CASES: dict[str, Callable[[], Case]] = {
    "llama": lambda: transformers_model("llama")(torch.float64, 14),
    "gpt2 with lora": lambda: transformers_model("gpt2", lora=True)(torch.float64, 14),
}
EVERYONE = {"filter": KeepAll(), "weight": UniformWeights()}


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with precision(next(model.parameters()).dtype):
        return token_losses(model, batch)


def rows_of(batch: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


class Loader:
    """Two candidates a batch in an order that the epoch tells; it can be saved, and go on from there."""

    def __init__(self, case: Case) -> None:
        self.case, self.epoch, self.next = case, 0, 0

    def __len__(self) -> int:
        return self.case.n // 2

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.next == len(self):
            self.epoch, self.next = self.epoch + 1, 0
        order = torch.randperm(self.case.n, generator=torch.Generator().manual_seed(self.epoch)).view(-1, 2)
        while self.next < len(self):
            self.next += 1
            yield rows_of(self.case.candidates, order[self.next - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.next = state["epoch"], state["next"]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: optimizer,
    "every step": lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, lambda step: 1.0 / (1 + step)), "interval": "step"},
    },
    "some steps": lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": StepLR(optimizer, 1, gamma=0.7), "interval": "step", "frequency": 2},
    },
    "every epoch": lambda optimizer: ([optimizer], [StepLR(optimizer, 1, gamma=0.3)]),
}


class Base(LightningModule):
    """What a user has: a model, decay groups, a schedule."""

    def __init__(self, case: Case, schedule: str = "none") -> None:
        super().__init__()
        self.model, self.case, self.schedule = case.model, case, schedule

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01)
        return SCHEDULES[self.schedule](optimizer)


class Plain(Base):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return losses_of(self.model, batch).mean()


class Selective(SelectiveModuleMixin, Base):
    options: dict[str, Any] = {}  # noqa: RUF012

    def candidate_losses(self, batch: dict[str, Tensor]) -> Tensor:
        return losses_of(self.model, batch)

    def target_dataloader(self) -> Any:
        return [rows_of(self.case.target, slice(row, row + 1)) for row in range(3)]

    def configure_selection(self) -> dict[str, Any]:
        return dict(self.options)


class Log(Callback):
    """The learning rate and the parameters after each optimizer step, and what is seen just before."""

    def __init__(self, *, look: Callable[[Any], Any] = lambda module: None) -> None:
        self.steps: list[Any] = []
        self.seen: list[Any] = []
        self.look = look

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(self.look(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.steps.append([rate, [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]])


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "enable_checkpointing": False, "devices": 1, **quiet, **options}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **options)


def selective_of(case: Case, schedule: str = "none", **attributes: Any) -> Selective:
    module = Selective(case, schedule)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


# ---------------------------------------------------------------------- Lightning's own run


@pytest.mark.parametrize(
    ("name", "steps", "select_from", "schedule"),
    [
        ("llama", 1, "window", "every step"),
        ("llama", 3, "window", "some steps"),
        ("llama", 3, "batch", "every step"),
        ("gpt2 with lora", 2, "window", "every epoch"),
        ("gpt2 with lora", 3, "batch", "some steps"),
        ("gpt2 with lora", 8, "window", "none"),
    ],
)
def test_everyone_selected_is_lightnings_own_run(name: str, steps: int, select_from: str, schedule: str) -> None:
    """Decay groups, clipping, schedule; a window that the epoch cuts short; step by step."""
    plain, wrapped = Log(), Log()
    trainer = trainer_of(plain, accumulate_grad_batches=steps, gradient_clip_val=0.3)
    case = CASES[name]()
    trainer.fit(Plain(case, schedule), Loader(case))
    case = CASES[name]()
    module = selective_of(
        case,
        schedule,
        options=EVERYONE,
        accumulate_grad_batches=steps,
        gradient_clip_val=0.3,
        select_from=select_from,
    )
    again = trainer_of(wrapped)
    again.fit(module, Loader(case))
    assert again.global_step == trainer.global_step == len(plain.steps) == 2 * -(-7 // steps)
    torch.testing.assert_close(wrapped.steps, plain.steps, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_comes_after_every_hook_and_before_the_step(algorithm: str) -> None:
    """As in Lightning: hooks see the whole gradient, the optimizer the clipped one. One's own clipping serves."""
    case = CASES["llama"]()
    norms: list[float] = []

    class Custom(Selective):
        def configure_gradient_clipping(self, optimizer: Any, **settings: Any) -> None:
            super().configure_gradient_clipping(optimizer, **settings)
            norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))

    module = Custom(case)
    module.gradient_clip_val, module.gradient_clip_algorithm = 0.01, algorithm
    log = Log(look=lambda module: nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
    trainer_of(log, max_epochs=1).fit(module, Loader(case))
    assert len(norms) == len(log.seen) == 7
    for seen, applied in zip(log.seen, norms, strict=True):
        assert seen > 0.1
        assert applied < (0.0101 if algorithm == "norm" else seen)


def test_a_plateau_follows_a_logged_metric() -> None:
    """As under automatic optimisation, of which it has no ``monitor``."""
    rates = []
    for wrapped in (False, True):
        case = CASES["llama"]()
        mixed: Any = Selective if wrapped else Plain

        class Watched(mixed):
            lr_monitor = "metric"

            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                plateau = ReduceLROnPlateau(optimizer, patience=1, factor=0.1)
                monitor = {} if isinstance(self, Selective) else {"monitor": "metric"}
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, **monitor}}

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("metric", 1.0)

        log = Log()
        trainer = trainer_of(log, max_epochs=5, limit_train_batches=2, num_sanity_val_steps=0)
        trainer.fit(Watched(case), Loader(case), Loader(case))
        rates.append([rate for rate, _ in log.steps])
    assert rates[0] == rates[1]
    assert min(rates[0]) < max(rates[0])


class Unscaled(MixedPrecision):
    """Loss scaling without the casts."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


def iterable(batches: list[Any]) -> Any:
    """A loader of these; Lightning takes a list for one of loaders."""
    return DataLoader(batches, batch_size=None)


class Overflowing(Selective):
    """Its third batch overflows because of the scale, and costs no target batch of those after it."""

    third: Any = None
    overflows = False

    def target_dataloader(self) -> Any:
        return [self.case.target]

    def candidate_losses(self, batch: dict[str, Tensor]) -> Tensor:
        return super().candidate_losses(batch) * (1e37 if batch is self.third else 1.0)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.third = batch if batch_idx == 2 and self.overflows else None


def test_a_grad_scaler_makes_the_unscaled_steps_and_an_overflow_skips_one() -> None:
    """Scaled by the module, unscaled by Lightning before hooks and clipping."""
    case = transformers_model("llama")(torch.float32, 14)
    batches = list(Loader(case))
    logs = [Log(), Log()]
    module = Overflowing(case)
    module.gradient_clip_val, module.select_from = 0.3, "batch"
    trainer_of(logs[0], max_epochs=1).fit(module, iterable(batches))

    case = transformers_model("llama")(torch.float32, 14)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Overflowing(case)
    module.gradient_clip_val, module.select_from, module.overflows = 0.3, "batch", True
    trainer_of(logs[1], max_epochs=1, plugins=[Unscaled("16-mixed", "cpu", scaler)]).fit(
        module, iterable([*batches[:2], dict(batches[2]), *batches[2:]])
    )
    assert scaler.get_scale() == 2.0**9
    skipped = logs[1].steps.pop(2)
    torch.testing.assert_close(skipped, logs[1].steps[1], rtol=0, atol=0)
    torch.testing.assert_close(logs[1].steps, logs[0].steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_bfloat16_by_lightnings_autocast(combine: str) -> None:
    """Its own gradient, as exactly as the layers compute."""
    logs = []
    for wrapped in (False, True):
        case = transformers_model("llama")(torch.float32, 14)
        logs.append(Log(look=lambda module: [parameter.grad.clone() for parameter in module.parameters()]))
        module = selective_of(case, options={**EVERYONE, "combine": combine}) if wrapped else Plain(case)
        trainer_of(logs[-1], max_epochs=1, limit_train_batches=1, precision="bf16-mixed").fit(module, Loader(case))
    for one, other in zip(*(log.seen[0] for log in logs), strict=True):
        assert float((one - other).norm() / one.norm()) < (2e-2 if combine == "factors" else 1e-6)


# ---------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("select_from", ["window", "batch"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_that_lightning_sees_is_the_oracles(name: str, select_from: str) -> None:
    """``sum w_i g_i`` of gradients formed one candidate at a time, with masks, padding and LoRA, over some steps."""
    case = CASES[name]()
    expected: dict[str, Tensor] = {}
    compared = []

    class Checked(Selective):
        def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                expected.clear()
                self.pool: list[dict[str, Tensor]] = []
            self.pool.append(batch)

        def log_selection(self, selection: Selection, loss: Tensor) -> None:
            super().log_selection(selection, loss)
            batches = self.pool if select_from == "window" else self.pool[-1:]
            scale = len(batches) / 2
            rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
            gradients = candidate_gradients(Case(oracle, rows, rows, losses_of))
            for index, weight in zip(selection.kept.tolist(), selection.weights.tolist(), strict=True):
                for key, gradient in gradients[index].items():
                    expected[key] = expected.get(key, torch.zeros(())) + scale * weight * gradient

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for key, parameter in self.case.model.named_parameters():
                if parameter.requires_grad and key in expected:
                    torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-6, atol=1e-8)
            compared.append(len(expected))

    oracle = case.model  # unchanged until the step
    module = Checked(case)
    module.options, module.accumulate_grad_batches, module.select_from = (
        {"filter": GreedyFilter(keep=2)},
        2,
        select_from,
    )
    trainer_of(max_epochs=1).fit(module, Loader(case))
    assert len(compared) == 4
    assert min(compared) == len([p for p in case.model.parameters() if p.requires_grad])


# ---------------------------------------------------------------------- resuming


class Killed(Exception):
    """By the scheduler of a cluster, say."""


class SavedThenKilled(Callback):
    """Saves after some batch, and dies in the midst of the next one."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.left = path, batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.left == 0:
            raise Killed


class Chosen(Selective):
    """Remembers every selection."""

    accumulate_grad_batches = 2
    gradient_clip_val = 0.3

    def configure_selection(self) -> dict[str, Any]:
        self.chosen: list[Any] = []
        return {"filter": GreedyFilter(keep=2), **self.options}

    def target_dataloader(self) -> Any:
        """Shuffled by the global generator."""
        rows = [rows_of(self.case.target, row) for row in range(3)]
        return DataLoader(rows, batch_size=2, shuffle=True)

    def log_selection(self, selection: Selection, loss: Tensor) -> None:
        super().log_selection(selection, loss)
        self.chosen.append([selection.kept, selection.weights, selection.losses, selection.gram, selection.cosine])


@pytest.mark.parametrize(
    ("select_from", "batch", "options"),
    [
        ("window", 4, {}),
        ("window", 5, {}),  # one batch waits for its window
        ("window", 7, {}),  # at the end of the epoch
        ("window", 10, {"refresh_every": 3}),
        ("batch", 4, {"decay": 0.5}),
    ],
)
def test_a_run_killed_and_resumed_is_the_uninterrupted_one(
    tmp_path: Path, select_from: str, batch: int, options: dict[str, Any]
) -> None:
    """To the last bit: weights, selections, learning rates, target batches; also from the midst of a window."""

    def start() -> Chosen:
        module = Chosen(CASES["llama"](), "every step")
        module.select_from, module.options = select_from, options
        return module

    log, module = Log(), start()
    trainer_of(log).fit(module, Loader(module.case))

    killed = start()
    path = tmp_path / "run.ckpt"
    with pytest.raises(Killed):
        trainer_of(SavedThenKilled(path, batch)).fit(killed, Loader(killed.case))
    torch.manual_seed(batch)  # another process has another
    resumed, rest = start(), Log()
    trainer = trainer_of(rest)
    trainer.fit(resumed, Loader(resumed.case), ckpt_path=path)
    assert trainer.global_step == 8
    assert 0 < len(resumed.chosen) < len(module.chosen)
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed.chosen, module.chosen[-len(resumed.chosen) :], **same)
    torch.testing.assert_close(list(resumed.parameters()), list(module.parameters()), **same)
    assert len(module.chosen) == len(resumed.chosen) + (batch if select_from == "batch" else (batch + batch // 7) // 2)


def test_a_checkpoint_of_the_bare_optimizer_is_loaded(tmp_path: Path) -> None:
    """Its moments and step count, from a run without selection."""
    case = CASES["llama"]()
    trainer = trainer_of(max_epochs=1)
    trainer.fit(Plain(case), Loader(case))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    module = Selective(CASES["llama"]())
    trainer = trainer_of()
    trainer.fit(module, Loader(module.case), ckpt_path=tmp_path / "plain.ckpt")
    assert trainer.global_step == 7  # Lightning counts the steps of each kind of optimisation apart
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {14}


def test_target_batches_go_round_and_round_and_can_be_found_again() -> None:
    """In orders of their own, which leave the global generator as it was."""
    loader = DataLoader(torch.arange(5), batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    batches = CycledBatches(loader, seed=1)
    seen, states = [], []
    for _ in range(9):
        states.append(batches.state_dict())
        seen.append(next(batches))
    assert torch.equal(state, torch.get_rng_state())
    orders = [torch.cat(seen[start : start + 3]).tolist() for start in (0, 3, 6)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert orders[0] != orders[1]
    for number, saved in enumerate(states):
        again = CycledBatches(loader, seed=1)
        again.load_state_dict(saved)
        torch.testing.assert_close(list(islice(again, 9 - number)), seen[number:])
    with pytest.raises(ValueError, match="Expected target batches, got none"):
        next(CycledBatches([]))


# ---------------------------------------------------------------------- automatic optimisation, and what goes wrong


def test_under_automatic_optimisation_it_is_the_inner_optimizer_and_says_so_once() -> None:
    logs = [Log(), Log()]
    for wrapped, log in zip((False, True), logs, strict=True):
        case = CASES["llama"]()

        class Automatic(Plain):
            def configure_optimizers(self, wrapped: bool = wrapped) -> Any:
                optimizer = super().configure_optimizers()
                if not wrapped:
                    return optimizer
                return SelectiveOptimizer(optimizer, self.model, lambda: token_losses(self.model, self.case.target))

        trainer = trainer_of(log, accumulate_grad_batches=2, gradient_clip_val=0.3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(Automatic(case), Loader(case))
        about = [
            str(one.message) for one in said if "SelectiveOptimizer is its inner optimizer here" in str(one.message)
        ]
        assert len(about) == wrapped
    torch.testing.assert_close(logs[1].steps, logs[0].steps, rtol=0, atol=0)


def test_a_manual_loop_of_ones_own_is_told_to_use_the_optimizer_itself() -> None:
    """Lightning's stand-in has the optimizer's methods and would keep their state to itself."""

    class Manual(Base):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return SelectiveOptimizer(optimizer, self.model, lambda: token_losses(self.model, self.case.target))

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            stand_in: Any = self.optimizers()
            with pytest.raises(RuntimeError, match=r"self\.optimizers\(use_pl_optimizer=False\)"):
                stand_in.backward(lambda: token_losses(self.model, batch))
            selective: Any = self.optimizers(use_pl_optimizer=False)
            selective.backward(lambda: token_losses(self.model, batch))
            stand_in.step(select=False)
            selective.zero_grad()

    case = CASES["llama"]()
    before = copy.deepcopy(list(case.model.parameters()))
    trainer = trainer_of(max_epochs=1)
    trainer.fit(Manual(case), Loader(case))
    assert trainer.global_step == 7
    assert int(trainer.optimizers[0].state_dict()["selective"]["backwards"]) == 7
    assert not torch.equal(before[0], next(case.model.parameters()))


def test_what_a_selection_came_to_is_logged_and_its_target_evaluated_once() -> None:
    """The second half of a step, which Lightning gives a closure of its own, evaluates nothing."""
    case, calls = CASES["llama"](), []

    class Counted(Selective):
        def target_losses(self, batch: dict[str, Tensor]) -> Tensor:
            calls.append(batch)
            return super().target_losses(batch)

    module = Counted(case)
    module.options, module.accumulate_grad_batches = {"filter": GreedyFilter(keep=1)}, 2
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, Loader(case))
    assert len(calls) == trainer.global_step == 4
    logged = {name.removeprefix("selection/"): float(value) for name, value in trainer.logged_metrics.items()}
    selection = trainer.optimizers[0].selection
    assert logged.pop("loss") == pytest.approx(float(selection.weighted_loss()))
    assert logged == pytest.approx(
        {
            "kept_share": 0.5,
            "effective_size": selection.effective_size,
            "cosine": selection.cosine,
            "residual": selection.residual,
            "predicted_decrease": selection.predicted_decrease,
            "rejected": 0.0,
            "skipped": 0.0,
            **{f"ms_{phase}": spent for phase, spent in selection.milliseconds.items()},
        }
    )


def test_kept_candidates_are_run_again_where_batches_have_rows() -> None:
    """With ``combine="rerun"``, which takes one batch."""
    found = []
    for combine in ("factors", "rerun"):
        case = CASES["llama"]()
        module = selective_of(case, options={"filter": GreedyFilter(keep=1), "combine": combine})
        trainer = trainer_of(max_epochs=1)
        trainer.fit(module, Loader(case))
        assert trainer.optimizers[0].selection.combine == combine
        found.append(list(module.parameters()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_the_model_is_the_child_that_holds_what_is_trained() -> None:
    case = CASES["llama"]()

    class Two(Selective):
        """Parameters in two children: then its own forward is called."""

        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.scale = nn.Linear(1, 1, bias=False).double()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

        def forward(self, **batch: Tensor) -> Tensor:
            logits = self.model(**batch).logits
            return logits * (1 + self.scale(torch.ones_like(logits[..., :1])))

        def candidate_losses(self, batch: dict[str, Tensor]) -> Tensor:
            return token_losses(self, batch)

    for kind in (Selective, Two):
        module = kind(CASES["llama"]())
        trainer = trainer_of(max_epochs=1)
        trainer.fit(module, Loader(case))
        assert trainer.optimizers[0].model is (module if kind is Two else module.model)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, Loader(case))  # once more: wrapped anew
        assert trainer.global_step == 14


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    case = CASES["llama"]()

    def refused(error: type[Exception], match: str, module: Any = None, **options: Any) -> None:
        with pytest.raises(error, match=match):
            trainer_of(**options).fit(module or Selective(case), Loader(case))

    refused(
        ValueError, "accumulate_grad_batches must be a positive integer", selective_of(case, accumulate_grad_batches=0)
    )
    refused(ValueError, r"select_from must be one of \('window', 'batch'\)", selective_of(case, select_from="epoch"))
    refused(ValueError, "Expected automatic_optimization to be False", selective_of(case, automatic_optimization=True))
    refused(ValueError, "refresh_every must be a positive integer", selective_of(case, options={"refresh_every": 0}))
    refused(Exception, "gradient clipping is not supported for manual optimization", gradient_clip_val=1.0)

    class Two(Selective):
        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.parameters()), torch.optim.SGD(self.parameters())]

    refused(NotImplementedError, "Expected configure_optimizers to return one optimizer, got 2", Two(case))

    class Unmonitored(Selective):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [ReduceLROnPlateau(optimizer)]

    refused(ValueError, "set lr_monitor to its name", Unmonitored(case))
    unknown = Unmonitored(case)
    unknown.lr_monitor = "unknown"
    refused(RuntimeError, r"Expected the metric 'unknown' to be logged.*selection/cosine", unknown)

    class Hidden(Selective):
        def configure_callbacks(self) -> list[Any]:
            return []

    refused(RuntimeError, r"super\(\)\.configure_callbacks\(\)", Hidden(case))

    class NoLosses(SelectiveModuleMixin, Base):
        pass

    refused(NotImplementedError, r"NoLosses to define target_dataloader\(\)", NoLosses(case))
    with pytest.raises(NotImplementedError, match=r"NoLosses to define candidate_losses\(batch\)"):
        NoLosses(case).candidate_losses({})
    with pytest.raises(TypeError, match="to define candidate_losses"):
        type("WithItsOwn", (Selective,), {"training_step": Plain.training_step})
    with pytest.raises(TypeError, match="SelectiveModuleMixin before its other bases"):
        type("Behind", (Plain, SelectiveModuleMixin), {})


def test_several_devices_are_refused() -> None:
    """And what Lightning does for several, on one."""
    case = CASES["llama"]()
    with mock.patch.dict(os.environ):  # in which it leaves the address of its process group
        with pytest.raises(NotImplementedError, match="one process and SingleDeviceStrategy, got 1 and DDPStrategy"):
            trainer_of(strategy="ddp").fit(Selective(case), Loader(case))
        torch.distributed.destroy_process_group()
    trainer = trainer_of(devices=2, strategy="ddp")
    assert trainer.world_size == 2
    module = Selective(case)
    (callback,) = module.configure_callbacks()
    with pytest.raises(NotImplementedError, match="Expected one process and SingleDeviceStrategy, got 2 and"):
        callback.setup(trainer, module, "fit")
    callback.setup(trainer, module, "validate")
