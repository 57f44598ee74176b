"""Non-negative least squares: against scipy, by its optimality conditions, at any rank and scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import solve_nnls
from ftw_optim._matching.nnls import damped
from tests.support.optimality import EPS, assert_optimal
from tests.support.oracles import fit_from_vectors, objective
from tests.support.strategies import Problem, problems, random_problem


def problem(vectors: list[list[float]], target: list[float]) -> Problem:
    return Problem(vectors=torch.tensor(vectors, dtype=torch.float64), target=torch.tensor(target, dtype=torch.float64))


PROBLEMS = {
    "one candidate": problem([[1.0, 2.0]], [1.0, 1.0]),
    "one candidate that points away": problem([[1.0, 2.0]], [-1.0, -1.0]),
    "one zero gradient": problem([[0.0, 0.0]], [1.0, 1.0]),
    "a zero gradient among others": problem([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], [2.0, 1.0]),
    "a zero target": problem([[1.0, 0.0], [1.0, 1.0]], [0.0, 0.0]),
    "a target orthogonal to all": problem([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [0.0, 0.0, 1.0]),
    "duplicates": problem([[1.0, 2.0], [1.0, 2.0], [0.5, 0.1], [0.5, 0.1]], [1.0, 1.0]),
    "a tie of three around the target": problem([[1.0, 0.5], [1.0, -0.5], [1.0, 0.0]], [1.0, 0.0]),
    "opposed candidates": problem([[1.0, 2.0], [-1.0, -2.0], [0.5, 0.1]], [1.0, 1.0]),
    "one in the way of two": problem([[1.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [1.0, 0.9, 0.0]),
    "deficient rank": random_problem(20, 30, seed=0, rank=5),
    "more candidates than dimensions": random_problem(40, 7, seed=1),
    "lengths from 1e-10 to 1e10": random_problem(20, 30, seed=2, decades=10),
    "deficient rank, lengths from 1e-10 to 1e10": random_problem(40, 30, seed=3, rank=8, decades=10),
}

UNBOUNDED = {
    "opposed candidates, both wanted": ([[1.0, -1.0], [-1.0, 1.0]], [1.0, 1.0], [1.0, 0.0]),
    "no length, yet wanted": ([[0.0]], [1.0], [0.0]),
    "no length, yet wanted, beside another": ([[0.0, 0.0], [0.0, 2.0]], [1e-30, 1.0], [0.0, 0.5]),
    "three that cancel, all wanted": (
        [[1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [-1.0, -1.0, 2.0]],
        [1.0, 1.0, 1.0],
        [3.0, 0.0, 2.0],
    ),
    "an indefinite matrix": ([[1.0, -2.0], [-2.0, 1.0]], [1.0, 0.5], [1.0, 0.0]),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_weights_satisfy_the_optimality_conditions(problem: Problem) -> None:
    matching = problem.matching()
    assert_optimal(solve_nnls(matching.gram, matching.cross_gram), matching.gram, matching.cross_gram)


@given(problem=problems())
def test_weights_satisfy_the_optimality_conditions_at_any_rank_and_scale(problem: Problem) -> None:
    matching = problem.matching()
    assert_optimal(solve_nnls(matching.gram, matching.cross_gram), matching.gram, matching.cross_gram)


def assert_as_low_as_scipy(problem: Problem) -> None:
    matching = problem.matching()
    gram, cross_gram = matching.gram, matching.cross_gram
    solution = solve_nnls(gram, cross_gram)
    theirs = objective(gram, cross_gram, fit_from_vectors(problem.vectors, problem.target))
    rounding = 4 * len(problem) * EPS * gram.abs().max() * solution.weights.sum() ** 2
    allowed = 1e-9 * cross_gram @ solution.weights + rounding
    assert solution.converged
    assert objective(gram, cross_gram, solution.weights) <= theirs + float(allowed)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 33, 100, 256])
@pytest.mark.parametrize("rank", [1, 7, 100, None], ids=lambda rank: f"rank {rank}")
@pytest.mark.parametrize("decades", [0.0, 4.0])
def test_the_objective_is_as_low_as_scipy_finds_it(k: int, rank: int | None, decades: float) -> None:
    assert_as_low_as_scipy(random_problem(k, 300, seed=k, rank=rank, decades=decades))


@given(problem=st.sampled_from([1e-2, 1e-4]).flatmap(lambda apart: problems(max_candidates=16, apart=apart)))
def test_the_objective_is_as_low_as_scipy_finds_it_whatever_the_trouble(problem: Problem) -> None:
    assert_as_low_as_scipy(problem)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_candidates_of_positive_weight_are_linearly_independent(problem: Problem) -> None:
    matching = problem.matching()
    weights = solve_nnls(matching.gram, matching.cross_gram).weights
    used = problem.vectors[weights > 0]
    assert torch.linalg.matrix_rank(used / used.norm(dim=1, keepdim=True)) == len(used)


@pytest.mark.parametrize(("gram", "cross_gram", "expected"), UNBOUNDED.values(), ids=UNBOUNDED)
def test_without_a_minimum_the_weights_stay_bounded_and_are_not_called_converged(
    gram: list[list[float]], cross_gram: list[float], expected: list[float]
) -> None:
    solution = solve_nnls(torch.tensor(gram).double(), torch.tensor(cross_gram).double())
    assert not solution.converged
    torch.testing.assert_close(solution.weights, torch.tensor(expected).double())


@given(problem=problems(), push=st.floats(0.01, 100.0), seed=st.integers(0, 2**31))
def test_products_that_no_target_has_never_make_weights_grow_without_bound(
    problem: Problem, push: float, seed: int
) -> None:
    """Cross products outside the range of the Gram matrix: a minimum may or may not exist."""
    matching = problem.matching()
    lengths = problem.lengths
    noise = torch.randn(len(problem), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cross_gram = matching.cross_gram + push * noise * lengths * problem.target.norm()
    solution = solve_nnls(matching.gram, cross_gram)
    assert (solution.weights >= 0).all()
    # Nearly dependent candidates ask for large weights; dependent ones, divided by rounding, for 1e15.
    largest = (cross_gram.abs() / lengths.clamp(min=1e-300)).max()
    assert (solution.weights * lengths).sum() <= 1e12 * largest
    if solution.converged:
        assert_optimal(solution, matching.gram, cross_gram)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_of_two_duplicates_the_one_with_the_larger_product_takes_all_the_weight(order: list[int]) -> None:
    gram, cross_gram = torch.ones(2, 2).double(), torch.tensor([1.0, 1.5]).double()[order]
    solution = solve_nnls(gram, cross_gram)
    assert solution.converged
    torch.testing.assert_close(solution.weights, torch.tensor([0.0, 1.5]).double()[order])


def test_a_dependent_candidate_takes_the_place_of_those_it_replaces() -> None:
    """Candidate 2 is half the sum of the others, and its product is larger than half the sum of theirs."""
    gram = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.5, 0.5, 0.5]]).double()
    cross_gram = torch.tensor([1.0, 1.0, 1.01]).double()
    solution = solve_nnls(gram, cross_gram)
    assert solution.converged
    assert_optimal(solution, gram, cross_gram)
    torch.testing.assert_close(solution.weights, torch.tensor([0.0, 0.0, 2.02]).double())


def _assert_powers_pass_exactly(problem: Problem, power: int) -> None:
    matching = problem.matching()
    gram, cross_gram, two = matching.gram, matching.cross_gram, 2.0**power
    plain = solve_nnls(gram, cross_gram)
    longer_candidates = solve_nnls(gram * two**2, cross_gram * two)
    longer_target = solve_nnls(gram, cross_gram * two)
    torch.testing.assert_close(longer_candidates.weights, plain.weights / two, rtol=0, atol=0)
    torch.testing.assert_close(longer_target.weights, plain.weights * two, rtol=0, atol=0)
    assert plain.iterations == longer_candidates.iterations == longer_target.iterations


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("power", [-30, -1, 7, 40])
def test_powers_of_two_pass_through_without_rounding(problem: Problem, power: int) -> None:
    _assert_powers_pass_exactly(problem, power)


@settings(max_examples=50)
@given(problem=problems(), power=st.integers(-40, 40))
def test_powers_of_two_pass_through_without_rounding_at_any_rank_and_scale(problem: Problem, power: int) -> None:
    _assert_powers_pass_exactly(problem, power)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_slack_is_what_the_weights_leave_of_the_products(problem: Problem) -> None:
    matching = problem.matching()
    solution = solve_nnls(matching.gram, matching.cross_gram)
    torch.testing.assert_close(solution.slack, matching.cross_gram - matching.gram @ solution.weights, rtol=0, atol=0)


def test_a_short_candidate_counts_as_much_as_a_long_one() -> None:
    """Each is the only one to know its direction, and the short one's product is 1e-20 of the long one's."""
    solution = solve_nnls(torch.diag(torch.tensor([1e20, 1e-20]).double()), torch.tensor([1e10, 1e-10]).double())
    torch.testing.assert_close(solution.weights, torch.tensor([1e-10, 1e10]).double())


@pytest.mark.parametrize(("tol", "used"), [(1e-10, True), (1e-3, False)])
def test_slack_within_the_tolerance_is_left_alone(tol: float, used: bool) -> None:
    """Two duplicates and one orthogonal candidate, whose product is 1e-4 of theirs."""
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    solution = solve_nnls(gram, torch.tensor([1.0, 1.0, 1e-4]).double(), tol=tol)
    assert solution.converged
    assert bool(solution.weights[2] > 0) is used


def test_an_empty_system_has_an_empty_solution() -> None:
    solution = solve_nnls(torch.empty(0, 0), torch.empty(0))
    assert solution.weights.shape == solution.slack.shape == (0,)
    assert solution.converged
    assert solution.iterations == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_solution_is_float64_whatever_comes_in(dtype: torch.dtype) -> None:
    gram, cross_gram = (
        torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype),
        torch.tensor([3.0, 3.0], dtype=dtype),
    )
    solution = solve_nnls(gram, cross_gram)
    torch.testing.assert_close(solution.weights, torch.ones(2).double())
    torch.testing.assert_close(solution.slack, torch.zeros(2).double())
    assert solution.converged


@pytest.mark.parametrize("seed", range(20))
def test_rounding_between_opposed_candidates_never_becomes_weight(seed: int) -> None:
    """float32 products of ``g`` and ``-g`` apart by rounding: one of them at most gets weight."""
    base = random_problem(8, 1000, seed=seed)
    vectors = base.vectors.float()
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    opposed = -vectors * (1 + torch.finfo(torch.float32).eps * noise)
    mixed = Problem(vectors=torch.cat([vectors, opposed]).double(), target=base.target)
    matching = mixed.matching(torch.float32)
    solution = solve_nnls(matching.gram, matching.cross_gram)
    alone = solve_nnls(matching.gram[:8, :8], matching.cross_gram[:8])
    assert (alone.weights > 0).any()
    assert solution.converged
    # One of each pair at most.
    assert not ((solution.weights[:8] > 0) & (solution.weights[8:] > 0)).any()
    assert (solution.weights * mixed.lengths).sum() <= 10 * mixed.target.norm()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("apart", [1e-7, 1e-5, 1e-3])
def test_rounding_between_near_duplicates_costs_no_more_than_rounding(seed: int, apart: float) -> None:
    """Judged in exact products, weights fitted to float32 ones are as good as float32 can tell."""
    base = random_problem(12, 1000, seed=seed, decades=3)
    noise = torch.randn(base.vectors.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = torch.cat([base.vectors, base.vectors * (1 + apart * noise)]).float().double()
    near = Problem(vectors=vectors, target=base.target.float().double())
    rounded, exact = near.matching(torch.float32), near.matching()
    solution = solve_nnls(rounded.gram, rounded.cross_gram)
    best = objective(exact.gram, exact.cross_gram, fit_from_vectors(near.vectors, near.target))
    scale = (solution.weights * near.lengths).sum() + near.target.norm()
    assert solution.converged
    # 8 eps, in the unit of both terms of the objective: squared length.
    allowed = 8 * torch.finfo(torch.float32).eps * float(scale) ** 2
    assert objective(exact.gram, exact.cross_gram, solution.weights) <= best + allowed


def test_damping_adds_the_ridge_and_the_anchor_in_units_of_the_mean_diagonal() -> None:
    gram, cross_gram = torch.tensor([[1.0, 0.5], [0.5, 3.0]]), torch.tensor([1.0, 2.0])
    damped_gram, damped_cross_gram = damped(gram, cross_gram, ridge=0.5, anchor=0.25)
    torch.testing.assert_close(damped_gram, torch.tensor([[2.5, 0.5], [0.5, 4.5]]).double())
    torch.testing.assert_close(damped_cross_gram, torch.tensor([1.25, 2.25]).double())


@pytest.mark.parametrize(
    ("gram", "cross_gram", "tol", "error", "message"),
    [
        (torch.eye(3), torch.ones(2), 1e-10, ValueError, r"\(3, 3\) and \(2,\)"),
        (torch.ones(2, 3), torch.ones(2), 1e-10, ValueError, r"\(2, 3\) and \(2,\)"),
        (torch.eye(1), torch.ones(()), 1e-10, ValueError, r"\(1, 1\) and \(\)"),
        (torch.eye(2), torch.ones(2, 1), 1e-10, ValueError, r"\(2, 2\) and \(2, 1\)"),
        (
            torch.diag(torch.tensor([1.0, torch.nan])),
            torch.ones(2),
            1e-10,
            ValueError,
            "gram must be finite, got 1",
        ),
        (
            torch.eye(2),
            torch.tensor([torch.inf, -torch.inf]),
            1e-10,
            ValueError,
            "cross_gram must be finite, got 2",
        ),
        (torch.eye(2), torch.ones(2), 0.0, ValueError, "tol must be in"),
        (torch.eye(2), torch.ones(2), 1.0, ValueError, "tol must be in"),
        (torch.eye(2), torch.ones(2), float("nan"), ValueError, "tol must be in"),
        (torch.eye(2).long(), torch.ones(2), 1e-10, TypeError, "gram must be of a floating-point dtype"),
    ],
)
def test_a_system_that_makes_no_sense_is_refused(
    gram: Tensor, cross_gram: Tensor, tol: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        solve_nnls(gram, cross_gram, tol=tol)
