"""Selections of groups of ranks beside each other, against one process that makes them one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ftw_optim import AcceptFilter, GreedyFilter, SelectiveOptimizer, TopKFilter
from ftw_optim._ranks.grouping import ranks_of_one
from tests.support.grids import slow
from tests.support.processes import Failure, Processes
from tests.support.rank_checks import check_groups
from tests.support.rank_runs import CANDIDATES, TARGETS, Case, Net, made, rows_of, run

CASES = {
    "each rank for itself": Case(wrap={}, among=1, counts=(5, 3), targets=(1, 4)),
    "graph": Case(wrap={}, among=1, combine="graph"),
    "rerun": Case(wrap={}, among=1, combine="rerun", counts=(3, 5)),
    "sketch": Case(among=1, sketch=64),
    "a rank of NaN": Case(wrap={}, among=1, counts=(5, -3)),
    "a rank of NaN, graph": Case(wrap={}, among=1, counts=(-3, 5), combine="graph"),
    "some NaN": Case(wrap={}, among=2, counts=(3, -1, 2, 2), targets=(1, 1, 2, 1)),
    "a rank without candidates": Case(wrap={}, among=1, counts=(5, 0)),
    "a rank without candidates, sketch": Case(among=1, counts=(5, 0), sketch=64),
    "all NaN": Case(wrap={}, among=1, counts=(-2, -3)),
    "target rows": Case(wrap={}, among=1, train_on_target=True, targets=(2, 3)),
    "target rows, graph": Case(wrap={}, among=1, train_on_target=True, targets=(3, 2), combine="graph"),
    "target rows, sketch": Case(among=1, train_on_target=True, targets=(2, 3), sketch=64),
    "scaled": Case(wrap={}, among=1, scale=1024.0, combine="graph"),
    "float32": Case(wrap={}, among=1, dtype=torch.float32),
    "Adafactor": Case(among=1, optimizer="Adafactor"),
    "two pairs": Case(wrap={}, among=2, counts=(4, 1, 2, 3), targets=(1, 2, 1, 3)),
    "two pairs, sketch": Case(among=2, counts=(4, 1, 2, 3), targets=(1, 2, 1, 3), sketch=64),
    "few kept": Case(wrap={}, among=2, counts=(4, 1, 2, 3), targets=(1,) * 4, filter=TopKFilter(keep=1)),
    "shards": Case(shard={}, among=1, counts=(5, 3), targets=(1, 4)),
    "shards, graph": Case(shard={}, among=1, combine="graph"),
    "shards, rerun": Case(shard={}, among=1, combine="rerun", counts=(3, 5)),
    "shards, sketch": Case(shard={}, among=1, sketch=64),
    "shards, a rank of NaN": Case(shard={}, among=1, counts=(5, -3)),
    "shards, a rank without candidates": Case(shard={}, among=1, later=(0, 4)),
    "shards, target rows": Case(shard={}, among=1, train_on_target=True, targets=(2, 3)),
    "shards, Adagrad": Case(shard={}, among=1, optimizer="Adagrad", counts=(1, 4)),
    "shards, two pairs": Case(shard={}, mesh=(4,), among=2, counts=(4, 1, 2, 3), targets=(1, 2, 1, 3)),
    "copies of shards": Case(shard={}, mesh=(2, 2), among=2, counts=(4, 1, 2, 3), targets=(1, 2, 1, 3)),
    "copies of shards, sketch": Case(shard={}, mesh=(2, 2), among=2, counts=(4, 1, 2, 3), targets=(1,) * 4, sketch=64),
}
FAST = {"each rank for itself", "a rank of NaN", "shards"}


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in CASES])
def test_the_mean_of_the_groups_is_applied(name: str, two_processes: Processes, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    four = len(case.counts) == 4
    check_groups(case, request.getfixturevalue("four_processes") if four else two_processes)


def test_target_rows_of_a_group_without_candidates_take_part(two_processes: Processes) -> None:
    """No process by itself makes such a step: it has candidates, or it fails."""
    case = Case(wrap={}, among=1, train_on_target=True, counts=(5, 0), targets=(2, 3))
    first, second = two_processes.run(run, case)
    for one, other in zip(first["selections"], second["selections"], strict=True):
        assert float(one.target_weights[2:].sum()) == pytest.approx(0.5)
        assert torch.equal(one.target_weights, other.target_weights)
        assert len(one.losses) == 5
        assert other.gram.shape == (0, 0)
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key])


def partly(skips: bool) -> dict[str, Any]:
    """A job of groups of which one alone reaches a parameter, or of which both keep nothing; or the same one by one."""
    several, found = dist.is_initialized(), []
    for group in (dist.get_rank(),) if several else (0, 1):
        torch.manual_seed(3)
        net = Net().double()
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(net.parameters(), lr=1e-2),
            net,
            lambda net=net: (-1 if skips else 1) * rows_of(net, TARGETS, rare=True),
            filter=AcceptFilter(confidence=0.0) if skips else GreedyFilter(keep=3),
            among=1,
        )
        rows = TARGETS if skips else CANDIDATES[group]
        optimizer.step(lambda net=net, rows=rows, group=group: rows_of(net, rows, rare=skips or group == 0))
        found.append(optimizer.selection)
    return {"selections": found}


@pytest.mark.parametrize("skips", [False, True])
def test_what_is_said_of_groups_is_what_each_would_say(skips: bool, two_processes: Processes) -> None:
    (one, other), (found,) = partly(skips)["selections"], two_processes.run(partly, skips)[0]["selections"]
    assert found.skipped == one.skipped == other.skipped == skips
    assert found.target_energy == pytest.approx((one.target_energy + other.target_energy) / 2)
    assert found.cosine == pytest.approx((one.cosine + other.cosine) / 2)
    torch.testing.assert_close(found.squares, torch.cat([one.squares, other.squares]))
    torch.testing.assert_close(found.cross_gram, torch.cat([one.cross_gram, other.cross_gram]))


class Failing(TopKFilter):
    """A stage that fails in one of the groups."""

    def __call__(self, matching: Any) -> torch.Tensor:
        if len(matching.losses) == 4 and torch.distributed.get_rank() == 1:
            raise OSError("no filter today")
        return super().__call__(matching)


def fails_in_one_group() -> list[str]:
    """A job whose first step fails in the second group, and the next one does not."""
    _, optimizer, losses = made(filter=Failing(keep=2), among=1)
    said = []
    for number in range(2):
        if number:
            optimizer.filter = TopKFilter(keep=2)
        try:
            optimizer.step(losses)
            said.append("stepped")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_failure_in_one_group_is_told_to_all(two_processes: Processes) -> None:
    first, second = two_processes.run(fails_in_one_group)
    assert second == ["OSError: no filter today", "stepped"]
    assert first[0].startswith("RuntimeError: Rank 1 raised OSError")
    assert first[1] == "stepped"


def uneven_groups() -> None:
    """A job of two ranks in groups of three."""
    _, optimizer, losses = made(among=3)
    optimizer.step(losses)


def test_groups_are_of_one_size(two_processes: Processes) -> None:
    for one in two_processes.outcomes(uneven_groups):
        assert isinstance(one, Failure)
        assert "among to divide the number of ranks, 2, got 3" in one.text


def test_as_many_ranks_as_can_be_solved_for_make_one_selection() -> None:
    assert ranks_of_one([256] * 8, None) == 8
    with pytest.warns(UserWarning, match="groups of 4 ranks"):
        assert ranks_of_one([257] * 8, None) == 4
    with pytest.warns(UserWarning, match="groups of 1 ranks"):
        assert ranks_of_one([3000] * 3, None) == 1
    with pytest.warns(UserWarning, match="groups of 3 ranks"):
        assert ranks_of_one([1, 1, 2046, 2000, 1, 1], None) == 3
    assert ranks_of_one([3000] * 4, 4) == 4


@pytest.mark.parametrize("among", [0, True, 1.0])
def test_among_is_a_number_of_ranks(among: Any) -> None:
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="positive number of ranks"):
        SelectiveOptimizer(torch.optim.SGD(net.parameters()), net, lambda: net.weight.sum(1), among=among)


def test_one_process_is_a_group_by_itself() -> None:
    case = Case(steps=1)
    whole, grouped = run(case, alone=True), run(replace(case, among=1), alone=True)
    assert torch.equal(whole["selections"][0].weights, grouped["selections"][0].weights)
    assert whole["selections"][0].group == slice(0, 8)
