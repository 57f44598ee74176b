"""One selection over several processes, against a single process that sees all candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftw_optim import KeepAll, TopKFilter, UniformWeights
from tests.support.grids import slow
from tests.support.processes import Processes
from tests.support.rank_checks import check_one_selection
from tests.support.rank_runs import Case, run

CASES = {
    "plain": Case(),
    "uneven": Case(counts=(5, 2), targets=(1, 4)),
    "ddp": Case(wrap={}),
    "ddp, graph": Case(wrap={}, combine="graph"),
    "ddp, rerun": Case(wrap={}, combine="rerun", counts=(5, 3)),
    "bucket views": Case(wrap={"gradient_as_bucket_view": True}, combine="graph"),
    "unused": Case(wrap={"find_unused_parameters": True}),
    "wrapped outside": Case(wrap={}, outside=True),
    "wrapped outside, graph": Case(wrap={}, outside=True, combine="graph"),
    "wrapped outside, rerun": Case(wrap={}, outside=True, combine="rerun"),
    "one layer scored": Case(wrap={}, scored="last", combine="graph"),
    "one layer scored, factors": Case(scored="last"),
    "float32": Case(dtype=torch.float32),
    "micro-batches": Case(wrap={}, pieces=2, counts=(4, 3)),
    "micro-batches, graph": Case(wrap={}, pieces=2, combine="graph"),
    "accumulated": Case(wrap={"gradient_as_bucket_view": True}, accumulated=2, combine="graph"),
    "scaled": Case(wrap={}, scale=1024.0),
    "scaled, graph": Case(wrap={}, scale=1024.0, combine="graph"),
    "a rank of NaN": Case(wrap={}, counts=(5, -3)),
    "a rank of NaN, graph": Case(wrap={}, counts=(-2, 5), combine="graph"),
    "a rank without candidates": Case(wrap={}, counts=(5, 0)),
    "a rank without candidates, graph": Case(wrap={}, counts=(0, 5), combine="graph"),
    "a rank without candidates, rerun": Case(wrap={}, counts=(0, 5), combine="rerun"),
    "a rank with target rows alone": Case(wrap={}, counts=(5, 0), train_on_target=True),
    "all NaN": Case(wrap={}, counts=(-2, -3)),
    "target rows": Case(wrap={}, train_on_target=True, targets=(2, 3)),
    "target rows, graph": Case(wrap={}, train_on_target=True, targets=(1, 3), combine="graph"),
    "target rows, rerun": Case(wrap={}, train_on_target=True, targets=(1, 3), combine="rerun"),
    "target rows, remembered": Case(wrap={}, train_on_target=True, targets=(1, 3), target={"decay": 0.7}),
    "remembered": Case(target={"decay": 0.7, "refresh_every": 2}, targets=(1, 3)),
    "euclidean": Case(metric="euclidean"),
    "update": Case(metric="update"),
    "few kept": Case(wrap={}, filter=TopKFilter(keep=1), combine="rerun"),
    "shards": Case(shard={}, counts=(5, 3)),
    "shards, graph": Case(shard={}, combine="graph"),
    "shards, rerun": Case(shard={}, combine="rerun"),
    "shards, kept by one rank": Case(shard={}, combine="rerun", filter=TopKFilter(keep=1)),
    "shards stay whole": Case(shard={"reshard_after_forward": False}, combine="graph", counts=(2, 4)),
    "shards, micro-batches": Case(shard={}, pieces=2, combine="graph"),
    "shards, accumulated": Case(shard={}, accumulated=2),
    "shards, scaled": Case(shard={}, scale=1024.0, combine="graph"),
    "shards, a rank of NaN": Case(shard={}, counts=(5, -3)),
    "shards, a rank of NaN, graph": Case(shard={}, counts=(-2, 5), combine="graph"),
    "shards, target rows": Case(shard={}, train_on_target=True, targets=(2, 3)),
    "shards, target rows, graph": Case(shard={}, train_on_target=True, targets=(1, 3), combine="graph"),
    "shards, target rows, rerun": Case(shard={}, train_on_target=True, targets=(1, 3), combine="rerun"),
    "shards, remembered": Case(shard={}, target={"decay": 0.7, "refresh_every": 2}, targets=(1, 3)),
    "shards, one layer scored": Case(shard={}, scored="last", combine="graph"),
    "shards, float32": Case(shard={}, dtype=torch.float32),
    "shards, euclidean": Case(shard={}, metric="euclidean"),
    **{f"shards, {name}": Case(shard={}, optimizer=name) for name in ("SGD", "RMSprop", "Adagrad")},
    "sketch": Case(wrap={}, outside=True, sketch=64, counts=(5, 3)),
    "sketch, unused": Case(wrap={"find_unused_parameters": True}, sketch=64),
    "sketch, graph, update": Case(wrap={}, outside=True, sketch=64, combine="graph", metric="update"),
    "sketch, rerun": Case(wrap={}, outside=True, sketch=64, combine="rerun", counts=(0, 6)),
    "sketch, micro-batches": Case(wrap={}, outside=True, sketch=64, pieces=2, counts=(4, 3)),
    "sketch, a rank of NaN": Case(wrap={}, outside=True, sketch=64, counts=(5, -3)),
    "sketch, target rows": Case(wrap={}, outside=True, sketch=64, train_on_target=True, targets=(1, 3)),
    "sketch, target rows, remembered": Case(sketch=64, train_on_target=True, targets=(1, 3), target={"decay": 0.7}),
    **{
        f"shards, a rank without candidates, {combine}": Case(shard={}, later=(5, 0), combine=combine)
        for combine in ("factors", "graph", "rerun")
    },
    "shards, a rank without candidates, target rows": Case(
        shard={}, later=(0, 4), train_on_target=True, targets=(1, 3), combine="graph"
    ),
    "shards, a rank without candidates, sketch": Case(
        shard={}, counts=(3, 3), later=(0, 5), sketch=64, pieces=2, combine="rerun"
    ),
    "shards, no rank has candidates": Case(shard={}, later=(0, -1), combine="graph"),
    **{
        f"shards, fewer batches, {combine}": Case(shard={}, counts=(1, 4), pieces=2, combine=combine)
        for combine in ("factors", "graph")
    },
    "shards, batches again": Case(shard={}, pieces=2, combine="graph", counts=(5, -3), scored="last"),
    "shards, sketch, batches again": Case(shard={}, sketch=64, pieces=2, combine="rerun", counts=(5, 2)),
    "shards, sketch, one rank again": Case(shard={}, sketch=64, pieces=2, combine="rerun", filter=TopKFilter(keep=2)),
    "shards, sketch": Case(shard={}, sketch=64, counts=(5, 3)),
    "shards, sketch, graph, update": Case(shard={}, sketch=64, combine="graph", metric="update"),
    "shards, sketch, rerun": Case(shard={}, sketch=64, combine="rerun"),
    "shards, sketch, micro-batches": Case(shard={}, sketch=64, pieces=2),
    "shards, sketch, a rank of NaN": Case(shard={}, sketch=64, counts=(5, -3)),
    "shards, sketch, target rows": Case(shard={}, sketch=64, train_on_target=True, targets=(1, 3)),
    **{name: Case(optimizer=name) for name in ("SGD", "Adafactor", "RMSprop", "Adagrad")},
}
FAST = {
    "shards, sketch, batches again",
    "uneven",
    "ddp, graph",
    "target rows",
    "Adafactor",
    "a rank without candidates",
}


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in CASES])
def test_the_selection_and_the_step_are_those_of_one_process(name: str, two_processes: Processes) -> None:
    case = CASES[name]
    check_one_selection(case, two_processes)


@pytest.mark.parametrize("counts", [slow((4, 1, 2, 3)), slow((1, 1, 1, 1)), slow((7, -1, 2, 1))])
def test_four_processes(counts: tuple[int, ...], four_processes: Processes) -> None:
    check_one_selection(Case(counts=counts, targets=(1, 2, 1, 3), wrap={}), four_processes)


@pytest.mark.parametrize("combine", [slow("factors"), slow("graph"), slow("rerun")])
@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=["shards", "shards and copies"])
def test_four_processes_with_shards(mesh: tuple[int, ...], combine: str, four_processes: Processes) -> None:
    case = Case(shard={}, mesh=mesh, combine=combine, counts=(1, 4, 2, 1), targets=(1, 2, 1, 3))
    check_one_selection(case, four_processes)


@pytest.mark.parametrize("combine", [slow("factors"), slow("graph"), slow("rerun")])
def test_with_all_kept_alike_it_is_plain_training_on_all_rows(combine: str, two_processes: Processes) -> None:
    case = Case(counts=(5, 3), wrap={}, filter=KeepAll(), weight=UniformWeights(), combine=combine)
    found = two_processes.run(run, case)[0]
    for selection in found["selections"]:
        assert selection.weights.tolist() == pytest.approx([1 / 8] * 8)
    whole = run(replace(case, wrap=None), alone=True)
    for key, value in whole["parameters"].items():
        torch.testing.assert_close(found["parameters"][key], value, rtol=1e-10, atol=1e-12)
