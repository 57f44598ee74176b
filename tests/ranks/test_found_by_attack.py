"""What an attack on several processes found: failures before a step, drifts, groups, stages that count, copies."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ftw_optim import GreedyFilter, SelectiveOptimizer, Sketch, TargetGradient, TopKFilter
from ftw_optim._step import digest
from tests.support.grids import slow
from tests.support.processes import Failure, Processes
from tests.support.rank_runs import CANDIDATES, TARGETS, Net, made, rows_of


class _Counting(GreedyFilter):
    """A stage that counts its calls."""

    def __call__(self, matching: Any, *more: Any) -> Tensor:
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return super().__call__(matching, *more)


class Buffered(Net):
    """A model with a buffer, which DDP would send at every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


def before_a_step(what: str) -> tuple[str, str, float, int]:
    """A job whose second step cannot be made on one rank; the third can."""
    here = dist.get_rank() == 1
    held = [False]

    def held_out() -> Tensor:
        if held[0] and here:
            raise RuntimeError("the held-out rows are broken")
        return rows_of(model, TARGETS)

    target = TargetGradient(lambda: rows_of(model, TARGETS, rare=True), held_out=held_out, held_out_every=1)
    model, optimizer, losses = made(net=Buffered(), target=target, combine="rerun" if what == "rows" else "factors")
    if what != "first look":
        optimizer.step(losses)
    scale = math.nan if here and what == "scale" else 1.0
    for p in model.parameters():
        p.requires_grad_(not (here and what == "frozen"))
    held[0] = what in ("look", "first look")
    start = time.perf_counter()
    try:
        if here and what == "rows":
            optimizer.backward(lambda: losses())
        else:
            optimizer.backward(losses, grad_scale=scale)
        said = "", ""
    except Exception as error:
        said = type(error).__name__, str(error)
    spent = time.perf_counter() - start
    held[0] = False
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.step(losses)
    return (*said, spent, optimizer.selections)


@pytest.mark.parametrize("what", ["scale", slow("look"), slow("first look"), slow("frozen"), slow("rows")])
def test_a_rank_that_cannot_begin_or_end_a_step_lets_all_fail(what: str, two_processes: Processes) -> None:
    found = two_processes.run(before_a_step, what)
    assert found[0][0] == "RuntimeError"
    assert "Rank 1 raised" in found[0][1]
    assert found[1][0]
    assert all(one[2] < 2.0 for one in found)
    assert found[0][3] == found[1][3] == (1 if what == "first look" else 2)


def drifting(what: str) -> None:
    here = dist.get_rank() == 1
    until = {"target": TargetGradient(lambda: rows_of(model, TARGETS), until=2 + here)} if what == "until" else {}
    held = TargetGradient(lambda: rows_of(model, TARGETS), held_out=(lambda: rows_of(model, TARGETS)) if here else None)
    model, optimizer, losses = made(**({"target": held} if what == "held out" else until))
    if what in ("until", "held out"):
        optimizer.step(losses)
        return
    digest.LOOK_EVERY = 1
    try:
        optimizer.step(losses)
        with torch.no_grad():
            if here and what == "parameters":
                model.module.last.bias.add_(0.5)
            if here and what == "state":
                optimizer.state[model.module.last.bias]["exp_avg"].mul_(3.0)
        for _ in range(2):
            optimizer.step(losses)
    finally:
        digest.LOOK_EVERY = 100


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("parameters", "values of the parameters"),
        slow("state", "state of the inner optimizer"),
        slow("until", "the target"),
        slow("held out", "the target"),
    ],
)
def test_ranks_that_drift_apart_are_told(what: str, said: str, two_processes: Processes) -> None:
    for one in two_processes.outcomes(drifting, what):
        assert isinstance(one, Failure), one
        assert one.kind == "ValueError"
        assert said in one.text


def counting() -> list[int]:
    """A job with a stage that counts, and a group that holds a function."""
    _model, optimizer, losses = made(filter=_Counting(keep=3))
    optimizer.param_groups[0]["note"] = lambda: None
    for _ in range(3):
        optimizer.step(losses)
    assert optimizer.selection is not None
    return optimizer.selection.kept.tolist()


def test_a_stage_may_count_and_a_group_hold_what_it_likes(two_processes: Processes) -> None:
    one, other = two_processes.run(counting)
    assert one == other


def forwards_in_between(combine: str, number: int) -> list[Tensor]:
    """A job that runs the wrapper some times between the steps, as an evaluation that forgets no_grad."""
    model, optimizer, losses = made(combine=combine)
    for _ in range(3):
        for _ in range(number):
            rows_of(model, TARGETS)
        optimizer.step(losses)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("combine", [slow("graph"), slow("rerun"), slow("factors")])
