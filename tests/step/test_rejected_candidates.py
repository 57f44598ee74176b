"""Losses and gradients that are not finite: rejected, and the others treated as if alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import GreedyFilter, SelectiveOptimizer, TopKFilter
from tests.support.layers import LateInfinity
from tests.support.models import mlp, seeded
from tests.support.oracles import candidate_gradients
from tests.support.steps import WAYS, build, snapshot

pytestmark = pytest.mark.usefixtures("fixed_seed")


def combined(case: Any, optimizer: SelectiveOptimizer) -> dict[str, Tensor]:
    """The oracle's gradient under the weights that were chosen."""
    selection = optimizer.selection
    assert selection is not None
    gradients = candidate_gradients(case)
    return {
        name: sum(  # type: ignore[misc]
            (w * gradients[i][name] for i, w in zip(selection.kept.tolist(), selection.weights, strict=True)),
            torch.zeros_like(gradients[0][name]),
        )
        for name in gradients[0]
    }


def spoilt(case: Any, rows: list[int], value: float) -> Callable[..., Tensor]:
    """The candidates with some rows' inputs replaced, so that NaN or infinity runs through every layer."""
    batch = {key: tensor.clone() for key, tensor in case.candidates.items()}
    batch["x"][rows] = value

    def closure(kept: Tensor | None = None) -> Tensor:
        chosen = batch if kept is None else {key: tensor[kept] for key, tensor in batch.items()}
        losses: Tensor = case.losses_of(case.model, chosen)
        return losses

    return closure


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["preconditioned", "euclidean"])
@pytest.mark.parametrize("combine", WAYS)
def test_spoilt_candidates_are_rejected_and_the_others_treated_as_if_alone(
    combine: str, metric: str, value: float
) -> None:
    case, optimizer = build(combine, metric=metric, filter=GreedyFilter(keep=2))
    optimizer.backward(spoilt(case, [1, 4], value))
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == [1, 4]
    assert not selection.gram[[1, 4]].any()
    assert not selection.gram[:, [1, 4]].any()
    given = [p.grad for p in case.model.parameters()]

    alone_case, alone = build(metric=metric, filter=GreedyFilter(keep=2))
    others = torch.tensor([0, 2, 3, 5])
    alone.backward(lambda: alone_case.losses(others))
    assert alone.selection is not None
    assert selection.kept.tolist() == others[alone.selection.kept].tolist()
    torch.testing.assert_close(selection.weights, alone.selection.weights)
    torch.testing.assert_close(given, [p.grad for p in alone_case.model.parameters()])
    # Every layer has a rule and all are scored, so even without a usable graph the factors serve.
    assert selection.combine == "factors"


def test_a_loss_that_is_not_finite_rejects_although_the_gradient_would_be() -> None:
    case, optimizer = build()
    shift = torch.tensor([0.0, 0.0, math.nan, 0.0, math.inf, 0.0], dtype=torch.float64)
    optimizer.backward(lambda: case.losses() + shift)
    assert optimizer.selection is not None
    assert optimizer.selection.rejected.tolist() == [2, 4]


def test_a_share_counts_all_that_were_offered() -> None:
    case, optimizer = build(filter=TopKFilter(keep=0.5), target=lambda: case.losses())
    optimizer.backward(spoilt(case, [0], math.nan))
    assert optimizer.selection is not None
    assert len(optimizer.selection.kept) == 3


@pytest.mark.parametrize("accepts_rows", [True, False])
def test_graph_with_partial_rules_reruns_the_finite_rows_or_skips(accepts_rows: bool) -> None:
    case, optimizer = build("graph", scored=lambda name, p: name.startswith("last"))
    closure = spoilt(case, [1], math.nan)
    optimizer.backward((lambda rows=None: closure(rows)) if accepts_rows else (lambda: closure()))
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == [1]
    assert selection.combine == ("rerun" if accepts_rows else "skipped")
    assert selection.skipped != accepts_rows
    if accepts_rows:
        for name, parameter in case.model.named_parameters():
            torch.testing.assert_close(parameter.grad, combined(case, optimizer)[name])
    else:
        assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("combine", WAYS)
def test_all_rejected_skips_and_returns_nan(combine: str) -> None:
    case, optimizer = build(combine)
    before = snapshot(case, optimizer)
    loss = optimizer.step(spoilt(case, list(range(6)), math.nan))
    assert loss.isnan()
    assert optimizer.selection is not None
    assert optimizer.selection.skipped
    assert optimizer.selection.rejected.tolist() == list(range(6))
    torch.testing.assert_close(snapshot(case, optimizer)[0], before[0], rtol=0, atol=0)
    optimizer.step(case.losses)
    assert not optimizer.selection.skipped


BAD_TARGETS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "nan": (lambda case: case.target_losses() * math.nan, ValueError, "Expected finite target losses"),
    "nan gradient": (
        lambda case: (case.target_losses() * 0).sqrt(),
        ValueError,
        "Expected a finite target gradient",
    ),
    "reduced": (
        lambda case: case.target_losses().mean(),
        ValueError,
        r"shape \(m,\) with m > 0, got shape \(\)",
    ),
    "empty": (lambda case: case.target_losses()[:0], ValueError, r"got shape \(0,\)"),
    "detached": (lambda case: case.target_losses().detach(), ValueError, "do not detach"),
    "none": (lambda case: None, TypeError, "got NoneType"),
}


@pytest.mark.parametrize("bad", BAD_TARGETS)
def test_a_target_that_cannot_serve_is_an_error_that_changes_nothing(bad: str, unchanged: Callable[..., None]) -> None:
    make, error, message = BAD_TARGETS[bad]
    case, optimizer = build(target=lambda: make(case) if broken else case.target_losses())
    broken = True

    def failing() -> None:
        nonlocal broken
        with pytest.raises(error, match=message):
            optimizer.step(case.losses)
        broken = False

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("accepts_rows", [True, False])
def test_a_gradient_that_is_infinite_where_nothing_is_scored_is_never_applied(accepts_rows: bool) -> None:
    model = seeded(LateInfinity).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[2, 0] = 0.0

    def losses(rows: Tensor | None = None) -> Tensor:
        return model(x if rows is None else x[rows]).square().sum(1)

    before = copy.deepcopy(list(model.parameters()))
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(x[:1]).square().sum(1),
        filter=GreedyFilter(keep=1),
        scored=lambda name, p: name.startswith("last"),
        combine="graph",
    )
    optimizer.step(losses if accepts_rows else lambda: losses())
    selection = optimizer.selection
    assert selection is not None
    assert 2 not in selection.kept.tolist()
    assert selection.combine == ("rerun" if accepts_rows else "skipped")
    assert all(p.isfinite().all() for p in model.parameters())
    assert accepts_rows != torch.equal(next(model.parameters()), before[0])


def test_a_gradient_whose_square_is_not_finite_is_rejected() -> None:
    case = mlp(torch.float32, 6)
    factor = torch.ones(6)
    factor[3] = 1e25
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(case.model.parameters(), lr=0.1), case.model, case.target_losses, metric="euclidean"
    )
    optimizer.step(lambda: factor * case.losses())
    assert optimizer.selection is not None
    assert optimizer.selection.rejected.tolist() == [3]
    assert not optimizer.selection.skipped
