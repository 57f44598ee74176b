"""Weight stages: the formulas against scipy; never worse than uniform, never better than fitting all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import GreedyFilter, Matching, NonNegativeLeastSquares, UniformWeights, WeightStage, solve_nnls
from tests.support.oracles import fit_from_vectors, objective
from tests.support.strategies import Problem, problems, random_problem

STAGES = {
    "fitted": NonNegativeLeastSquares(),
    "ridge": NonNegativeLeastSquares(ridge=0.1),
    "anchored": NonNegativeLeastSquares(anchor=0.2),
    "uniform": UniformWeights(),
}


@given(problem=problems())
def test_without_damping_the_weights_are_those_of_the_plain_solver(problem: Problem) -> None:
    matching = problem.matching()
    fitted = NonNegativeLeastSquares()(matching)
    plain = solve_nnls(matching.gram, matching.cross_gram)
    assert fitted.converged
    torch.testing.assert_close(
        fitted.weights @ problem.vectors / problem.target.norm(),
        plain.weights @ problem.vectors / problem.target.norm(),
        rtol=0,
        atol=1e-6,
    )


@settings(max_examples=50)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_fitted_weights_are_never_worse_than_uniform_ones_nor_better_than_fitting_all(
    problem: Problem, seed: int
) -> None:
    matching = problem.matching()
    kept = GreedyFilter(keep=5)(matching)
    block = matching.restrict(kept)
    energy = matching.target_energy

    def value(weights: Tensor) -> float:
        return objective(block.gram, block.cross_gram, weights) / energy

    fitted = value(NonNegativeLeastSquares()(block).weights)
    all_weights = fit_from_vectors(problem.vectors, problem.target)
    assert fitted >= objective(matching.gram, matching.cross_gram, all_weights) / energy - 1e-9
    draws = torch.rand(8, len(kept), generator=torch.Generator().manual_seed(seed)) < 0.5
    for subset in draws.double():
        # 1e-14: the objective is a difference of numbers of the size of the target energy.
        assert fitted <= value(subset / subset.sum().clamp(min=1)) + 1e-14


@pytest.mark.parametrize(("ridge", "anchor"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.3, 0.7), (10.0, 1e-6)])
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (6, None), (6, 2), (30, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
def test_ridge_and_anchor_solve_the_damped_system(
    ridge: float, anchor: float, n: int, rank: int | None, scale: float
) -> None:
    """As least squares: below the vectors, ``sqrt(damping d) I``, whose target pulls to ``1 / k`` each."""
    problem = random_problem(n, 20, seed=n, rank=rank)
    problem = Problem(vectors=problem.vectors * scale, target=problem.target * scale)
    unit = float(problem.lengths.square().mean()) / scale**2
    damping = ridge + anchor
    below = (damping * unit) ** 0.5 * torch.eye(n, dtype=torch.float64)
    goal = torch.full((n,), anchor * unit / n, dtype=torch.float64) / (damping * unit or 1.0) ** 0.5
    expected, _ = scipy.optimize.nnls(
        torch.cat([problem.vectors.T / scale, below]).numpy(),
        torch.cat([problem.target / scale, goal]).numpy(),
    )
    matching = problem.matching()
    solution = NonNegativeLeastSquares(ridge=ridge, anchor=anchor)(matching)
    assert solution.converged
    # Dependent candidates without damping: only the combination is unique.
    seen = torch.eye(n, dtype=torch.float64) if damping else problem.vectors / scale
    torch.testing.assert_close(solution.weights @ seen, torch.from_numpy(expected) @ seen, rtol=1e-8, atol=1e-8)
    d = matching.gram.diagonal().mean()
    damped_gram = matching.gram + damping * d * torch.eye(n, dtype=torch.float64)
    slack = matching.cross_gram + anchor * d / n - damped_gram @ solution.weights
    torch.testing.assert_close(solution.slack, slack, rtol=0, atol=1e-12 * float(d))


def test_a_strong_anchor_gives_uniform_weights_and_a_strong_ridge_small_ones() -> None:
    matching = random_problem(5, 8, seed=0).matching()
    anchored = NonNegativeLeastSquares(anchor=1e8)(matching).weights
    torch.testing.assert_close(anchored, torch.full((5,), 0.2).double(), rtol=1e-6, atol=0)
    damped = NonNegativeLeastSquares(ridge=1e8)(matching).weights
    free = matching.cross_gram.clamp(min=0) / (1e8 * matching.gram.diagonal().mean())
    torch.testing.assert_close(damped, free, rtol=1e-6, atol=0)


def test_duplicates_share_their_weight_where_it_is_damped() -> None:
    problem = random_problem(2, 8, seed=0)
    matching = Problem(vectors=problem.vectors[[0, 0, 1]], target=problem.target).matching()
    weights = NonNegativeLeastSquares(ridge=0.01)(matching).weights
    assert weights[0] > 0
    torch.testing.assert_close(weights[0], weights[1])


def test_damping_keeps_the_precision_that_the_matrix_came_in() -> None:
    """The damped system is float64, yet two float32 candidates apart by 1e-7 are still the same."""
    generator = torch.Generator().manual_seed(0)
    matching = Matching(
        gram=torch.tensor([[1.0, 1 - 1e-7], [1 - 1e-7, 1.0]]),
        cross_gram=torch.tensor([1.0, 1.0]),
        target_energy=1.0,
        losses=torch.ones(2),
        generator=generator,
    )
    for ridge in (0.0, 1e-12):
        solution = NonNegativeLeastSquares(ridge=ridge)(matching)
        assert solution.converged
        torch.testing.assert_close(solution.weights, torch.tensor([1.0, 0.0]).double())


def test_a_target_that_only_rounding_points_to_gets_no_weight() -> None:
    """float32: a product of 1e-8 between vectors of length one is what orthogonal ones have too."""
    orthogonal = Problem(vectors=torch.eye(3).double(), target=torch.ones(3).double())
    matching = replace(
        orthogonal.matching(torch.float32), cross_gram=torch.tensor([1e-8, -1e-8, 2e-8]), target_energy=1.0
    )
    solution = NonNegativeLeastSquares()(matching)
    assert solution.converged
    assert not solution.weights.any()


@pytest.mark.parametrize("k", [1, 2, 7])
def test_uniform_weights_are_one_over_k_with_the_slack_they_leave(k: int) -> None:
    matching = random_problem(k, 5, seed=k).matching(torch.float32)
    solution = UniformWeights()(matching)
    expected = torch.full((k,), 1 / k).double()
    torch.testing.assert_close(solution.weights, expected)
    torch.testing.assert_close(solution.slack, matching.cross_gram.double() - matching.gram.double() @ expected)
    assert solution.converged
    assert solution.iterations == 0


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_no_candidates_get_no_weights(stage: WeightStage) -> None:
    matching = random_problem(3, 4, seed=0).matching().restrict(torch.empty(0, dtype=torch.int64))
    solution = stage(matching)
    assert solution.weights.shape == solution.slack.shape == (0,)
    assert solution.weights.dtype == torch.float64
    assert solution.converged


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_zero_gradients_are_no_error(stage: WeightStage) -> None:
    matching = Problem(vectors=torch.zeros(3, 4).double(), target=torch.ones(4).double()).matching()
    solution = stage(matching)
    assert solution.converged
    assert solution.weights.isfinite().all()


def test_weights_are_normalised_by_their_sum_unless_told_otherwise() -> None:
    assert UniformWeights().normalize == NonNegativeLeastSquares().normalize == "sum"
    assert NonNegativeLeastSquares(normalize="norm").normalize == "norm"
    assert NonNegativeLeastSquares(normalize=None).normalize is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ridge", -0.1),
        ("ridge", float("nan")),
        ("ridge", float("inf")),
        ("anchor", -0.1),
        ("anchor", float("nan")),
        ("anchor", float("inf")),
        ("tol", 0.0),
        ("tol", 1.0),
        ("tol", float("nan")),
        ("normalize", "max"),
        ("normalize", True),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        NonNegativeLeastSquares(**{name: value})  # type: ignore[arg-type]
