"""Weights that the comparison tries: what each of them solves, and what it does where scores say nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import Matching

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pays.weights import HorizonWeights, TiltedWeights, on_simplex


def matching(gram: Tensor, cross_gram: Tensor) -> Matching:
    return Matching(
        gram=gram,
        cross_gram=cross_gram,
        target_energy=1.0,
        losses=torch.zeros(len(gram)),
        generator=torch.Generator(),
    )


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_the_nearest_point_of_the_simplex(values: list[float]) -> None:
    given = torch.tensor(values, dtype=torch.float64)
    found = on_simplex(given)
    assert float(found.sum()) == pytest.approx(1.0)
    assert bool((found >= 0.0).all())
    below = (given - found)[found > 1e-12]  # the same for all that are positive, and no more for the others
    assert float(below.max() - below.min()) < 1e-9
    assert bool((given - found <= below.max() + 1e-9).all())


@given(seed=st.integers(0, 1000), n=st.integers(1, 9), horizon=st.sampled_from([0.0, 1.0, 3.0, 30.0]))
def test_weights_over_a_horizon_are_the_least_on_the_simplex(seed: int, n: int, horizon: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 20, dtype=torch.float64, generator=generator)
    gram, cross_gram = rows @ rows.T, rows @ torch.randn(20, dtype=torch.float64, generator=generator)
    solution = HorizonWeights(horizon=horizon)(matching(gram, cross_gram))
    weights = solution.weights
    assert solution.converged
    assert float(weights.sum()) == pytest.approx(1.0)
    slope = gram @ weights - horizon * cross_gram
    least, size = slope[weights > 1e-9].min(), float(gram.diagonal().max())
    assert bool((slope >= least - 1e-6 * size).all())
    assert float(slope[weights > 1e-6].max() - least) < 1e-4 * size


def test_gradients_that_vanish_are_weighed_alike() -> None:
    weights = HorizonWeights()(matching(torch.zeros(3, 3), torch.zeros(3))).weights
    assert weights.tolist() == pytest.approx([1 / 3] * 3)


def test_the_tilt_is_as_strong_as_scores_are_reliable() -> None:
    generator = torch.Generator().manual_seed(0)

    def products(size: float) -> Tensor:
        kinds = size * torch.tensor([1.0, -1.0] * 6)
        noise = torch.randn(12, 4, generator=generator)
        return (kinds[:, None] + torch.randn(4, generator=generator) + noise).double()

    stage = TiltedWeights(strength=1.25)
    shares = {}
    for size in (0.0, 3.0):
        found = [stage.tilt(products(size)) for _ in range(100)]
        shares[size] = sum(float(one[1::2].sum() / one.sum()) for one in found) / len(found)
    assert shares[0.0] == pytest.approx(0.5, abs=0.03)
    assert shares[3.0] < 0.02
    assert stage.tilt(torch.ones(5, 3)).tolist() == [1.0] * 5
    assert stage.tilt(torch.full((5, 3), torch.nan)).tolist() == [1.0] * 5


def test_target_rows_that_only_guide_get_no_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(8, 30, dtype=torch.float64, generator=generator)
    gram = rows @ rows.T
    error = torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64)
    one = Matching(
        gram=gram,
        cross_gram=gram[:, 5:].mean(1),
        target_energy=1.0,
        losses=torch.zeros(8),
        generator=torch.Generator(),
        cross_gram_error=error,
    )
    weights = TiltedWeights()(one).weights
    assert weights[5:].tolist() == [0.0] * 3
    assert float(weights[:5].sum()) > 0.0
