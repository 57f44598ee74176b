"""Both forms of the elimination: what they say of a system, and that a solver finds the same by either."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import GreedyFilter, WeightSolution, solve_nnls
from ftw_optim._matching import active_set
from ftw_optim._matching.active_set import ActiveSet
from ftw_optim._matching.elimination import Elimination
from ftw_optim._matching.list_elimination import ListElimination
from ftw_optim._matching.scaled_system import ScaledSystem
from ftw_optim._matching.tensor_elimination import TensorElimination
from tests.support.optimality import assert_optimal
from tests.support.strategies import Problem, problems, random_problem

Form = type[ListElimination] | type[TensorElimination]

FORMS: dict[str, Form] = {"lists": ListElimination, "tensors": TensorElimination}
DTYPES = st.sampled_from([torch.float64, torch.float32])


def system_of(problem: Problem, dtype: torch.dtype = torch.float64) -> ScaledSystem:
    matching = problem.matching(dtype)
    return ScaledSystem(matching.gram, matching.cross_gram, target_energy=matching.target_energy)


def grown(form: Form, system: ScaledSystem, count: int) -> list[int]:
    return ActiveSet(system, form(system)).grow(count)


def fitted(form: Form, system: ScaledSystem) -> WeightSolution:
    active = ActiveSet(system, form(system))
    active.admit_all()
    return active.solution()


@settings(max_examples=200)
@given(problem=problems(max_candidates=14), dtype=DTYPES, count=st.integers(1, 14))
def test_both_forms_keep_the_same_and_combine_the_same_whatever_the_trouble(
    problem: Problem, dtype: torch.dtype, count: int
) -> None:
    system = system_of(problem, dtype)
    assert grown(ListElimination, system, count) == grown(TensorElimination, system, count)
    one, other = (fitted(form, system) for form in FORMS.values())
    assert one.converged == other.converged
    # Candidates 1e-2 apart beside opposed ones: the combination is a difference of weights up to 100 times as long.
    terms = float(((one.weights + other.weights) * problem.lengths).sum())
    torch.testing.assert_close(
        one.weights @ problem.vectors, other.weights @ problem.vectors, rtol=0, atol=1e-9 * terms
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "dimension", "rank", "decades"),
    [(1, 3, None, 0), (12, 30, None, 0), (24, 40, 5, 0), (24, 40, None, 8), (64, 200, None, 0), (64, 20, None, 4)],
)
def test_both_forms_take_the_same_way_to_the_same_weights(
    n: int, dimension: int, rank: int | None, decades: float, dtype: torch.dtype, seed: int
) -> None:
    problem = random_problem(n, dimension, seed=seed, rank=rank, decades=decades)
    system = system_of(problem, dtype)
    assert grown(ListElimination, system, n // 3 + 1) == grown(TensorElimination, system, n // 3 + 1)
    one, other = (fitted(form, system) for form in FORMS.values())
    assert (one.iterations, one.converged) == (other.iterations, other.converged)
    first, second = one.weights * problem.lengths, other.weights * problem.lengths
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12 * float(first.max()))


@settings(max_examples=50)
@given(problem=problems())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_weights_of_either_form_satisfy_the_optimality_conditions(form: Form, problem: Problem) -> None:
    matching = problem.matching()
    solution = fitted(form, ScaledSystem(matching.gram, matching.cross_gram))
    assert_optimal(solution, matching.gram, matching.cross_gram)


@settings(max_examples=50)
@given(problem=problems(), power=st.integers(-40, 40))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_powers_of_two_pass_through_either_form(form: Form, problem: Problem, power: int) -> None:
    matching, two = problem.matching(), 2.0**power
    plain = fitted(form, ScaledSystem(matching.gram, matching.cross_gram))
    longer = fitted(form, ScaledSystem(matching.gram * two**2, matching.cross_gram * two))
    assert plain.iterations == longer.iterations
    torch.testing.assert_close(longer.weights, plain.weights / two, rtol=0, atol=0)


def assert_left(left: Elimination, problem: Problem, active: list[int]) -> None:
    """What is left of candidates that are not active, against projections of their vectors."""
    unit = problem.vectors / problem.lengths[:, None]
    target = problem.target / problem.target.norm()
    columns = unit[active].T
    # The pseudo-inverse of no columns is an error.
    inverse = torch.linalg.pinv(columns) if active else columns.T
    lacking = target - columns @ (inverse @ target)
    others = [index for index in range(len(problem)) if index not in active]

    def close(found: list[float], expected: Tensor) -> None:
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-12)

    assert left.active == active
    close(left.slack(others), unit[others] @ lacking)
    for other in others:
        coefficients = inverse @ unit[other]
        apart = unit[other] - columns @ coefficients
        close(left.coefficients(other), coefficients)
        close(list(left.left_of(other)), torch.stack([unit[other] @ lacking, apart @ apart]))
    for refined in (False, True):
        weights = left.solve(refined=refined)
        close(weights, inverse @ target)
        close(left.slack_beside(weights), unit @ lacking)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_left_is_what_projections_leave(form: Form) -> None:
    problem = random_problem(7, 12, seed=0)
    left = form(system_of(problem))
    assert_left(left, problem, [])
    for size, candidate in enumerate([4, 1, 6, 0], start=1):
        left.append(candidate)
        assert_left(left, problem, [4, 1, 6, 0][:size])
    assert left.replace([4, 6, 0], unchanged=1)
    assert_left(left, problem, [4, 6, 0])
    assert left.replace([4, 6, 2, 1], unchanged=2)
    assert_left(left, problem, [4, 6, 2, 1])
    left.append(5)
    assert_left(left, problem, [4, 6, 2, 1, 5])
    triangle = torch.linalg.cholesky(system_of(problem).matrix[left.active][:, left.active])
    assert left.growth() == pytest.approx(float(torch.linalg.inv(triangle).square().sum(1).max()))
    assert left.replace([])
    assert_left(left, problem, [])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_set_with_a_duplicate_is_refused_and_another_one_still_taken(form: Form) -> None:
    problem = random_problem(4, 6, seed=0)
    problem = problem.take(torch.tensor([0, 1, 2, 0]))
    left = form(system_of(problem))
    left.append(1)
    assert not left.replace([1, 0, 3], unchanged=1)
    assert left.replace([2, 1])
    assert_left(left, problem, [2, 1])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_foremost_are_the_offered_ones_whose_gains_are_equal(form: Form) -> None:
    problem = random_problem(6, 8, seed=1).take(torch.tensor([3, 0, 3, 5, 3]))
    left = form(system_of(problem))
    first, *more = left.foremost(1e-6, 0.999)
    assert problem.alike()[[first, *more]].unique().tolist() == [first]
    left.offer(first, offered=False)
    assert left.foremost(1e-6, 0.999)[: len(more)] == more
    left.offer(first, offered=True)
    assert left.foremost(1e-6, 0.999) == [first, *more]
    assert left.foremost(1.0, 0.999) == []


def test_the_form_is_chosen_by_the_size_and_by_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def noted(form: Form) -> object:
        return lambda system: made.append(form) or form(system)  # type: ignore[func-returns-value]

    monkeypatch.setattr(active_set, "ListElimination", noted(ListElimination))
    monkeypatch.setattr(active_set, "TensorElimination", noted(TensorElimination))
    for few in (active_set.FEW_TO_FIT, active_set.FEW_TO_GROW):
        for n in (few, few + 1):
            matching = random_problem(n, 4, seed=0).matching()
            GreedyFilter(keep=2)(matching)
            solve_nnls(matching.gram, matching.cross_gram)
    lists, tensors = ListElimination, TensorElimination
    assert made == [lists, lists, lists, tensors, lists, tensors, tensors, tensors]
