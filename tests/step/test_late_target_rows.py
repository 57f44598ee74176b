"""Target rows that only guide at first, and are trained on once they guide no more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import AcceptFilter, Matching, TargetGradient, TopKFilter, UniformWeights, preconditioner_of
from ftw_optim.testing import recorded
from tests.support.checks import training_on_target as optimizer_of
from tests.support.grids import slow
from tests.support.models import CASES, trained
from tests.support.oracles import candidate_gradients, explicit_matching, mean_gradient

N, UNTIL = 6, 2


@pytest.mark.parametrize("decay", [0.0, slow(0.5)])
@pytest.mark.parametrize("combine", ["factors", slow("graph"), slow("rerun")])
def test_rows_guide_at_first_and_then_take_part_under_the_guide_of_before(combine: str, decay: float) -> None:
    case = CASES["small-gpt"](torch.float64, N)
    calls = []

    def closure() -> Tensor:
        calls.append(len(calls))
        return case.target_losses()

    optimizer = optimizer_of(case, combine=combine, target=TargetGradient(closure, decay=decay, until=UNTIL))
    goal: dict[str, Tensor] | None = None
    for number in range(4):
        targets = candidate_gradients(case, target=True)
        if number < UNTIL:
            new = mean_gradient(targets)
            goal = new if goal is None else {k: decay * goal[k] + (1 - decay) * new[k] for k in new}
        assert goal is not None
        m = len(targets) if number >= UNTIL else 0
        found = [*candidate_gradients(case), *targets[: m or None]][: N + m]
        optimizer.zero_grad()
        with recorded(optimizer) as shares:
            optimizer.backward(case.losses)
        assert len(calls) == number + 1
        selection = optimizer.selection
        assert selection is not None
        assert len(selection.target_weights) == m
        parameters = trained(case)
        maps = {one.name: preconditioner_of(optimizer, parameters[one.name], one.reference) for one in shares}
        gram, cross, energy = explicit_matching(found, goal, maps, "preconditioned")
        torch.testing.assert_close(selection.cross_gram, cross[:N], rtol=1e-8, atol=1e-12)
        assert selection.target_energy == pytest.approx(float(energy), rel=1e-9)
        whole = Matching(
            gram=gram,
            cross_gram=cross,
            target_energy=float(energy),
            losses=torch.zeros(len(gram)),
            generator=torch.Generator(),
        )
        kept = optimizer.filter(whole.restrict(torch.arange(N)))
        assert selection.kept.tolist() == kept.tolist()
        fitted = optimizer.weight(whole.restrict(torch.cat([kept, torch.arange(N, N + m)]))).weights
        weights = torch.cat([selection.weights, selection.target_weights])
        torch.testing.assert_close(weights, fitted / fitted.sum(), rtol=1e-6, atol=1e-9)
        by_row = torch.cat([selection.spread_weights(), selection.target_weights])
        for name, parameter in parameters.items():
            expected = torch.stack([weight * row[name] for weight, row in zip(by_row, found, strict=True)]).sum(0)
            given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-11)
        optimizer.step()


def test_a_gradient_that_is_formed_no_more_stays_what_it_was_without_rows_in_the_step() -> None:
    case = CASES["small-gpt"](torch.float64, N)
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        return case.target_losses()

    optimizer = optimizer_of(case, train_on_target=False, target=TargetGradient(closure, until=UNTIL))
    for _ in range(4):
        optimizer.step(case.losses)
    assert len(calls) == UNTIL


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_checkpoint_goes_on_alike(stop: int) -> None:
    found = []
    for at in (None, stop):
        case = CASES["small-gpt"](torch.float64, N)
        target = TargetGradient(case.target_losses, until=UNTIL)
        optimizer = optimizer_of(case, target=target)
        for step in range(4):
            if step == at:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = optimizer_of(case, target=target)
                optimizer.load_state_dict(state)
            optimizer.step(case.losses)
        found.append([p.detach().clone() for p in trained(case).values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_single_row_may_guide_and_take_part_later() -> None:
    case = CASES["small-gpt"](torch.float64, N)
    optimizer = optimizer_of(case, target=TargetGradient(lambda: case.target_losses(torch.tensor([0])), until=1))
    for _ in range(2):
        optimizer.step(case.losses)
    assert optimizer.selection is not None
    assert len(optimizer.selection.target_weights) == 1


@pytest.mark.parametrize("until", [0, -1, True, 1.5])
def test_an_end_that_is_none_is_refused(until: Any) -> None:
    with pytest.raises(ValueError, match="until must be a positive number of selections"):
        TargetGradient(lambda: torch.zeros(1), until=until)


def test_candidates_are_all_accepted_once_the_guide_is_of_long_ago() -> None:
    case = CASES["small-gpt"](torch.float64, N)
    seen = []

    class Watched(TopKFilter):
        def __call__(self, matching: Matching, *more: Matching) -> Tensor:
            seen.append(matching.stale)
            return AcceptFilter()(matching)

    target = TargetGradient(lambda: -case.losses(), until=UNTIL)  # away from all that is offered
    optimizer = optimizer_of(
        case, filter=Watched(keep=1), target=target, train_on_target=False, weight=UniformWeights()
    )
    kept = []
    for _ in range(UNTIL + 2):
        optimizer.backward(case.losses)
        assert optimizer.selection is not None
        kept.append(len(optimizer.selection.kept))
    assert seen == [False] * UNTIL + [True, True]
    assert max(kept[:UNTIL]) < N
    assert kept[UNTIL:] == [N, N]
