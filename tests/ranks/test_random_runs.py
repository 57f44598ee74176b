"""Random runs of two and four processes, with all options at once, against what a single process does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ftw_optim import (
    AcceptFilter,
    GreedyFilter,
    KeepAll,
    NonNegativeLeastSquares,
    TopKFilter,
    UniformWeights,
)
from tests.support.processes import Processes
from tests.support.rank_checks import check_groups, check_one_selection
from tests.support.rank_runs import OPTIMIZERS, Case

WITHOUT_SHARDS = {"Adafactor"}
"""Optimizers that torch does not step on parameters in shards."""
FILTERS = [GreedyFilter(keep=0.5), GreedyFilter(keep=2), TopKFilter(keep=1), AcceptFilter(), KeepAll()]
WEIGHTS = [NonNegativeLeastSquares(), NonNegativeLeastSquares(anchor=0.3, anchor_to="positive"), UniformWeights()]


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    """A run that is not refused."""
    among = draw(st.sampled_from([None, None, *(size for size in (1, 2) if size < ranks)]))
    kind = draw(st.sampled_from(["plain", "ddp", "shards"]))
    shards, combine = kind == "shards", draw(st.sampled_from(["factors", "graph", "rerun"]))
    sketch = draw(st.sampled_from([None, None, 64]))
    train_on_target = draw(st.booleans())
    pieces = draw(st.sampled_from([1, 1, 2])) if among is None and (combine != "rerun" or sketch) else 1
    # In shards every rank has candidates at its first step, of which it makes a pass along with others later.
    counts, later = (
        draw(st.lists(st.integers(least, 5) | st.integers(-3, -1), min_size=ranks, max_size=ranks))
        for least in (int(shards), 0)
    )
    assume(any(counts) and any(later))
    targets = draw(st.lists(st.integers(1, 3), min_size=ranks, max_size=ranks))
    size = among or ranks
    if train_on_target:
        assume(min(sum(targets[start : start + size]) for start in range(0, ranks, size)) >= 2)
    if among is not None and train_on_target:  # target rows of a group without candidates are no process's step
        assume(
            all(
                sum(map(abs, some[start : start + size])) for some in (counts, later) for start in range(0, ranks, size)
            )
        )
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS.keys() - (WITHOUT_SHARDS if shards else set()))))
    alone: dict[str, Any] = {}
    if among is None:
        alone = {
            "accumulated": draw(st.sampled_from([1, 2])),
            "target": draw(st.sampled_from([{}, {"decay": 0.7}] + [{"refresh_every": 2}] * (not train_on_target))),
        }
    return Case(
        counts=counts,
        later=later,
        targets=targets,
        wrap={"gradient_as_bucket_view": draw(st.booleans())} if kind == "ddp" else None,
        outside=kind == "ddp",  # a sketch's draws go by the names of parameters
        shard={"reshard_after_forward": draw(st.booleans())} if shards else None,
        mesh=draw(st.sampled_from([(4,), (2, 2)])) if ranks == 4 else (2,),
        optimizer=optimizer,
        combine=combine,
        metric=draw(st.sampled_from(["preconditioned", "euclidean", "update"])),
        filter=draw(st.sampled_from(FILTERS)),
        weight=draw(st.sampled_from(WEIGHTS)),
        train_on_target=train_on_target,
        pieces=pieces,
        scale=draw(st.sampled_from([1.0, 1024.0])),
        scored=draw(st.sampled_from(["", "", "last", "first"])),
        sketch=sketch,
        among=among,
        steps=2,
        seed=draw(st.integers(0, 99)),
        **alone,
    )


def _check(case: Case, processes: Processes) -> None:
    (check_one_selection if case.among is None else check_groups)(case, processes)


@pytest.mark.slow
@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(2))
def test_random_runs_of_two_processes(case: Case, two_processes: Processes) -> None:
    _check(case, two_processes)


@pytest.mark.slow
@settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(4))
def test_random_runs_of_four_processes(case: Case, four_processes: Processes) -> None:
    _check(case, four_processes)
