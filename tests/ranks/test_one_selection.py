"""One selection over several processes, against a single process that sees all candidates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ftw_optim import KeepAll, TopKFilter, UniformWeights
from tests.support.grids import slow
from tests.support.processes import Processes
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
    "shards, sketch": Case(shard={}, sketch=64, counts=(5, 3)),
    "shards, sketch, graph, update": Case(shard={}, sketch=64, combine="graph", metric="update"),
    "shards, sketch, rerun": Case(shard={}, sketch=64, combine="rerun"),
    "shards, sketch, micro-batches": Case(shard={}, sketch=64, pieces=2),
    "shards, sketch, a rank of NaN": Case(shard={}, sketch=64, counts=(5, -3)),
    "shards, sketch, target rows": Case(shard={}, sketch=64, train_on_target=True, targets=(1, 3)),
    **{name: Case(optimizer=name) for name in ("SGD", "Adafactor", "RMSprop", "Adagrad")},
}
FAST = {"uneven", "ddp, graph", "target rows", "Adafactor", "a rank without candidates"}


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in CASES])
def test_the_selection_and_the_step_are_those_of_one_process(name: str, two_processes: Processes) -> None:
    case = CASES[name]
    _check(case, two_processes)


@pytest.mark.parametrize("counts", [slow((4, 1, 2, 3)), slow((1, 1, 1, 1)), slow((7, -1, 2, 1))])
def test_four_processes(counts: tuple[int, ...], four_processes: Processes) -> None:
    _check(Case(counts=counts, targets=(1, 2, 1, 3), wrap={}), four_processes)


@pytest.mark.parametrize("combine", [slow("factors"), slow("graph"), slow("rerun")])
@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=["shards", "shards and copies"])
def test_four_processes_with_shards(mesh: tuple[int, ...], combine: str, four_processes: Processes) -> None:
    _check(Case(shard={}, mesh=mesh, combine=combine, counts=(1, 4, 2, 1), targets=(1, 2, 1, 3)), four_processes)


def _check(case: Case, processes: Processes) -> None:
    ranks = processes.run(run, case)
    whole = run(replace(case, wrap=None, shard=None), alone=True)
    exact = case.dtype == torch.float64
    unused = bool((case.wrap or {}).get("find_unused_parameters"))
    near: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for rank, found in enumerate(ranks):
        start = sum(map(abs, case.counts[:rank]))
        assert found["mine"] == [slice(start, start + abs(case.counts[rank]))] * len(found["mine"])
    first = ranks[0]
    for found in ranks[1:]:  # to the last bit
        for one, other in zip(first["selections"], found["selections"], strict=True):
            for field in ("losses", "kept", "weights", "gram", "cross_gram", "rejected", "target_weights"):
                assert torch.equal(getattr(one, field).nan_to_num(), getattr(other, field).nan_to_num()), field
        for one, other in zip(first["gradients"], found["gradients"], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert all(torch.equal(first["parameters"][key], value) for key, value in found["parameters"].items())
    if unused:
        return  # the ranks run different models, which no single process does
    for one, other in zip(first["selections"], whole["selections"], strict=True):
        assert one.kept.tolist() == other.kept.tolist()
        assert one.rejected.tolist() == other.rejected.tolist()
        assert one.combine == other.combine
        assert one.skipped == other.skipped
        size = float(other.gram.diagonal().max()) or 1.0
        limit = (1e-12 if exact else 1e-5) * size
        assert (one.gram - other.gram).abs().max() <= limit
        assert (one.cross_gram - other.cross_gram).abs().max() <= limit
        assert one.target_energy == pytest.approx(other.target_energy, rel=1e-9 if exact else 1e-4)
        torch.testing.assert_close(one.weights, other.weights, **near)
        torch.testing.assert_close(one.target_weights, other.target_weights, **near)
        torch.testing.assert_close(one.losses, other.losses, equal_nan=True, **near)
    for one, other in zip(first["gradients"], whole["gradients"], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], **{**near, "atol": near["atol"] * case.scale})
    for key, value in whole["parameters"].items():
        torch.testing.assert_close(first["parameters"][key], value, **near)


@pytest.mark.parametrize("combine", [slow("factors"), slow("graph"), slow("rerun")])
def test_with_all_kept_alike_it_is_plain_training_on_all_rows(combine: str, two_processes: Processes) -> None:
    case = Case(counts=(5, 3), wrap={}, filter=KeepAll(), weight=UniformWeights(), combine=combine)
    found = two_processes.run(run, case)[0]
    for selection in found["selections"]:
        assert selection.weights.tolist() == pytest.approx([1 / 8] * 8)
    whole = run(replace(case, wrap=None), alone=True)
    for key, value in whole["parameters"].items():
        torch.testing.assert_close(found["parameters"][key], value, rtol=1e-10, atol=1e-12)
