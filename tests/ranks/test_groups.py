"""Selections of groups of ranks beside each other, against one process that makes them one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ftw_optim import AcceptFilter, GreedyFilter, Selection, SelectiveOptimizer, Sketch, TargetGradient, TopKFilter
from ftw_optim._ranks.grouping import ranks_of_one
from tests.support.grids import slow
from tests.support.processes import Failure, Processes
from tests.support.rank_runs import CANDIDATES, OPTIMIZERS, TARGETS, Case, Net, data, made, rows_of, run

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
    ranks = (request.getfixturevalue("four_processes") if four else two_processes).run(run, case)
    whole = one_by_one(case)
    exact = case.dtype == torch.float64
    near: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
    assert case.among is not None
    for rank, found in enumerate(ranks):
        starts = [sum(map(abs, case.counts[:start])) for start in (rank, rank + 1)]
        first = rank // case.among * case.among
        group = [sum(map(abs, case.counts[:start])) for start in (first, first + case.among)]
        assert found["mine"] == [slice(*starts)] * case.steps
        for selection, parts in zip(found["selections"], whole["selections"], strict=True):
            assert selection.group == slice(*group)
            own: Selection = parts[rank // case.among]
            size = float(own.gram.diagonal().max()) if len(own.losses) else 0.0
            assert selection.gram.shape == own.gram.shape
            if own.gram.numel():
                assert (selection.gram - own.gram).abs().max() <= (1e-12 if exact else 1e-5) * (size or 1.0)
            _compare(selection, parts, near)
            of_rank = selection.own()
            assert len(of_rank.losses) == abs(case.counts[rank])
            assert of_rank.gram.shape == (len(of_rank.losses),) * 2
            inside = slice(starts[0] - group[0], starts[1] - group[0])
            assert torch.equal(of_rank.gram, selection.gram[inside, inside])
        for key, value in ranks[0]["parameters"].items():
            assert torch.equal(value, found["parameters"][key])
    for one, other in zip(ranks[0]["gradients"], whole["gradients"], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key] / case.scale, other[key], **near)
    for key, value in whole["parameters"].items():
        torch.testing.assert_close(ranks[0]["parameters"][key], value, **near)


def _compare(selection: Selection, parts: list[Selection], near: dict[str, Any]) -> None:
    """All that is said of the step as a whole."""
    starts = [sum(len(part.losses) for part in parts[:number]) for number in range(len(parts))]
    active = [part for part in parts if not part.skipped]
    assert selection.skipped == (not active)
    assert selection.kept.tolist() == [
        row + start for part, start in zip(parts, starts, strict=True) for row in part.kept.tolist()
    ]
    assert selection.rejected.tolist() == [
        row + start for part, start in zip(parts, starts, strict=True) for row in part.rejected.tolist()
    ]
    for field in ("losses", "cross_gram"):
        joined = torch.cat([getattr(part, field) for part in parts])
        torch.testing.assert_close(getattr(selection, field), joined, equal_nan=True, **near)
    for field in ("weights", "target_weights"):
        some = [getattr(part, field) * (not part.skipped) for part in parts]
        torch.testing.assert_close(getattr(selection, field), torch.cat(some) / max(1, len(active)), **near)
    if active:
        total = selection.weights.sum() + selection.target_weights.sum()
        assert float(total) == pytest.approx(1.0)
        for field in ("predicted_decrease", "cosine", "target_energy", "fitted_scale"):
            # What the target asks for is known of every group that has candidates, whether it keeps any or not.
            some_parts = [part for part in parts if part.target_energy] if field == "target_energy" else active
            mean = sum(getattr(part, field) for part in some_parts) / len(some_parts)
            near_mean = pytest.approx(mean, rel=1e-3 if near["rtol"] > 1e-6 else 1e-9, abs=1e-12)
            assert getattr(selection, field) == near_mean, field


def one_by_one(case: Case) -> dict[str, Any]:
    """The same run in one process: a group after the other, and the mean of their gradients."""
    assert case.among is not None
    groups = [slice(start, start + case.among) for start in range(0, len(case.counts), case.among)]
    torch.manual_seed(3)
    net = Net().to(case.dtype)
    inner = OPTIMIZERS[case.optimizer](list(net.parameters()))
    found: dict[str, Any] = {"selections": [], "gradients": []}
    for step, (everyone, targets) in enumerate(data(case)):
        per_rank = everyone.split([abs(count) for count in case.counts])
        target_rows = targets.split(list(case.targets))
        parts: list[Selection] = []
        sums: dict[str, torch.Tensor] = {}
        for some in groups:
            guide = torch.cat(target_rows[some]) if case.train_on_target else targets
            candidates = torch.cat(per_rank[some])
            one = SelectiveOptimizer(
                inner,
                net,
                TargetGradient(lambda guide=guide: rows_of(net, guide, rare=True)),
                filter=case.filter,
                weight=case.weight,
                combine=case.combine,
                train_on_target=case.train_on_target,
                gram="exact" if case.sketch is None else Sketch(dim=case.sketch),
            )
            one._backwards = step  # of which random numbers are made
            net.zero_grad()
            if not len(candidates):
                parts.append(Selection.nothing(torch.empty(0, dtype=case.dtype), torch.empty(0, dtype=torch.bool)))
                continue

            def losses(rows: torch.Tensor | None = None, candidates: torch.Tensor = candidates) -> torch.Tensor:
                return rows_of(net, candidates if rows is None else candidates[rows])

            one.backward(losses)
            assert one.selection is not None
            parts.append(one.selection)
            for name, parameter in net.named_parameters():
                if parameter.grad is not None:
                    sums[name] = sums.get(name, torch.zeros_like(parameter)) + parameter.grad
        active = sum(not part.skipped for part in parts)
        found["selections"].append(parts)
        gradients = {name: total / max(1, active) for name, total in sums.items()} if active else {}
        found["gradients"].append({name: gradient.clone() for name, gradient in gradients.items()})
        for name, parameter in net.named_parameters():
            parameter.grad = gradients.get(name)
        if active:
            inner.step()
        net.zero_grad()
    found["parameters"] = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    return found


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
