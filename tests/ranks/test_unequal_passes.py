"""Ranks that would make different passes of a model in shards: they do not wait for each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.processes import Failure, Processes
from tests.support.rank_runs import Case, made, run, whole


def unequal(what: str) -> Any:
    """A job in which ranks would make different passes."""
    if what == "micro-batches":
        model, optimizer, losses = made(shards=True)
        parts = [torch.arange(2), torch.arange(2, 4)][: 1 + dist.get_rank()]
        try:
            optimizer.step(lambda: (losses(part) for part in parts))
        except RuntimeError as error:
            text = str(error)
        optimizer.step(losses)  # what the step left behind does not disturb the next one
        return text, [whole(p.detach()) for p in model.parameters()]
    if what == "no candidates":
        return run(Case(shard={}, counts=(4, 0), steps=1))
    _model, optimizer, losses = made(shards=True, self_check=dist.get_rank() == 0)
    return optimizer.step(losses)


def test_ranks_that_would_make_different_passes_do_not_wait_for_each_other(two_processes: Processes) -> None:
    for one in two_processes.outcomes(unequal, "self_check"):
        assert isinstance(one, Failure)
        assert "Expected the self_check to be the same on all ranks" in one.text
    for one in two_processes.outcomes(unequal, "no candidates"):
        assert isinstance(one, Failure)
        assert "rank 0 has come to a forward pass, rank 1 to the end of its closure. Give each" in one.text


def test_a_rank_with_more_micro_batches_is_told_and_the_next_step_is_right(two_processes: Processes) -> None:
    found = two_processes.run(unequal, "micro-batches")
    for text, parameters in found:
        assert "rank 0 has come to the end of its closure, rank 1 to a forward pass. Give each rank" in text
        for value, expected in zip(parameters, two_processes.run(one_step)[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def one_step() -> list[Tensor]:
    """A job: a single step."""
    model, optimizer, losses = made(shards=True)
    optimizer.step(losses)
    return [whole(p.detach()) for p in model.parameters()]
