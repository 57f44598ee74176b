"""Filter stages: the greedy one against itself done from scratch, and what no filter may do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import (
    AcceptFilter,
    FilterStage,
    GreedyFilter,
    KeepAll,
    Matching,
    NonNegativeLeastSquares,
    TopKFilter,
)
from tests.support.oracles import greedy_from_scratch, objective
from tests.support.strategies import Problem, problems, random_problem

FILTERS: dict[str, FilterStage] = {
    "greedy": GreedyFilter(keep=4),
    "top-k": TopKFilter(keep=4),
    "accept": AcceptFilter(),
    "all": KeepAll(),
}
WITH_KEEP: list[Any] = [type(stage) for stage in FILTERS.values() if hasattr(stage, "keep")]
"""The classes of those that take a count or a share."""


def fitted_objective(matching: Matching, kept: Tensor) -> float:
    """The objective at the best weights of the kept candidates, in units of the target energy."""
    block = matching.restrict(kept)
    weights = NonNegativeLeastSquares()(block).weights
    return objective(block.gram, block.cross_gram, weights) / matching.target_energy


def combination(problem: Problem, kept: Tensor) -> Tensor:
    """The combined gradient at the best weights of the kept candidates, in units of the target's length."""
    weights = NonNegativeLeastSquares()(problem.matching().restrict(kept)).weights
    return weights @ problem.vectors[kept] / problem.target.norm()


@given(problem=problems())
@pytest.mark.parametrize("stage", FILTERS.values(), ids=FILTERS)
def test_kept_are_distinct_indices_of_candidates(stage: FilterStage, problem: Problem) -> None:
    kept = stage(problem.matching())
    assert kept.dtype == torch.int64
    assert len(set(kept.tolist())) == len(kept)
    assert set(kept.tolist()) <= set(range(len(problem)))


@given(problem=problems())
def test_greedy_keeps_no_zero_gradient_and_at_most_its_count(problem: Problem) -> None:
    kept = GreedyFilter(keep=3)(problem.matching())
    assert len(kept) <= 3
    assert (problem.lengths[kept] > 0).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("n", "dimension", "rank", "decades"),
    [
        (1, 5, None, 0),
        (6, 3, None, 0),
        (24, 40, None, 0),
        (24, 40, 5, 0),
        (24, 40, None, 10),
        (40, 12, None, 4),
    ],
)
def test_greedy_picks_what_picking_from_scratch_picks(
    n: int, dimension: int, rank: int | None, decades: float, seed: int
) -> None:
    problem = random_problem(n, dimension, seed=seed, rank=rank, decades=decades)
    expected = greedy_from_scratch(problem.vectors, problem.target, 8)
    assert GreedyFilter(keep=8)(problem.matching()).tolist() == expected


@settings(max_examples=50)
@given(problem=problems())
def test_greedy_picks_what_picking_from_scratch_picks_whatever_the_trouble(problem: Problem) -> None:
    """Candidates that point the same way gain the same: any of them will do."""
    kept = GreedyFilter(keep=4)(problem.matching())
    expected = greedy_from_scratch(problem.vectors, problem.target, 4)
    assert problem.alike()[kept].tolist() == problem.alike()[expected].tolist()


@settings(max_examples=50)
@given(problem=problems())
def test_greedy_only_adds_as_its_count_grows_and_the_objective_falls(problem: Problem) -> None:
    matching = problem.matching()
    everything = GreedyFilter(keep=len(problem))(matching)
    before = 0.0
    for count in range(1, len(everything) + 1):
        kept = GreedyFilter(keep=count)(matching)
        assert kept.tolist() == everything[:count].tolist()
        after = fitted_objective(matching, kept)
        assert after <= before + 1e-14
        before = after


@settings(max_examples=50)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_permuting_the_candidates_permutes_what_greedy_keeps(problem: Problem, seed: int) -> None:
    order = torch.randperm(len(problem), generator=torch.Generator().manual_seed(seed))
    permuted = problem.take(order)
    kept = GreedyFilter(keep=4)(problem.matching())
    kept_permuted = GreedyFilter(keep=4)(permuted.matching())
    assert problem.alike()[order[kept_permuted]].tolist() == problem.alike()[kept].tolist()
    before, after = (fitted_objective(p.matching(), k) for p, k in ((problem, kept), (permuted, kept_permuted)))
    assert after == pytest.approx(before, abs=1e-9)


