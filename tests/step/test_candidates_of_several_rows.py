"""Candidates that are several rows of the model's input each: products and gradients of whole candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import NonNegativeLeastSquares, SelectiveOptimizer, Sketch
from tests.support.checks import check_against_oracle, optimizer_of, training_on_target
from tests.support.grids import grid, slow
from tests.support.models import CASES, in_batches, precision, trained
from tests.support.pairs import pair_ids, pairs

N = 5


@pytest.mark.parametrize(
    ("name", "combine"),
    grid(
        CASES,
        ["factors", "graph", "rerun"],
        fast=lambda name, combine: name in ("mlp", "small-gpt") or (name, combine) == ("llama-lora", "factors"),
    ),
)
def test_a_step_beside_gradients_of_pairs_formed_one_at_a_time(name: str, combine: str) -> None:
    with precision(torch.float64):
        case = pairs(name, N)
        optimizer = optimizer_of(case, combine=combine)
        for _ in range(2):
            check_against_oracle(case, optimizer, torch.float64, sample_ids=pair_ids(N))
            optimizer.step()


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
@pytest.mark.parametrize("name", ["small-gpt", slow("llama-lora"), slow("gpt2-tied")])
def test_large_factors_stay_where_they_are(name: str, combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftw_optim._factors.row_groups.certainly_small", lambda size: False)
    with precision(torch.float64):
        case = pairs(name, N)
        check_against_oracle(case, optimizer_of(case, combine=combine), torch.float64, sample_ids=pair_ids(N))


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("sizes", [[2, 3], [1, 4], [5]])
def test_each_micro_batch_of_pairs_counts_its_own(combine: str, sizes: list[int]) -> None:
    case = pairs("small-gpt", N)
    optimizer = optimizer_of(case, combine=combine)
    told = [pair_ids(size) for size in sizes]
    check_against_oracle(case, optimizer, torch.float64, closure=in_batches(case, sizes), sample_ids=told)


@pytest.mark.parametrize("options", [{}, {"gram": Sketch(dim=64)}, {"metric": "update", "combine": "graph"}])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_target_pairs_take_part(options: dict[str, Any], scale: float) -> None:
    """As where each half has a call of its own, whose rows are the pairs without being told."""
    found = []
    for at_once in (True, False):
        case = pairs("small-gpt", N, at_once=at_once)
        optimizer = training_on_target(case, weight=NonNegativeLeastSquares(anchor=0.3), **options)
        told: dict[str, Any] = {"sample_ids": pair_ids(N), "target_sample_ids": pair_ids(3)} if at_once else {}
        optimizer.backward(case.losses, grad_scale=scale, **told)
        selection = optimizer.selection
        assert selection is not None
        parts = [selection.gram, selection.cross_gram, selection.target_losses, selection.weights]
        gradients = [p.grad for p in trained(case).values()]
        found.append([*parts, selection.target_weights, *gradients])
        assert len(selection.target_losses) == 3
        assert selection.target_weights.any()
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9 * scale)


@pytest.mark.parametrize("combine", ["rerun", slow("graph"), slow("factors")])
def test_a_sketch_of_micro_batches_of_pairs(combine: str) -> None:
    """As where each half has a call of its own."""
    found = []
    for at_once in (True, False):
        case = pairs("small-gpt", N, at_once=at_once)
        optimizer = optimizer_of(case, combine=combine, gram=Sketch(dim=256))
        told: dict[str, Any] = {"sample_ids": [pair_ids(2), pair_ids(3)]} if at_once else {}
        optimizer.backward(in_batches(case, [2, 3]), **told)
        selection = optimizer.selection
        assert selection is not None
        gradients = [p.grad for p in trained(case).values()]
        found.append([selection.gram, selection.cross_gram, selection.weights, *gradients])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_a_pair_with_a_loss_that_is_not_finite_is_rejected() -> None:
    case = pairs("small-gpt", N)
    optimizer = optimizer_of(case)

    def losses() -> Tensor:
        return case.losses() * torch.tensor([1.0, torch.nan, 1.0, torch.inf, 1.0])

    optimizer.backward(losses, sample_ids=pair_ids(N))
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == [1, 3]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(case).values())


def refused(ids: Any, message: str, *, closure: Any = None, error: type[Exception] = ValueError) -> None:
    case = pairs("mlp", N)
    optimizer = optimizer_of(case)
    before = [p.detach().clone() for p in case.model.parameters()]
    with pytest.raises(error, match=message):
        optimizer.backward(closure or case.losses, sample_ids=ids)
    assert all(p.grad is None for p in case.model.parameters())
    torch.testing.assert_close(list(case.model.parameters()), before, rtol=0, atol=0)
    assert isinstance(optimizer, SelectiveOptimizer)
    assert optimizer.selection is None


def test_rows_that_do_not_fit_are_refused() -> None:
    refused(torch.arange(N), "one entry for each of the 10 rows of the model's input, got 5")
    refused(pair_ids(N) + 1, "each number from 0 to 4.*got 5 different numbers from 1 to 5")
    refused(pair_ids(N).clamp(max=3), "each number from 0 to 4.*got 4 different numbers from 0 to 3")
    refused(pair_ids(N) - 2, "each number from 0 to 4.*got 5 different numbers from -2 to 2")
    refused(
        pair_ids(N).double(), r"int64 of the token grid's shape \(b, t\) or of the rows \(r,\) of the model's input"
    )
    refused(pair_ids(N).view(1, 2, N), r"int64 of the token grid's shape")


def test_pairs_that_are_told_in_another_order_are_found_out() -> None:
    refused(torch.arange(N).repeat_interleave(2), "Self-check", error=RuntimeError)


def test_rows_are_not_taken_for_candidates_unless_they_are_told() -> None:
    refused(None, "returned 5 losses, but the model ran on 10 rows")
