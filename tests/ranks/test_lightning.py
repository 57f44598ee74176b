"""Lightning's DDP on two processes: the fit is that of one process with the batches of both."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ftw_optim import GreedyFilter, KeepAll, UniformWeights
from tests.support.lightning_runs import QUIET, Base, Log, Plain, Selective, rows_of, trainer_of
from tests.support.models import Case, transformers_model
from tests.support.processes import Failure, Processes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

from ftw_optim.integrations.lightning import Selecting

pytestmark = [pytest.mark.slow, *QUIET]


class Part(list[Any]):
    """The batches of this process: two candidates each; of a process by itself, those of both."""

    def __init__(self, case: Case, batches: int) -> None:
        several = dist.is_initialized()
        own = [dist.get_rank()] if several else [0, 1]
        super().__init__(
            rows_of(case.candidates, torch.tensor([4 * number + 2 * rank + row for rank in own for row in (0, 1)]))
            for number in range(batches)
        )


def built(lora: bool) -> Case:
    return transformers_model("gpt2" if lora else "llama", lora=lora)(torch.float64, 14)


class Targeted(Selective):
    """A module whose target batches have three rows."""

    def target_dataloader(self) -> Any:
        return [rows_of(self.case.target, slice(row, row + 3)) for row in range(2)]


def fitted(what: str, *, lora: bool = False, batches: int = 3, **options: Any) -> dict[str, Any]:
    """A job: one fit; the parameters after each step, and what was logged."""
    case = built(lora)
    module: Base = Plain(case, "every step") if what == "plain" else Targeted(case, "every step")
    attributes = {name: options.pop(name) for name in ("select_from", "selection") if name in options}
    module.options = attributes.get("selection", {"filter": GreedyFilter(keep=0.5)})  # type: ignore[attr-defined]
    if "select_from" in attributes:
        module.select_from = attributes["select_from"]  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)  # by Lightning
    warnings.filterwarnings("ignore", ".*does not have many workers")
    log, more = Log(), options.pop("callbacks", [])
    path = options.pop("ckpt_path", None)
    if dist.is_initialized():
        options |= {"devices": 2, "strategy": options.get("strategy", "ddp"), "use_distributed_sampler": False}
    trainer = trainer_of(log, *more, **options)
    trainer.fit(module, Part(case, batches), ckpt_path=path)
    return {
        "steps": log.steps,
        "logged": {name: float(value) for name, value in trainer.logged_metrics.items() if "ms_" not in name},
    }


CASES: dict[str, dict[str, Any]] = {
    "each batch": {"select_from": "batch"},
    "window": {"accumulate_grad_batches": 2},
    "batches of a window": {"accumulate_grad_batches": 2, "select_from": "batch"},
    "adapters": {"lora": True},
    "graph": {"selection": {"combine": "graph", "filter": GreedyFilter(keep=0.5)}},
    "target rows": {"selection": {"train_on_target": True, "filter": GreedyFilter(keep=0.5)}},
    "clipped": {"gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("name", CASES)
def test_a_fit_of_two_processes_is_that_of_one_with_both_batches(name: str, two_processes: Processes) -> None:
    ranks = two_processes.run(_job, "selective", CASES[name])
    whole = fitted("selective", **CASES[name])
    _alike(ranks, whole["steps"])
    assert ranks[0]["logged"] == pytest.approx(whole["logged"], rel=1e-6, nan_ok=True)


def test_with_all_kept_alike_it_is_lightnings_own_fit(two_processes: Processes) -> None:
    everyone = {"selection": {"filter": KeepAll(), "weight": UniformWeights()}}
    ranks = two_processes.run(_job, "selective", everyone)
    own = two_processes.run(_job, "plain", {})
    _alike(ranks, own[0]["steps"], rtol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"])
def test_parameters_that_no_loss_reaches_may_be_looked_for(strategy: str, two_processes: Processes) -> None:
    ranks = two_processes.run(_job, "selective", {"strategy": strategy})
    _alike(ranks, fitted("selective")["steps"])


def test_what_several_processes_do_not_have_is_refused(two_processes: Processes) -> None:
    for one in two_processes.outcomes(static):
        assert isinstance(one, Failure)
        assert "static_graph=False" in one.text


class OneRow(Targeted):
    """A module whose target batches have one row."""

    def target_dataloader(self) -> Any:
        return [rows_of(self.case.target, slice(0, 1))]


def trained_row(trained: bool) -> None:
    """A job with a target row that is every process's, to guide or to be trained on."""
    module = OneRow(built(False))
    module.options = {"train_on_target": trained, "filter": GreedyFilter(keep=0.5)}
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_steps": 1}
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)  # by Lightning
    warnings.filterwarnings("ignore", ".*does not have many workers")
    trainer_of(**options).fit(module, Part(built(False), 1))


def test_target_rows_that_are_trained_on_are_no_ones_twice(two_processes: Processes) -> None:
    two_processes.run(trained_row, False)
    for one in two_processes.outcomes(trained_row, True):
        assert isinstance(one, Failure)
        assert "a row for each of 2 processes at least, where they are trained on, got 1 rows" in one.text


def static() -> None:
    """A job with a setting of DDP that the selection cannot serve."""
    from lightning.pytorch.strategies import DDPStrategy

    fitted("selective", strategy=DDPStrategy(static_graph=True))


def _job(what: str, options: dict[str, Any]) -> dict[str, Any]:
    return fitted(what, **options)


def _alike(ranks: list[dict[str, Any]], steps: list[Any], rtol: float = 1e-9) -> None:
    first, second = (found["steps"] for found in ranks)
    assert len(first) == len(second) == len(steps) > 1
    for (rate, one), (_, other), (expected_rate, expected) in zip(first, second, steps, strict=True):
        assert rate == expected_rate
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for found, value in zip(one, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=rtol, atol=1e-10)


class Stops(Callback):
    """Ends a fit in the midst of a window, as an interrupt does that all processes get."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            raise OSError("stopped")


def interrupted(directory: str) -> Any:
    """A job: a fit that is stopped while batches wait, and is saved by a callback as it ends; what is saved of them."""
    saving = OnExceptionCheckpoint(directory, filename="stopped")
    options = {"accumulate_grad_batches": 2, "max_epochs": 1, "enable_checkpointing": True}
    # Lightning warns on the first process alone, of a folder that is there and of what a checkpoint does not hold.
    with warnings.catch_warnings(), suppress(OSError):
        warnings.simplefilter("ignore", UserWarning)
        fitted("selective", callbacks=[saving, Stops(1)], **options)
    states = torch.load(f"{directory}/stopped.ckpt", weights_only=False)["callbacks"]
    return states["Selecting"]["window"]


def test_windows_of_all_processes_are_in_a_checkpoint(two_processes: Processes, tmp_path: Path) -> None:
    first, _ = two_processes.run(interrupted, str(tmp_path))
    case = built(False)
    for rank in (0, 1):
        (waiting,) = first[rank]
        assert torch.equal(waiting["input_ids"], case.candidates["input_ids"][2 * rank : 2 * rank + 2])
    callback = Selecting()
    with pytest.raises(ValueError, match="as many processes as were there when a window was cut short, 2, got 1"):
        callback.load_state_dict({"window": {0: [1], 1: [2]}, "targets": None})
    for one in two_processes.outcomes(resumed_by_two):
        assert isinstance(one, Failure)
        assert "a window was cut short, 1, got 2" in one.text


def resumed_by_two() -> None:
    """A job of a checkpoint that one process made in the midst of a window."""
    Selecting().load_state_dict({"window": [1], "targets": None})
