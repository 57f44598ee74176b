"""Loops of accelerate, and of it alone beside ours: the same steps, the oracle's gradients, and a resumed run."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ftw_optim import (
    GreedyFilter,
    KeepAll,
    Selection,
    SelectiveOptimizer,
    UniformWeights,
    count_label_tokens,
    token_losses,
)
from ftw_optim.integrations.accelerate import loss_scale
from tests.support.models import Case, SmallGPT, language_model, precision, seeded, transformers_model
from tests.support.oracles import candidate_gradients
from tests.support.releases import resumes_in_first_epoch_alone

CASES: dict[str, Callable[[int], Case]] = {
    "llama": lambda n: transformers_model("llama")(torch.float64, n),
    "gpt2 with lora": lambda n: transformers_model("gpt2", lora=True)(torch.float64, n),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Its state is the process's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    _reset()


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    decayed, others = [p for p in trained(model) if p.ndim > 1], [p for p in trained(model) if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, *([{"params": others, "weight_decay": 0.0}] if others else [])]
    return torch.optim.AdamW(groups, lr=0.01)


class Run:
    """A loop as accelerate's documentation has it, with ours in the place of its backward pass or without."""

    def __init__(self, case: Case, *, steps: int = 1, wrapped: bool = True, **options: Any) -> None:
        mixed_precision, scaler = options.pop("mixed_precision", None), options.pop("scaler", None)
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            gradient_accumulation_steps=steps,
            mixed_precision=mixed_precision,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3),
        )
        self.accelerator.scaler = scaler
        self.case, model = case, case.model
        self.steps_done = 0
        inner = adamw(model)
        self.selective = SelectiveOptimizer(inner, model, options.pop("target", self.target), **options)
        rows = [{key: value[row] for key, value in case.candidates.items()} for row in range(case.n)]
        loader = DataLoader(rows, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
        scheduler = LambdaLR(self.selective if wrapped else inner, lambda step: 1.0 / (1 + step))
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, self.selective if wrapped else inner, loader, scheduler
        )

    def target(self) -> Tensor:
        """Another one at every step, told by the step alone."""
        row = self.steps_done % 3
        return token_losses(self.model, {key: value[row : row + 1] for key, value in self.case.target.items()})

    def finish(self) -> list[Any]:
        """Clip, step, move on; the norm, the learning rate and the parameters after it."""
        norm = None
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 0.3)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if norm is None:
            return []
        self.steps_done += 1
        return [[norm, self.scheduler.get_last_lr()[0], [p.detach().clone() for p in trained(self.model)]]]

    def micro_steps(self, backward: Callable[[dict[str, Tensor]], Any], skip: int = 0) -> Iterator[list[Any]]:
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        for batch in loader:
            with self.accelerator.accumulate(self.model):
                backward(batch)
                yield self.finish()

    def windows(self, size: int) -> Iterator[list[dict[str, Tensor]]]:
        batches = iter(self.loader)
        while window := list(islice(batches, size)):
            yield window

    def selection(self) -> Selection:
        assert self.selective.selection is not None
        return self.selective.selection

    def losses(self, window: list[dict[str, Tensor]], *, tokens: int) -> Iterator[Tensor]:
        candidates = sum(len(batch["labels"]) for batch in window)
        for batch in window:
            with precision(torch.float64):  # as the reference
                losses = token_losses(
                    self.model, batch, reduction="token_sum", label_tokens=tokens, candidates=candidates
                )
            yield losses

    def backward(self, batch: dict[str, Tensor]) -> None:
        self.selective.backward(lambda: token_losses(self.model, batch), grad_scale=loss_scale(self.accelerator))


