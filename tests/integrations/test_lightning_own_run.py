"""Modules of Lightning where everyone is selected, and what it does around a step: its own run."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from tests.support.models import transformers_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins import MixedPrecision

from tests.support.lightning_runs import CASES, EVERYONE, QUIET, Loader, Log, Plain, Selective, selective_of, trainer_of

pytestmark = QUIET


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
    """By its ``monitor``, as without selection."""
    rates = []
    for wrapped in (False, True):
        case = CASES["llama"]()
        mixed: Any = Selective if wrapped else Plain

        class Watched(mixed):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                plateau = ReduceLROnPlateau(optimizer, patience=1, factor=0.1)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "metric"}}

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
