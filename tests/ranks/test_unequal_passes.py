"""Ranks that would make different passes of a model in shards: they do not wait for each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.processes import Failure, Processes
from tests.support.rank_runs import TARGETS, Case, made, rows_of, run, whole


def unequal(what: str) -> Any:
    """A job in which ranks would make different passes."""
    if what == "no candidates":
        return run(Case(shard={}, counts=(4, 0), steps=1))
    model, optimizer, losses = made(shards=True, self_check=dist.get_rank() == 0 or what != "self_check")
    if what != "target":
        return optimizer.step(losses)
    optimizer.step(losses)
    own = dist.get_rank()
    optimizer.target = lambda: torch.cat([rows_of(model, TARGETS, rare=True) for _ in range(1 + own)])
    try:
        optimizer.step(losses)
    except RuntimeError as error:
        text = str(error)
    optimizer.target = lambda: rows_of(model, TARGETS, rare=True)
    optimizer.step(losses)  # what the step left behind does not disturb the next one
    return text, [whole(p.detach()) for p in model.parameters()]


def test_ranks_that_would_make_different_passes_do_not_wait_for_each_other(two_processes: Processes) -> None:
    for what, said in (
        ("self_check", "Expected the self_check to be the same on all ranks"),
        ("no candidates", "Expected a pass over candidates on this rank before"),
    ):
        for one in two_processes.outcomes(unequal, what):
            assert isinstance(one, Failure)
            assert said in one.text


def test_a_rank_with_more_passes_of_its_target_is_told_and_the_next_step_is_right(two_processes: Processes) -> None:
    found = two_processes.run(unequal, "target")
    expected = two_processes.run(two_steps)[0]
    for text, parameters in found:
        assert "rank 0 has come to a backward pass, rank 1 to a forward pass. Give each rank" in text
        for value, other in zip(parameters, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-12)


def two_steps() -> list[Tensor]:
    """A job: two steps."""
    model, optimizer, losses = made(shards=True)
    optimizer.step(losses)
    optimizer.step(losses)
    return [whole(p.detach()) for p in model.parameters()]