EVERYONE = {"filter": KeepAll(), "weight": UniformWeights()}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_selection_for_each_micro_step_of_everyone_is_accelerates_own_run(name: str, steps: int) -> None:
    """Decay groups, clipping, scheduler; a window that the end of the data cuts short; step by step."""
    found: list[list[Any]] = []
    for wrapped in (False, True):
        run = Run(CASES[name](10), steps=steps, wrapped=wrapped, **EVERYONE)

        def backward(batch: dict[str, Tensor], run: Run = run) -> None:
            run.accelerator.backward(token_losses(run.model, batch).mean())

        found.append([])
        for _ in range(2):
            for made in run.micro_steps(run.backward if wrapped else backward):
                found[-1] += made
    assert len(found[0]) == 2 * -(-5 // steps)
    assert any(norm > 0.3 for norm, _, _ in found[0]), "else nothing is clipped"
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_one_selection_of_everyone_over_the_window_is_accelerates_own_run(name: str) -> None:
    """By its recipe for windows of unequal length: the model's loss of each batch over the labels of the window."""
    found: list[list[Any]] = []
    for wrapped in (False, True):
        run = Run(CASES[name](10), wrapped=wrapped, **EVERYONE)
        found.append([])
        for window in (*run.windows(2), *run.windows(2)):
            tokens = count_label_tokens(*window)
            if wrapped:
                run.selective.backward(
                    partial(run.losses, window, tokens=tokens), grad_scale=loss_scale(run.accelerator)
                )
            else:
                for batch in window:
                    with precision(torch.float64):  # its loss is in float32 whatever the logits are
                        run.accelerator.backward(run.model(**batch, num_items_in_batch=tokens).loss)
            found[-1] += run.finish()
    assert len(found[0]) == 6
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("way", ["micro-steps", "window"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_that_is_clipped_is_the_oracles(name: str, way: str) -> None:
    """``sum w_i g_i`` of gradients formed one candidate at a time, with masks, padding and LoRA, over some steps."""
    run = Run(CASES[name](8), steps=2 if way == "micro-steps" else 1, filter=GreedyFilter(keep=2))
    oracle = copy.deepcopy(run.case.model)
    kept_fewer = False
    for window in (*run.windows(2), *run.windows(2)):
        expected: dict[str, Tensor] = {}
        oracle.load_state_dict(run.case.model.state_dict())

        def add(batches: list[dict[str, Tensor]], scale: float, expected: dict[str, Tensor] = expected) -> None:
            selection = run.selection()
            rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
            gradients = candidate_gradients(Case(oracle, rows, rows, token_losses))
            for index, weight in zip(selection.kept.tolist(), selection.weights.tolist(), strict=True):
                for key, gradient in gradients[index].items():
                    expected[key] = expected.get(key, torch.zeros(())) + scale * weight * gradient

        if way == "micro-steps":
            for batch in window:
                with run.accelerator.accumulate(run.model):
                    run.backward(batch)
                    add([batch], 0.5)
        else:
            run.selective.backward(
                lambda window=window: (token_losses(run.model, batch) for batch in window),
                grad_scale=loss_scale(run.accelerator),
            )
            add(window, 1.0)
            kept_fewer |= len(run.selection().kept) < 4
        for key, parameter in run.case.model.named_parameters():
            if parameter.requires_grad and key in expected:
                torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-7, atol=1e-10)
        assert run.finish()
    assert way == "micro-steps" or kept_fewer


class Killed(Exception):
    """By the scheduler of a cluster, say."""


@pytest.mark.parametrize("done", [2, 4, pytest.param(5, marks=resumes_in_first_epoch_alone)])
def test_a_run_killed_and_resumed_from_its_saved_state_is_the_uninterrupted_one(tmp_path: Path, done: int) -> None:
    """To the last bit: weights, selections, learning rate and order, with dropout; killed in the midst of a window."""

    def start() -> Run:
        case = language_model(seeded(lambda: SmallGPT(dropout=0.3)).double().train(), 14)
        return Run(case, steps=2, filter=GreedyFilter(keep=1))

    def go_on(run: Run, *, killed: bool = False) -> list[Any]:
        """Eight steps in two epochs of seven batches; what each chose and left."""
        found = []
        while run.steps_done < 8:
            epoch, within = divmod(run.steps_done, 4)
            run.loader.set_epoch(epoch)
            for made in run.micro_steps(run.backward, skip=2 * within):
                if killed and run.steps_done == done and not made:
                    raise Killed
                chosen = run.selection()
                found.append([chosen.kept, chosen.weights, chosen.losses, chosen.cosine, *made])
                if killed and run.steps_done == done:
                    run.accelerator.save_state(str(tmp_path))
        return found

    expected = go_on(start())
    torch.manual_seed(0)
    with pytest.raises(Killed):
        go_on(start(), killed=True)
    torch.manual_seed(5)  # another process has another
    resumed = start()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.steps_done = done
    found = go_on(resumed)
    assert 0 < len(found) < len(expected)
    torch.testing.assert_close(found, expected[-len(found) :], rtol=0, atol=0)


def test_a_grad_scaler_makes_the_unscaled_steps_and_an_overflow_skips_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In accelerate's own hands: unscaled by its clipping, stepped and updated by the prepared optimizer."""
    found: list[list[Any]] = []
    for scaled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        run = Run(transformers_model("llama")(torch.float32, 12), steps=2, scaler=scaler)
        if scaled:  # as on a GPU: accelerate unscales only where it casts to float16, which it does not on a CPU
            run.accelerator.native_amp = True
            monkeypatch.setattr(run.accelerator.state, "_mixed_precision", "fp16")
        found.append([])
        for number, made in enumerate(run.micro_steps(run.backward)):
            found[-1] += made
            if scaled and number == 3:  # a gradient that overflows only because of the scale
                assert scaler is not None
                before = copy.deepcopy([[*trained(run.model)], run.scheduler.get_last_lr(), scaler.get_scale()])
                run.selective.backward(
                    lambda run=run: 1e37 * token_losses(run.model, run.case.target),
                    grad_scale=loss_scale(run.accelerator),
                )
                run.optimizer.step()
                run.scheduler.step()
                run.optimizer.zero_grad()
                assert run.optimizer.step_was_skipped
                after = [[*trained(run.model)], run.scheduler.get_last_lr(), 2 * scaler.get_scale()]
                torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert len(found[0]) == 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_bfloat16_by_accelerates_autocast(combine: str) -> None:
    """Its own run, from the same weights at every step, as exactly as the layers compute."""
    run = Run(transformers_model("llama")(torch.float32, 8), mixed_precision="bf16", combine=combine, **EVERYONE)
    for batch in run.loader:
        run.accelerator.backward(token_losses(run.model, batch).mean())
        expected = [parameter.grad for parameter in trained(run.model)]
        run.optimizer.zero_grad()
        with run.accelerator.accumulate(run.model):
            run.backward(batch)
            for parameter, gradient in zip(trained(run.model), expected, strict=True):
                assert parameter.grad is not None
                assert gradient is not None
                error = float((parameter.grad - gradient).norm() / gradient.norm())
                assert error < (2e-2 if combine == "factors" else 1e-6)
            run.finish()


def test_a_model_that_accelerate_compiled() -> None:
    """Prepared, it is another module around the model that the optimizer was given."""
    found = []
    for backend in ("no", "eager"):
        case = language_model(seeded(SmallGPT).double(), 4)
        accelerator = accelerate.Accelerator(cpu=True, dynamo_backend=backend)
        selective = SelectiveOptimizer(adamw(case.model), case.model, case.target_losses, filter=GreedyFilter(keep=2))
        model, optimizer = accelerator.prepare(case.model, selective)
        assert (model is case.model) == (backend == "no")
        for _ in range(3):
            selective.backward(lambda model=model, case=case: token_losses(model, case.candidates))
            optimizer.step()
            optimizer.zero_grad()
        found.append([parameter.detach() for parameter in case.model.parameters()])
        _reset()
    torch.compiler.reset()
    torch.testing.assert_close(*found)


def test_the_scale_of_a_loss_and_what_the_prepared_optimizer_does_not_do() -> None:
    run = Run(transformers_model("llama")(torch.float64, 4), steps=4)
    assert loss_scale(run.accelerator) == 0.25
    assert loss_scale(run.accelerator, accumulation_steps=1) == 1.0
    with pytest.raises(ValueError, match="accumulation_steps must be a positive integer, got 0"):
        loss_scale(run.accelerator, accumulation_steps=0)
    assert run.optimizer.optimizer is run.selective
    assert run.selective.param_groups is run.selective.optimizer.param_groups
    for name in ("backward", "selection"):
        with pytest.raises(AttributeError, match=name):
            getattr(run.optimizer, name)


TWO = """
    import sys
    import torch
    from accelerate import Accelerator
    from ftw_optim import GreedyFilter, SelectiveOptimizer
    from ftw_optim.integrations.accelerate import loss_scale

    several = sys.argv[1:] == ["several"]
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 1 + several
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    rows, goals = torch.randn(8, 3).double(), torch.randn(4, 3).double()
    if several:
        rows, goals = (part.chunk(2)[accelerator.process_index] for part in (rows, goals))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    selective = SelectiveOptimizer(
        inner, model, lambda: prepared(goals).square().sum(1), filter=GreedyFilter(keep=3), combine=COMBINE
    )
    prepared, optimizer = accelerator.prepare(model, selective)
    for _ in range(3):
        scale = loss_scale(accelerator)
        selective.backward(lambda: prepared(rows).square().sum(1), grad_scale=scale)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    selection = selective.selection
    print(selection.kept.tolist(), len(selection.losses))
    print([round(float(p.sum()), 9) for p in model.parameters()])
    if several:
        torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_two_processes_make_the_selection_of_one(combine: str) -> None:
    """Two of them on this machine, by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    script = textwrap.dedent(TWO).replace("COMBINE", repr(combine))

    def started(several: list[str], **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *several],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    several = [
        started(["several"], **world, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2") for rank in range(2)
    ]
    told = []
    for process in [*several, started([])]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told.append(out.splitlines()[-2:])
    assert told[0] == told[1] == told[2]
    assert told[0][0].endswith(" 8")