@settings(max_examples=50)
@given(problem=problems(), which=st.integers(0, 9))
def test_an_exact_duplicate_changes_neither_the_objective_nor_the_combined_gradient(
    problem: Problem, which: int
) -> None:
    which %= len(problem)
    doubled = replace(problem, vectors=torch.cat([problem.vectors, problem.vectors[which : which + 1]]))
    kept, kept_doubled = (GreedyFilter(keep=4)(p.matching()) for p in (problem, doubled))
    assert {which, len(problem)} - set(kept_doubled.tolist())
    before, after = (
        fitted_objective(problem.matching(), kept),
        fitted_objective(doubled.matching(), kept_doubled),
    )
    assert after == pytest.approx(before, abs=1e-9)
    torch.testing.assert_close(combination(doubled, kept_doubled), combination(problem, kept), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_duplicates_and_longer_copies_take_no_slot(dtype: torch.dtype, seed: int) -> None:
    """Five directions, four candidates each: five slots are enough for all five."""
    base = random_problem(5, 1000, seed=seed)
    copies = replace(base, vectors=torch.cat([scale * base.vectors for scale in (1.0, 1.0, 3.7, 1e-3)]))
    kept = GreedyFilter(keep=5)(copies.matching(dtype))
    assert sorted((kept % 5).tolist()) == list(range(5))
    assert len(GreedyFilter(keep=20)(copies.matching(dtype))) == 5


@settings(max_examples=50)
@given(problem=problems(), power=st.integers(-30, 30))
def test_powers_of_two_change_no_kept_index_and_no_normalised_weight(problem: Problem, power: int) -> None:
    matching, two = problem.matching(), 2.0**power
    longer_candidates = replace(matching, gram=matching.gram * two**2, cross_gram=matching.cross_gram * two)
    longer_target = replace(
        matching, cross_gram=matching.cross_gram * two, target_energy=matching.target_energy * two**2
    )
    for stage in FILTERS.values():
        kept = stage(matching)
        weights = NonNegativeLeastSquares()(matching.restrict(kept)).weights
        for scaled in (longer_candidates, longer_target):
            assert stage(scaled).tolist() == kept.tolist()
            scaled_weights = NonNegativeLeastSquares()(scaled.restrict(kept)).weights
            if weights.sum() > 0:
                torch.testing.assert_close(
                    scaled_weights / scaled_weights.sum(), weights / weights.sum(), rtol=0, atol=0
                )
            else:
                assert not scaled_weights.any()


@given(problem=problems(), scale=st.sampled_from([1.0, 1e-8, 1e8]))
def test_a_candidate_along_the_target_is_picked_first_and_leaves_nothing(problem: Problem, scale: float) -> None:
    matching = replace(problem, vectors=torch.cat([problem.vectors, scale * problem.target[None]])).matching()
    kept = GreedyFilter(keep=1)(matching)
    # 1 + 2 objective = |target - combination|^2 / |target|^2.
    assert 1 + 2 * fitted_objective(matching, kept) == pytest.approx(0, abs=1e-12)
    assert len(GreedyFilter(keep=len(matching))(matching)) == 1


def test_a_candidate_that_points_away_may_become_useful() -> None:
    """Candidate 1 has a negative product, and corrects what candidate 0 overdoes."""
    problem = Problem(
        vectors=torch.tensor([[1.0, 1.0], [-0.1, -1.0]]).double(), target=torch.tensor([1.0, 0.05]).double()
    )
    matching = problem.matching()
    assert matching.cross_gram[1] < 0
    assert GreedyFilter(keep=2)(matching).tolist() == [0, 1]
    assert TopKFilter(keep=2)(matching).tolist() == [0]


def test_a_kept_candidate_may_lose_its_weight_and_still_holds_its_slot() -> None:
    """Candidate 0 is the best alone; beside the two after it, it is in the way."""
    problem = Problem(
        vectors=torch.tensor([[1.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double(),
        target=torch.tensor([1.0, 0.9, 0.0]).double(),
    )
    matching = problem.matching()
    kept = GreedyFilter(keep=3)(matching)
    assert sorted(kept.tolist()) == [0, 1, 2]
    assert kept[0] == 0
    assert NonNegativeLeastSquares()(matching.restrict(kept)).weights[0] == 0


NOTHING_TO_KEEP = {
    "all point away": ([[1.0, 0.0], [1.0, 1.0]], [-1.0, -1.0]),
    "all are zero": ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0]),
    "the target is zero": ([[1.0, 0.0], [1.0, 1.0]], [0.0, 0.0]),
}


@pytest.mark.parametrize(("vectors", "target"), NOTHING_TO_KEEP.values(), ids=NOTHING_TO_KEEP)
@pytest.mark.parametrize("stage", [GreedyFilter(), TopKFilter()], ids=["greedy", "top-k"])
def test_nothing_is_kept_where_nothing_helps(
    stage: FilterStage, vectors: list[list[float]], target: list[float]
) -> None:
    matching = Problem(vectors=torch.tensor(vectors).double(), target=torch.tensor(target).double()).matching()
    kept = stage(matching)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


def test_a_target_that_only_rounding_points_to_keeps_nothing() -> None:
    """float32: a product of 1e-8 between vectors of length one is what orthogonal ones have too."""
    matching = replace(
        Problem(vectors=torch.eye(3).double(), target=torch.ones(3).double()).matching(torch.float32),
        cross_gram=torch.tensor([1e-8, -1e-8, 2e-8]),
        target_energy=1.0,
    )
    assert len(GreedyFilter(keep=3)(matching)) == 0


@pytest.mark.parametrize("stage", FILTERS.values(), ids=FILTERS)
def test_no_candidates_are_no_error(stage: FilterStage) -> None:
    matching = random_problem(3, 4, seed=0).matching().restrict(torch.empty(0, dtype=torch.int64))
    assert stage(matching).shape == (0,)


def test_top_k_takes_the_largest_positive_products_and_the_lower_index_of_a_tie() -> None:
    matching = random_problem(6, 4, seed=0).matching()
    matching = replace(matching, cross_gram=torch.tensor([1.0, 3.0, -9.0, 3.0, 0.0, 2.0]))
    assert TopKFilter(keep=3)(matching).tolist() == [1, 3, 5]
    assert TopKFilter(keep=1.0)(matching).tolist() == [1, 3, 5, 0]


@given(problem=problems())
def test_accepted_are_those_whose_products_are_not_certainly_negative(problem: Problem) -> None:
    matching = problem.matching()
    exact = (matching.cross_gram >= 0).nonzero()[:, 0].tolist()
    assert AcceptFilter(confidence=5.0)(matching).tolist() == exact
    matching = replace(matching, cross_gram_error=matching.cross_gram.abs() / 2)
    assert AcceptFilter(confidence=0.0)(matching).tolist() == exact
    assert AcceptFilter(confidence=1.9)(matching).tolist() == exact
    assert AcceptFilter(confidence=2.1)(matching).tolist() == list(range(len(matching)))


@pytest.mark.parametrize("confidence", [-0.1, float("nan"), float("inf")])
def test_a_confidence_that_is_no_number_of_errors_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must be finite and not negative"):
        AcceptFilter(confidence=confidence)


def test_keep_all_keeps_all_in_order() -> None:
    assert KeepAll()(random_problem(5, 4, seed=0).matching()).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("keep", "offered", "accepted", "expected"),
    [
        (1, 8, 8, 1),
        (1.0, 8, 8, 8),
        (3, 8, 8, 3),
        (100, 8, 8, 8),
        (3, 8, 2, 2),
        (0.25, 8, 8, 2),
        (0.25, 10, 10, 3),  # half a candidate counts as one
        (0.25, 9, 9, 2),
        (0.25, 8, 5, 2),  # a share of all that were offered, the rejected included
        (1.0, 8, 5, 5),
        (0.01, 8, 8, 1),
        (5e-324, 8, 8, 1),
    ],
)
@pytest.mark.parametrize("make", WITH_KEEP)
def test_keep_is_a_count_or_a_share_of_the_offered(
    make: Any, keep: int | float, offered: int, accepted: int, expected: int
) -> None:
    helpful = Problem(vectors=torch.eye(accepted).double(), target=torch.ones(accepted).double())
    assert len(make(keep=keep)(replace(helpful.matching(), offered=offered))) == expected


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (0.0, ValueError),
        (-0.5, ValueError),
        (1.5, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        (False, TypeError),
        ("4", TypeError),
        (None, TypeError),
        (torch.tensor(4), TypeError),
    ],
)
@pytest.mark.parametrize("make", WITH_KEEP)
def test_keep_that_is_neither_is_refused(make: Any, keep: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^keep "):
        make(keep=keep)
