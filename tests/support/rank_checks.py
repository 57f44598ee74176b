"""What must hold of runs in several processes: each compared with what one process does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ftw_optim import Selection, SelectiveOptimizer, Sketch, TargetGradient
from tests.support.processes import Processes
from tests.support.rank_runs import OPTIMIZERS, Case, Net, data, rows_of, run


def check_one_selection(case: Case, processes: Processes) -> None:
    """Ranks that make one selection are one process that has all rows, and agree to the last bit."""
    ranks = processes.run(run, case)
    whole = run(replace(case, wrap=None, shard=None), alone=True)
    exact = case.dtype == torch.float64
    unused = bool((case.wrap or {}).get("find_unused_parameters"))
    near: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for rank, found in enumerate(ranks):
        for number, mine in enumerate(found["mine"]):
            counts = case.counts_at(number)
            start = sum(map(abs, counts[:rank]))
            assert mine == slice(start, start + abs(counts[rank]))
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


def check_groups(case: Case, processes: Processes) -> None:
    """Groups of ranks make the selections that one process makes one by one, and the mean of these is applied."""
    ranks = processes.run(run, case)
    whole = one_by_one(case)
    exact = case.dtype == torch.float64
    near: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
    assert case.among is not None
    for rank, found in enumerate(ranks):
        first = rank // case.among * case.among
        for number, (selection, parts) in enumerate(zip(found["selections"], whole["selections"], strict=True)):
            counts = list(map(abs, case.counts_at(number)))
            starts = [sum(counts[:start]) for start in (rank, rank + 1)]
            group = [sum(counts[:start]) for start in (first, first + case.among)]
            assert found["mine"][number] == slice(*starts)
            assert selection.group == slice(*group)
            own: Selection = parts[rank // case.among]
            size = float(own.gram.diagonal().max()) if len(own.losses) else 0.0
            assert selection.gram.shape == own.gram.shape
            if own.gram.numel():
                assert (selection.gram - own.gram).abs().max() <= (1e-12 if exact else 1e-5) * (size or 1.0)
            _compare(selection, parts, near)
            of_rank = selection.own()
            assert len(of_rank.losses) == counts[rank]
            assert of_rank.gram.shape == (len(of_rank.losses),) * 2
            inside = slice(starts[0] - group[0], starts[1] - group[0])
            assert torch.equal(of_rank.gram, selection.gram[inside, inside])
        for key, value in ranks[0]["parameters"].items():
            assert torch.equal(value, found["parameters"][key])
    for one, other in zip(ranks[0]["gradients"], whole["gradients"], strict=True):
        if case.scale != 1.0 and not other:  # a scaler must find something to unscale where nothing is applied
            assert not any(gradient.any() for gradient in one.values())
            continue
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
        per_rank = everyone.split([abs(count) for count in case.counts_at(step)])
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
                metric=case.metric,
                combine=case.combine,
                scored=case.scored_predicate,
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
