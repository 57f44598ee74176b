"""Hooks for those who measure: one parameter's Gram matrix, and what a step forms its own from."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import Diagonal, Factors, GreedyFilter, Preconditioner, RankOne, Scalar, SelectiveOptimizer, Sketch
from ftw_optim.testing import Buffer, products_of, recorded
from tests.support.factors import random_factors
from tests.support.models import Case, mlp
from tests.support.oracles import gradients

ROWS, COLUMNS, N = 6, 4, 3
SOME_MAPS: dict[str, Preconditioner] = {
    "scalar": Scalar(0.3),
    "rank one": RankOne(torch.linspace(0.1, 1, ROWS).double(), torch.linspace(1, 2, COLUMNS).double()),
    "diagonal": Diagonal(torch.linspace(0.1, 1, ROWS * COLUMNS).double().view(ROWS, COLUMNS)),
}


def uses() -> list[Factors]:
    return [random_factors("dense", grid=(N, 5), rows=ROWS, columns=COLUMNS, seed=seed) for seed in (1, 2)]


def target() -> Tensor:
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------- of one parameter


@pytest.mark.parametrize("way", [None, "tokens", "materialised"])
@pytest.mark.parametrize("preconditioner", SOME_MAPS.values(), ids=SOME_MAPS)
def test_products_are_those_of_whole_gradients(preconditioner: Preconditioner, way: str | None) -> None:
    found = products_of(uses(), target(), preconditioner, way=way)
    whole = sum(map(gradients, uses()))
    moved = preconditioner.apply(whole)
    torch.testing.assert_close(found.gram, torch.einsum("irc,jrc->ij", whole, moved))
    torch.testing.assert_close(found.cross_gram, torch.einsum("irc,rc->i", moved, target()))
    assert found.target_energy == pytest.approx(float((target() * preconditioner.apply(target())).sum()))
    assert found.error == 0.0
    if way is not None:
        assert found.way == ("materialised" if isinstance(preconditioner, Diagonal) else way)


@pytest.mark.parametrize("preconditioner", SOME_MAPS.values(), ids=SOME_MAPS)
def test_a_sketch_is_near_the_exact_products_and_says_how_near(preconditioner: Preconditioner) -> None:
    exact = products_of(uses(), target(), preconditioner).gram
    norms = exact.diagonal().sqrt()
    for way in ("convolved", "materialised"):
        found = products_of(uses(), target(), preconditioner, gram=Sketch(dim=4096), way=way)
        assert found.way == ("materialised" if isinstance(preconditioner, Diagonal) else way)
        assert 0 < found.error < 0.1
        assert float(((found.gram - exact) / norms / norms[:, None]).abs().max()) < 0.1
        other = products_of(uses(), target(), preconditioner, gram=Sketch(dim=4096), way=way, seed=1)
        assert not torch.equal(found.gram, other.gram)


def test_the_way_that_costs_least_is_taken_where_none_is_asked_for() -> None:
    for t, expected in ((1, "tokens"), (64, "materialised")):
        factors = random_factors("dense", grid=(4, t), rows=64, columns=64, seed=0)
        assert products_of(factors, torch.zeros(64, 64).double(), Scalar(1.0)).way == expected


def test_neither_the_memory_limit_nor_a_buffer_of_the_callers_changes_anything() -> None:
    expected, buffer = products_of(uses(), target(), SOME_MAPS["diagonal"]).gram, Buffer()
    for options in ({"memory_limit": 1}, {"buffer": buffer}, {"buffer": buffer}):
        torch.testing.assert_close(products_of(uses(), target(), SOME_MAPS["diagonal"], **options).gram, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": "convolved"}, "way must be None or one of 'materialised', 'tokens', got 'convolved'"),
        ({"way": "tokens", "gram": Sketch()}, "way must be None or one of 'materialised', 'convolved', got 'tokens'"),
        ({"metric": "hyperbolic"}, "metric must be one of .*, got 'hyperbolic'"),
        ({"gram": "sketch"}, "gram must be \"exact\" or a Sketch, got 'sketch'"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        products_of(uses(), target(), Scalar(1.0), **options)


# ---------------------------------------------------------------------- of a step


def built(**options: Any) -> tuple[Case, SelectiveOptimizer]:
    case = mlp(torch.float64, 8)
    inner = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    return case, SelectiveOptimizer(inner, case.model, case.target_losses, filter=GreedyFilter(keep=3), **options)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_the_gram_matrix_is_the_sum_of_the_recorded_shares(combine: str, scale: float) -> None:
    case, optimizer = built(combine=combine)
    optimizer.step(case.losses)
    with recorded(optimizer) as shares:
        optimizer.backward(case.losses, grad_scale=scale)
    assert {share.name for share in shares} == {name for name, _ in case.model.named_parameters()}
    gram = torch.zeros(8, 8, dtype=torch.float64)
    for share in shares:
        whole = sum(map(gradients, share.factors)).reshape(8, *share.shape)
        gram += whole.flatten(1) @ share.preconditioner.apply(whole).flatten(1).T
        torch.testing.assert_close(share.reference, whole.mean(0))
    assert optimizer.selection is not None
    torch.testing.assert_close(optimizer.selection.gram, gram)


def test_a_sketch_records_every_micro_batch() -> None:
    case, optimizer = built(combine="rerun", gram=Sketch(dim=64))

    def batches(rows: Tensor | None = None) -> Any:
        if rows is not None:
            return case.losses(rows)
        return (case.losses(part) for part in torch.arange(8).split(4))

    with recorded(optimizer) as shares:
        optimizer.backward(batches)
    names = [name for name, _ in case.model.named_parameters()]
    assert sorted(share.name for share in shares) == sorted(2 * names)
    assert {share.factors[0].count for share in shares} == {4}


def test_a_step_that_is_recorded_is_the_same_step() -> None:
    results = []
    for watched in (False, True):
        case, optimizer = built()
        for _ in range(3):
            if watched:
                with recorded(optimizer):
                    optimizer.step(case.losses)
            else:
                optimizer.step(case.losses)
        results.append(list(case.model.parameters()))
    assert all(map(torch.equal, *results))


def test_nothing_is_left_behind() -> None:
    case, optimizer = built()
    before = set(vars(optimizer))

    def broken() -> Tensor:
        raise LookupError

    with pytest.raises(LookupError), recorded(optimizer) as shares:
        optimizer.step(broken)
    assert set(vars(optimizer)) == before
    optimizer.step(case.losses)
    assert not shares


def test_copies_and_pickles_do_not_record() -> None:
    case, optimizer = built()
    with recorded(optimizer) as shares:
        for model, twin in (
            copy.deepcopy((case.model, optimizer)),
            pickle.loads(pickle.dumps((case.model, optimizer))),
        ):
            other = Case(**{**vars(case), "model": model})
            twin.target = other.target_losses
            twin.step(other.losses)
    assert not shares


def test_only_an_optimizer_that_is_not_being_recorded_is_taken() -> None:
    _, optimizer = built()
    with pytest.raises(TypeError, match=r"Expected a SelectiveOptimizer, got AdamW"), recorded(optimizer.optimizer):  # type: ignore[arg-type]
        pass
    with recorded(optimizer), pytest.raises(RuntimeError, match="not being recorded"), recorded(optimizer):
        pass
