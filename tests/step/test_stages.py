"""Filter and weight stages, also of the user's own: what they get, and what they may return."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import (
    GreedyFilter,
    Matching,
    NonNegativeLeastSquares,
    SelectiveOptimizer,
    TopKFilter,
    UniformWeights,
    WeightSolution,
    last_blocks,
)
from tests.support.models import SmallGPT, language_model, seeded
from tests.support.steps import build

pytestmark = pytest.mark.usefixtures("fixed_seed")


def test_stages_get_further_metrics_and_one_seed_for_each_step() -> None:
    draws: list[float] = []

    class Both(GreedyFilter.__mro__[1]):  # type: ignore[misc]  # FilterStage
        metrics = ("update", "euclidean")

        def __call__(self, matching: Matching, *more: Matching) -> Tensor:
            draws.append(float(torch.rand((), generator=matching.generator)))
            assert len(more) == 2
            assert not torch.equal(matching.gram, more[1].gram)
            return torch.tensor([2, 0])

    class First:
        def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
            assert len(matching) == 2
            return WeightSolution(weights=torch.tensor([3.0, 1.0]), slack=torch.zeros(2), iterations=1, converged=False)

    for _ in range(2):
        case, optimizer = build(filter=Both(), weight=First(), seed=11)
        for _ in range(2):
            optimizer.step(case.losses)
        selection = optimizer.selection
        assert selection is not None
        assert selection.kept.tolist() == [2, 0]
        assert selection.weights.tolist() == [0.75, 0.25]
        assert selection.fitted_scale == 4.0
        assert not selection.converged
        assert selection.effective_size == pytest.approx(1.6)
    assert draws[:2] == draws[2:]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    ("kept", "weights", "message"),
    [
        (torch.tensor([0, 0]), torch.ones(2), "different indices"),
        (torch.tensor([9]), torch.ones(1), "different indices"),
        (torch.tensor([0.5]), torch.ones(1), "int64"),
        (torch.tensor([1, 2]), torch.tensor([1.0, -0.1]), "finite weights >= 0"),
        (torch.tensor([1, 2]), torch.tensor([1.0, math.nan]), "finite weights >= 0"),
        (torch.tensor([1, 2]), torch.ones(3), "2 finite weights"),
    ],
)
def test_stages_that_return_nonsense_are_told_so(
    kept: Tensor, weights: Tensor, message: str, unchanged: Callable[..., None]
) -> None:
    case, optimizer = build()
    good = (optimizer.filter, optimizer.weight)

    def failing() -> None:
        optimizer.filter = lambda matching: kept  # type: ignore[assignment]
        optimizer.weight = lambda matching: WeightSolution(  # type: ignore[assignment]
            weights=weights, slack=weights, iterations=0, converged=True
        )
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.step(case.losses)
        optimizer.filter, optimizer.weight = good

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("normalize", ["sum", "norm", None])
def test_normalisation(normalize: Any) -> None:
    case, optimizer = build(weight=NonNegativeLeastSquares(normalize=normalize))
    optimizer.backward(case.losses)
    selection = optimizer.selection
    assert selection is not None
    weights, gram = selection.weights, selection.gram
    if normalize == "sum":
        assert float(weights.sum()) == pytest.approx(1.0)
    elif normalize == "norm":
        block = gram[selection.kept][:, selection.kept]
        assert float(weights @ block @ weights) == pytest.approx(float(gram.mean()))
    else:
        assert float(weights.sum()) == pytest.approx(selection.fitted_scale)
    cross = selection.cross_gram[selection.kept]
    curvature = float(weights @ gram[selection.kept][:, selection.kept] @ weights)
    assert selection.predicted_decrease == pytest.approx(float(cross @ weights) - curvature / 2)


def test_small_memory_limits_change_nothing_but_memory() -> None:
    results = []
    for limit in (None, 1):
        case, optimizer = build(memory_limit=limit)
        optimizer.step(case.losses)
        results.append([*case.model.parameters()])
    torch.testing.assert_close(*results)


def test_uniform_weights_and_scored_blocks_go_with_any_stage() -> None:
    case = language_model(seeded(SmallGPT).double(), 5)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()),
        case.model,
        case.target_losses,
        filter=TopKFilter(keep=2),
        weight=UniformWeights(),
        scored=last_blocks(case.model, 1),
    )
    optimizer.step(case.losses)
    assert optimizer.selection is not None
    assert optimizer.selection.weights.tolist() == [0.5, 0.5]
    scored = {row.name for row in optimizer.coverage if row.scored}
    assert scored == {name for name, _ in case.model.named_parameters() if name.startswith("blocks.1")}
