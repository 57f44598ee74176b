"""Failures on one rank are failures on all, at once, and nothing has changed; differences between ranks are told."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from ftw_optim import GreedyFilter, SelectiveOptimizer, TargetGradient, TopKFilter
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim.proposals import FilterUnless
from tests.support.grids import slow
from tests.support.processes import Failure, Processes
from tests.support.rank_runs import TARGETS, Net, made, rows_of, whole


class _Broken(RuntimeError):
    pass


class _BrokenFilter(TopKFilter):
    """A stage that fails on the rank that runs it, the first."""

    def __call__(self, matching: Any, *more: Any) -> Tensor:
        raise _Broken("the stage is broken")


def broken(where: str, rank: int, shards: bool = False) -> dict[str, Any]:
    """A job whose second step fails on one rank; what is left, and what the third step does."""
    here = dist.get_rank() == rank
    failing = [False]

    def fail(part: str) -> None:
        if failing[0] and here and where == part:
            raise _Broken(f"{part} is broken")

    def held_out() -> Tensor:
        fail("held-out rows")
        return rows_of(model, TARGETS)

    def target() -> Tensor:
        fail("target")
        found = rows_of(model, TARGETS, rare=True)
        fail("end of the target")
        return found

    model, optimizer, losses = made(
        target=TargetGradient(target, held_out=held_out, held_out_every=1),
        combine="rerun" if "second pass" in where else "factors",
        shards=shards,
    )

    def candidates(rows: Tensor | None = None) -> Tensor:
        fail("closure" if rows is None else "second pass")
        found = losses(rows)
        fail("end of the closure" if rows is None else "end of the second pass")
        return found

    optimizer.step(candidates)
    before = [whole(p.detach()).clone() for p in model.parameters()]
    failing[0] = True
    filters, rule = optimizer.filter, Preconditioners.__call__
    if where == "stage":
        optimizer.filter = _BrokenFilter(keep=3)
    if where == "owner" and here:
        Preconditioners.__call__ = Preconditioners.stacked = _raise  # type: ignore[method-assign, assignment]
    start, error = time.perf_counter(), None
    try:
        optimizer.step(candidates)
    except (_Broken, RuntimeError) as raised:
        error = type(raised).__name__, str(raised)
    spent = time.perf_counter() - start
    failing[0] = False
    Preconditioners.__call__ = rule  # type: ignore[method-assign]
    Preconditioners.stacked = _STACKED  # type: ignore[method-assign]
    optimizer.filter = filters
    same = all(torch.equal(whole(p), q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.step(candidates)
    return {
        "error": error,
        "seconds": spent,
        "same": same,
        "count": optimizer._backwards,
        "parameters": [whole(p.detach()).clone() for p in model.parameters()],
    }


_STACKED = Preconditioners.stacked


def _raise(*_: Any, **__: Any) -> Any:
    raise _Broken("the owner is broken")


@pytest.mark.parametrize(
    ("where", "rank", "shards"),
    [
        ("closure", 1, False),
        slow("closure", 0, False),
        slow("end of the closure", 1, False),
        slow("target", 0, False),
        slow("held-out rows", 1, False),
        slow("second pass", 1, False),
        ("owner", 1, False),
        slow("stage", 0, False),
        slow("owner", 0, False),
        # Shards come together within a forward pass, before which the ranks meet.
        ("closure", 1, True),
        slow("closure", 0, True),
        slow("target", 0, True),
        slow("held-out rows", 1, True),
        slow("second pass", 1, True),
        slow("end of the closure", 1, True),
        slow("end of the closure", 0, True),
        slow("end of the target", 1, True),
        slow("end of the second pass", 1, True),
        slow("owner", 1, True),
        slow("stage", 0, True),
    ],
)
def test_a_rank_that_fails_lets_all_fail_at_once_and_the_next_step_is_right(
    where: str, rank: int, shards: bool, two_processes: Processes
) -> None:
    found = two_processes.run(broken, where, rank, shards)
    for number, one in enumerate(found):
        kind, text = one["error"]
        assert kind == ("_Broken" if number == rank else "RuntimeError")
        assert "is broken" in text
        if number != rank:
            assert text.startswith(f"Rank {rank} raised _Broken: ")
        assert one["seconds"] < 2.0
        assert one["same"]
        assert one["count"] == 2
    never = two_processes.run(broken, "nowhere", rank, shards)
    assert never[0]["count"] == 3
    twice = two_processes.run(steps, 2)
    for one in found:
        for value, expected in zip(one["parameters"], twice[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


def steps(number: int) -> list[Tensor]:
    """A job of some steps; the parameters after them."""
    model, optimizer, losses = made()
    for _ in range(number):
        optimizer.step(losses)
    return [p.detach().clone() for p in model.parameters()]


def different(what: str) -> None:
    """A job of one step, for which the ranks differ."""
    here = dist.get_rank() == 1
    options: dict[str, Any] = {}
    if what == "filter within":
        options = {"filter": FilterUnless(condition=lambda: False, filter=GreedyFilter(keep=2 if here else 3))}
    elif here:
        options = {
            "seed": {"seed": 5},
            "rate": {"lr": 2e-2},
            "filter": {"filter": GreedyFilter(keep=2)},
            "metric": {"metric": "euclidean"},
            "combine": {"combine": "graph"},
            "scored": {"scored": lambda name, parameter: "last" in name},
            "target": {"target": TargetGradient(lambda: rows_of(model, TARGETS), refresh_every=2)},
        }.get(what, {})
    model, optimizer, losses = made(**options)
    if what == "values" and here:
        with torch.no_grad():
            model.module.last.bias.add_(1e-3)
    if what == "selections" and here:
        optimizer._backwards = 3
    if what == "closure":
        optimizer.step(lambda: None if here else losses())
        return
    if what == "backward":
        optimizer.step(lambda: losses().mean().backward() or 0.0)
        return
    optimizer.backward(losses, grad_scale=2.0 if here and what == "scale" else 1.0)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("seed", "seed and number of selections"),
        slow("selections", "seed and number of selections"),
        slow("rate", "settings of the inner optimizer"),
        slow("filter", "the filter"),
        slow("filter within", "the filter"),
        slow("metric", "the metric"),
        slow("combine", "the combine"),
        slow("scored", "scored parameters"),
        slow("target", "the target"),
        slow("scale", "grad_scale"),
        ("values", "values of the parameters"),
        ("closure", "the closure of rank 1 returned none"),
        slow("backward", "a closure with a backward of its own"),
    ],
)
def test_ranks_that_differ_are_told(what: str, said: str, two_processes: Processes) -> None:
    found = two_processes.outcomes(different, what)
    for one in found:
        assert isinstance(one, Failure), one
        assert one.kind in ("ValueError", "RuntimeError")
        assert said in one.text


def refused(what: str) -> None:
    """A job of one step, with something that cannot be right."""
    model, optimizer, losses = made()
    if what == "static graph":
        model = DistributedDataParallel(Net().double(), static_graph=True)
        target = lambda: rows_of(model, TARGETS)  # noqa: E731
        optimizer = SelectiveOptimizer(torch.optim.AdamW(model.parameters()), model, target)
    if what == "hook":
        model.register_comm_hook(None, allreduce_hook)
    if what == "FSDP1":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is slow on a CPU, and on its way out
            net = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = SelectiveOptimizer(torch.optim.AdamW(net.parameters()), net, lambda: rows_of(net, TARGETS))
    optimizer.step(losses)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("static graph", "static_graph=False"),
        slow("hook", "without a communication hook"),
        slow("FSDP1", "got FSDP1"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(what: str, said: str, two_processes: Processes) -> None:
    for one in two_processes.outcomes(refused, what):
        assert isinstance(one, Failure), one
        assert one.kind == "NotImplementedError"
        assert said in one.text


def wrong_ranks() -> list[str]:
    """A job that gives what are no ranks; the errors."""
    from torch.distributed.device_mesh import init_device_mesh

    model, optimizer, losses = made()
    said = []
    for given in (3, init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))):
        try:
            SelectiveOptimizer(optimizer.optimizer, model, optimizer.target, ranks=given)
        except (TypeError, ValueError) as error:
            said.append(str(error))
    mesh = init_device_mesh("cpu", (2,))
    SelectiveOptimizer(optimizer.optimizer, model, optimizer.target, ranks=mesh).step(losses)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    by_itself = SelectiveOptimizer(optimizer.optimizer, model, optimizer.target, ranks=alone)
    by_itself.backward(losses)
    selection = by_itself.selection
    assert selection is not None
    assert len(selection.losses) == 4
    return said


def test_the_ranks_of_a_selection_can_be_given(two_processes: Processes) -> None:
    for said in two_processes.run(wrong_ranks):
        assert "ProcessGroup or a DeviceMesh, got int" in said[0]
        assert "a mesh of one dimension, got 2" in said[1]