def test_a_forward_pass_in_between_changes_nothing(combine: str, two_processes: Processes) -> None:
    found = [two_processes.run(forwards_in_between, combine, number)[0] for number in (1, 0)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def copied() -> tuple[int, int, str]:
    """A job of two groups of two: a copy of an optimizer keeps its group, and a wrapper over all is refused."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = groups[rank // 2]
    _model, optimizer, losses = made(group=own, ranks=own)
    optimizer.step(losses)
    assert optimizer.selection is not None
    torch.manual_seed(3)
    net = Net().double()
    inner = SelectiveOptimizer(torch.optim.SGD(net.parameters()), net, lambda: rows_of(net, TARGETS), ranks=own)
    twin = copy.deepcopy(inner)
    twin.model, twin.target = inner.model, lambda: rows_of(net, TARGETS)
    twin.optimizer = inner.optimizer
    twin.backward(lambda: rows_of(net, CANDIDATES[rank]))
    assert twin.selection is not None
    _, wrong, losses = made(ranks=own)
    try:
        wrong.step(losses)
        said = ""
    except NotImplementedError as error:
        said = str(error)
    return len(optimizer.selection.losses), len(twin.selection.losses), said


@pytest.mark.slow
def test_groups_of_ranks(four_processes: Processes) -> None:
    for one, twin, said in four_processes.run(copied):
        assert one == twin == 8
        assert "over the processes" in said


def saved() -> tuple[dict[str, Any], list[Tensor]]:
    """A job of two steps with a remembered target; the state and the parameters."""
    model, optimizer, losses = made(**_remembered(lambda: model))
    for _ in range(2):
        optimizer.step(losses)
    return optimizer.state_dict(), [p.detach().clone() for p in model.parameters()]


def _remembered(model: Any) -> dict[str, Any]:
    return {"target": TargetGradient(lambda: rows_of(model(), TARGETS, rare=True), decay=0.7)}


def test_one_process_goes_on_from_two(two_processes: Processes) -> None:
    state, values = two_processes.run(saved)[0]
    torch.manual_seed(3)
    net = Net().double()
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(net.parameters(), lr=1e-2), net, **_remembered(lambda: net), filter=GreedyFilter(keep=3)
    )
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state)
    assert optimizer.selections == 2
    assert optimizer._kept_target is not None
    assert set(optimizer._kept_target) <= {name for name, _ in net.named_parameters()}
    optimizer.step(lambda: rows_of(net, CANDIDATES[:2].flatten(0, 1), rare=True))
    assert optimizer.selection is not None
    assert len(optimizer.selection.losses) == 8


def apart(what: str) -> str:
    """A job of a step between ranks that differ."""
    rank = dist.get_rank()
    torch.manual_seed(3)
    net = Net().double()
    options: dict[str, Any] = {}
    with torch.no_grad():
        if what == "frozen" and rank:
            net.first.weight.add_(1.0)
        if what == "swapped" and rank:
            net.last.bias[[0, 1]] = net.last.bias[[1, 0]]
    net.first.weight.requires_grad_(what != "frozen")
    if what == "sketch and exact":
        options["gram"] = Sketch(dim=32) if rank else "exact"
    if what == "sketches":
        options["gram"] = Sketch(dim=64 if rank else 32)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    inner = torch.optim.AdamW(trained, lr=1e-2)
    optimizer = SelectiveOptimizer(inner, net, lambda: rows_of(net, TARGETS, rare=True), **options)
    candidates = CANDIDATES[rank].clone()
    losses: Any = lambda rows=None: rows_of(net, candidates if rows is None else candidates[rows], rare=True)  # noqa: E731
    if what == "rows":
        optimizer = SelectiveOptimizer(
            inner,
            net,
            lambda: rows_of(net, TARGETS, rare=True),
            combine="graph",
            scored=lambda name, parameter: "last" in name,
        )
        candidates[0, 0] = 22 if rank else candidates[0, 0]
        if rank:
            losses = lambda: rows_of(net, candidates, rare=True)  # noqa: E731
    optimizer.step(losses)
    assert optimizer.selection is not None
    return optimizer.selection.combine


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("frozen", "Expected the values of what is not trained to be the same on all ranks"),
        slow("swapped", "Expected the values of the parameters to be the same on all ranks"),
        slow("sketch and exact", "Expected the gram to be the same on all ranks"),
        slow("sketches", "Expected the gram to be the same on all ranks"),
    ],
)
def test_ranks_that_begin_apart_are_told(what: str, said: str, two_processes: Processes) -> None:
    for one in two_processes.outcomes(apart, what):
        assert isinstance(one, Failure)
        assert said in one.text


def test_candidates_run_again_only_where_all_ranks_can(two_processes: Processes) -> None:
    assert two_processes.run(apart, "rows") == ["skipped", "skipped"]


class Fails(TopKFilter):
    """A stage that fails on the first rank of the second group."""

    def __call__(self, matching: Any) -> torch.Tensor:
        if dist.get_rank() == 2:
            raise OSError("no filter today")
        return super().__call__(matching)


def fails_in_the_second_group() -> None:
    _, optimizer, losses = made(filter=Fails(keep=2), among=2)
    optimizer.step(losses)


@pytest.mark.slow
def test_the_rank_that_failed_is_named_alike_everywhere(four_processes: Processes) -> None:
    found = four_processes.outcomes(fails_in_the_second_group)
    assert [one.text.partition(" raised")[0] for one in found] == ["Rank 2", "Rank 2", "no filter today", "Rank 2"]
