"""What is said of a selection, on given inner products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ftw_optim import GreedyFilter, KeepAll, Matching, NonNegativeLeastSquares, Selection, TopKFilter
from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._step.choice import selection_from
from tests.support.releases import older
from tests.support.strategies import Problem, problems, random_problem


def chosen(problem: Problem, *, stage: Any, normalize: Any = "sum") -> Selection:
    return chosen_from(problem.matching(), stage=stage, normalize=normalize)


def chosen_from(matching: Matching, *, stage: Any, normalize: Any = "sum") -> Selection:
    products = Products(
        gram=matching.gram,
        cross_gram=matching.cross_gram,
        target_energy=torch.tensor(matching.target_energy, dtype=torch.float64),
        error=torch.tensor(0.0),
    )
    return selection_from(
        {Metric.PRECONDITIONED: products},
        matching.losses,
        torch.ones(len(matching), dtype=torch.bool),
        metric=Metric.PRECONDITIONED,
        filter_stage=stage,
        weight_stage=NonNegativeLeastSquares(normalize=normalize),
        generator=matching.generator,
    )


STAGES = st.sampled_from([GreedyFilter(keep=3), GreedyFilter(keep=1.0), TopKFilter(keep=0.5), KeepAll()])


@given(problems(), STAGES, st.sampled_from(["sum", "norm", None]))
def test_outcome_is_that_of_the_combined_vector(problem: Problem, stage: Any, normalize: Any) -> None:
    """In coordinates where the preconditioner is the identity: a step -c on curvature 1 towards the target."""
    selection = chosen(problem, stage=stage, normalize=normalize)
    assert 0.0 <= selection.residual <= 1.0
    assert -1.0 <= selection.cosine <= 1.0
    assert (selection.weights >= 0).all()
    if selection.skipped:
        assert not selection.weights.any()
        assert selection.predicted_decrease == 0.0
        return
    combined = selection.weights @ problem.vectors[selection.kept]
    decrease = combined @ problem.target - combined @ combined / 2
    unit = float((combined.norm() + problem.target.norm()) ** 2)
    # Weights of opposed or nearly equal candidates may cancel in the combination but not in the Gram form of it.
    terms = float((selection.weights * problem.lengths[selection.kept]).sum() ** 2)
    assert selection.predicted_decrease == pytest.approx(float(decrease), rel=1e-9, abs=1e-12 * (unit + terms))
    share = selection.weights / selection.weights.sum()
    assert selection.effective_size == pytest.approx(1 / float(share.square().sum()))
    if terms < 1e6 * float(combined @ combined):
        cosine = combined @ problem.target / combined.norm() / problem.target.norm()
        assert selection.cosine == pytest.approx(float(cosine), abs=1e-6)
        assert selection.residual == pytest.approx(1 - max(0.0, float(cosine)) ** 2, abs=1e-6)
    if normalize == "sum":
        assert float(selection.weights.sum()) == pytest.approx(1.0)
    elif normalize is None:
        assert float(selection.weights.sum()) == pytest.approx(selection.fitted_scale)


@given(problems(), st.data())
def test_a_candidate_equal_to_the_target_makes_the_residual_vanish(problem: Problem, data: st.DataObject) -> None:
    if not problem.target.any():
        return
    row = data.draw(st.integers(0, len(problem) - 1))
    vectors = problem.vectors.clone()
    vectors[row] = problem.target
    selection = chosen(Problem(vectors=vectors, target=problem.target), stage=GreedyFilter(keep=3))
    assert selection.residual == pytest.approx(0.0, abs=1e-9)


def test_a_matching_refuses_shapes_that_disagree_and_counts_what_was_offered() -> None:
    options: dict[str, Any] = {"target_energy": 1.0, "generator": torch.Generator()}
    with pytest.raises(ValueError, match=r"Expected gram \(n, n\)"):
        Matching(gram=torch.eye(3), cross_gram=torch.ones(2), losses=torch.ones(2), **options)
    matching = Matching(gram=torch.eye(3), cross_gram=torch.ones(3), losses=torch.ones(3), offered=5, **options)
    restricted = matching.restrict(torch.tensor([2, 0]))
    assert (len(matching), len(restricted), restricted.offered) == (3, 2, 5)
    assert Matching(gram=torch.eye(1), cross_gram=torch.ones(1), losses=torch.ones(1), **options).offered == 1


class Operations(TorchDispatchMode):
    """The number of operations on tensors inside of the block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_small_choice_takes_few_operations_however_many_are_kept() -> None:
    """Each takes some microseconds, whatever its size: hundreds of them took longer than the rest of a small step."""
    counts = set()
    for n, keep in ((8, 1), (8, 2), (16, 16), (64, 16)):
        matching = random_problem(n, 1000, seed=n).matching(torch.float32)
        with Operations() as operations:
            chosen_from(matching, stage=GreedyFilter(keep=keep))
        counts.add(operations.count)
    assert len(counts) == 1
    assert counts.pop() < (80 if older("torch", "2.13") else 60)
