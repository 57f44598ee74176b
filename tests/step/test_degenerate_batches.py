"""One candidate, duplicates, nothing to keep, no labels, any scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, TopKFilter
from tests.support.models import SmallGPT, language_model, mlp, seeded
from tests.support.steps import WAYS, build, snapshot

pytestmark = pytest.mark.usefixtures("fixed_seed")


@pytest.mark.parametrize("combine", WAYS)
def test_one_candidate_is_kept_whole_or_not_at_all(combine: str) -> None:
    case = mlp(torch.float64, 1)
    inner = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    optimizer = SelectiveOptimizer(inner, case.model, case.losses, combine=combine)
    optimizer.backward(case.losses)
    selection = optimizer.selection
    assert selection is not None
    assert selection.kept.tolist() == [0]
    assert selection.weights.tolist() == [1.0]
    assert selection.residual == pytest.approx(0.0, abs=1e-10)
    expected = torch.autograd.grad(case.losses()[0], list(case.model.parameters()))
    torch.testing.assert_close([p.grad for p in case.model.parameters()], list(expected))


@pytest.mark.parametrize("keep", [6, 7, 100, 1.0])
def test_a_budget_of_all_and_more_keeps_whatever_helps(keep: float) -> None:
    case, optimizer = build(filter=GreedyFilter(keep=keep))
    optimizer.step(case.losses)
    assert optimizer.selection is not None
    assert 1 <= len(optimizer.selection.kept) <= 6


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("combine", WAYS)
def test_when_nothing_is_kept_the_step_is_skipped_untouched(combine: str, scale: float) -> None:
    case, optimizer = build(combine)
    for tensor in case.candidates.values():
        tensor[:] = tensor[:1].clone()  # all alike, so that one target is opposed to all of them
    optimizer.target = case.losses  # type: ignore[assignment]
    optimizer.step(case.losses)
    optimizer.target = lambda: -case.losses()  # type: ignore[assignment]
    before = snapshot(case, optimizer)

    loss = optimizer.step(case.losses)
    selection = optimizer.selection
    assert selection is not None
    assert selection.skipped
    assert selection.combine == "skipped"
    assert (selection.residual, selection.cosine, selection.effective_size) == (1.0, 0.0, 0.0)
    torch.testing.assert_close(loss, case.losses().detach().mean())
    after = snapshot(case, optimizer)
    torch.testing.assert_close((after[0], after[2]), (before[0], before[2]), rtol=0, atol=0)
    assert all(p.grad is None for p in case.model.parameters())

    optimizer.backward(case.losses, grad_scale=scale)
    for parameter in case.model.parameters():  # a scaler must find something to look at
        assert parameter.grad is None if scale == 1.0 else not parameter.grad.any()
    optimizer.step()
    torch.testing.assert_close(snapshot(case, optimizer)[0], before[0], rtol=0, atol=0)

    optimizer.backward(case.losses)  # skipped again,
    optimizer.target = case.losses  # type: ignore[assignment]
    optimizer.backward(case.losses)  # but not this one
    optimizer.step()
    assert not torch.equal(next(case.model.parameters()), before[0][0])


def test_a_candidate_without_labels_gets_no_weight_and_does_no_harm() -> None:
    case = language_model(seeded(SmallGPT).double(), 4)
    case.candidates["labels"][2] = -100
    for stage in (GreedyFilter(keep=4), TopKFilter(keep=4), KeepAll()):
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, filter=stage
        )
        optimizer.backward(case.losses)
        selection = optimizer.selection
        assert selection is not None
        assert len(selection.rejected) == 0
        assert 2 not in selection.kept[selection.weights > 0].tolist()
        assert not selection.gram[2].any()
        optimizer.zero_grad()


def test_duplicates_share_one_candidates_weight() -> None:
    results = []
    for rows in ([0, 1, 2, 3], [0, 1, 2, 3, 1, 1]):
        case, optimizer = build(filter=GreedyFilter(keep=3))
        optimizer.backward(lambda case=case, rows=rows: case.losses(torch.tensor(rows)))
        results.append([p.grad for p in case.model.parameters()])
        assert optimizer.selection is not None
        assert not {4, 5} & set(optimizer.selection.kept.tolist())
    # AdamW's reference is the mean of the candidates, so only the euclidean problem is the same with duplicates.
    results = []
    for rows in ([0, 1, 2, 3], [0, 1, 2, 3, 1, 1]):
        case, optimizer = build(filter=GreedyFilter(keep=3), metric="euclidean")
        optimizer.backward(lambda case=case, rows=rows: case.losses(torch.tensor(rows)))
        results.append([p.grad for p in case.model.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("metric", ["preconditioned", "update", "euclidean"])
def test_a_cold_start_is_finite_and_useful_at_any_gradient_scale(metric: str, scale: float) -> None:
    """In float32; the scale comes with losses of another unit."""
    case = mlp(torch.float32, 6)
    inner = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    optimizer = SelectiveOptimizer(
        inner, case.model, lambda: scale * case.target_losses(), metric=metric, filter=GreedyFilter(keep=3)
    )
    for _ in range(2):
        optimizer.backward(lambda: scale * case.losses())
        selection = optimizer.selection
        assert selection is not None
        assert selection.gram.isfinite().all()
        assert not selection.skipped
        assert selection.cosine > 0.1
        assert math.isfinite(selection.predicted_decrease)
        optimizer.zero_grad()
        optimizer.step(lambda: scale * case.losses())


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_a_learning_rate_of_zero_selects_as_usual_and_predicts_nothing(inner: Any) -> None:
    """A scheduler's first step."""
    kept = []
    for lr in (0.0, 1.0):
        case, optimizer = build(inner=inner, lr=lr)
        optimizer.backward(case.losses)
        selection = optimizer.selection
        assert selection is not None
        kept.append((selection.kept.tolist(), selection.weights.tolist(), selection.cosine))
        assert (selection.predicted_decrease == 0.0) == (lr == 0.0)
    assert kept[0] == kept[1]
