"""Target rows that take part in the step: exact products, what they ask of each other, and every form of a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import (
    KeepAll,
    Matching,
    NonNegativeLeastSquares,
    SelectiveOptimizer,
    Sketch,
    TargetGradient,
    UniformWeights,
    last_blocks,
    preconditioner_of,
)
from ftw_optim.testing import recorded
from tests.support.checks import training_on_target as optimizer_of
from tests.support.grids import slow
from tests.support.models import CASES, Case, RowGradients, in_batches, precision, trained
from tests.support.oracles import candidate_gradients, explicit_matching, mean_gradient

N = 6


def asked(gram: Tensor, m: int) -> tuple[Tensor, Tensor, float]:
    """Row by row and pair by pair: what the target asks of each row, the standard error, and the target's energy."""
    n = len(gram) - m
    cross_gram, errors = [], []
    for row in range(len(gram)):
        others = [float(gram[row, n + other]) for other in range(m) if n + other != row]
        cross_gram.append(sum(others) / len(others))
        mean = sum(others) / m
        spread = (sum((value - mean) ** 2 for value in others) / (m - 1)) ** 0.5 / m**0.5
        errors.append(spread if row < n else 0.0)
    pairs = [float(gram[n + a, n + b]) for a in range(m) for b in range(m) if a != b]
    least = 0.01 * sum(float(gram[n + a, n + a]) for a in range(m)) / m
    cross, error = torch.tensor(cross_gram, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    return cross, error, max(sum(pairs) / len(pairs), least)


def check(case: Case, optimizer: SelectiveOptimizer, *, scale: float = 1.0, closure: Any = None) -> None:
    """One backward against gradients that are formed one at a time."""
    rows = candidate_gradients(case) + candidate_gradients(case, target=True)
    m = len(rows) - case.n
    optimizer.zero_grad()
    with recorded(optimizer) as shares:
        optimizer.backward(closure or case.losses, grad_scale=scale)
    selection = optimizer.selection
    assert selection is not None
    assert not selection.skipped
    parameters = trained(case)
    maps = {share.name: preconditioner_of(optimizer, parameters[share.name], share.reference) for share in shares}
    if optimizer.scored is None:
        expected = mean_gradient(rows)
        for share in shares:
            torch.testing.assert_close(share.reference, expected[share.name], rtol=1e-9, atol=1e-12)
    gram, _, _ = explicit_matching(rows, rows[0], maps, optimizer.metric)
    cross, error, energy = asked(gram, m)
    size = gram.diagonal().sqrt()
    lengths = size[: case.n, None] * size
    torch.testing.assert_close(
        selection.gram / lengths[:, : case.n], gram[: case.n, : case.n] / lengths[:, : case.n], rtol=0, atol=1e-9
    )
    length = size[: case.n] * size[case.n :].max()
    torch.testing.assert_close(selection.cross_gram / length, cross[: case.n] / length, rtol=0, atol=1e-9)
    assert selection.target_energy == pytest.approx(energy, rel=1e-9)
    whole = Matching(
        gram=gram,
        cross_gram=cross,
        target_energy=energy,
        losses=torch.zeros(len(gram)),
        generator=torch.Generator(),
        cross_gram_error=error,
    )
    kept = optimizer.filter(whole.restrict(torch.arange(case.n)))
    assert selection.kept.tolist() == kept.tolist()
    fitted = optimizer.weight(whole.restrict(torch.cat([kept, torch.arange(case.n, case.n + m)]))).weights
    weights = torch.cat([selection.weights, selection.target_weights])
    if not fitted.any():  # of target rows that disagree
        fitted[len(kept) :] = 1.0
    torch.testing.assert_close(weights, fitted / fitted.sum(), rtol=1e-7, atol=1e-9)
    assert float(weights.sum()) == pytest.approx(1.0)
    by_row = torch.cat([selection.spread_weights(), selection.target_weights])
    for name, parameter in parameters.items():
        parts = torch.stack([scale * weight * row[name] for weight, row in zip(by_row, rows, strict=True)])
        given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        atol = 1e-10 * float(parts.flatten(1).norm(dim=1).sum() + 1e-3)
        torch.testing.assert_close(given, parts.sum(0), rtol=0, atol=atol)
    torch.testing.assert_close(selection.target_losses, case.target_losses().detach())


OPTIONS: dict[str, dict[str, Any]] = {
    "factors": {"combine": "factors"},
    "graph": {"combine": "graph"},
    "rerun": {"combine": "rerun"},
    "update metric": {"metric": "update"},
    "euclidean": {"metric": "euclidean"},
    "all candidates, confident and anchored": {
        "filter": KeepAll(),
        "weight": NonNegativeLeastSquares(anchor=0.3, anchor_to="positive", confidence=1.0),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["mlp", "small-gpt", slow("llama-lora")])
def test_a_step_beside_gradients_formed_one_at_a_time(name: str, options: dict[str, Any]) -> None:
    with precision(torch.float64):
        case = CASES[name](torch.float64, N)
        optimizer = optimizer_of(case, **options)
        check(case, optimizer)
        optimizer.step()
        check(case, optimizer)


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_micro_batches_and_a_scale(combine: str) -> None:
    case = CASES["small-gpt"](torch.float64, N)
    check(case, optimizer_of(case, combine=combine), scale=1024.0, closure=in_batches(case, [2, 1, 3]))


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_the_last_block_alone_may_be_scored(combine: str) -> None:
    case = CASES["small-gpt"](torch.float64, N)
    check(case, optimizer_of(case, combine=combine, scored=last_blocks(case.model, 1)))


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_a_sketch_is_the_same_one_in_every_form(combine: str) -> None:
    """Products are estimates; what follows from them is not."""
    case = CASES["small-gpt"](torch.float64, N)
    found = []
    for closure in (case.losses, in_batches(case, [4, 2])):
        optimizer = optimizer_of(case, combine=combine, gram=Sketch(dim=512))
        optimizer.zero_grad()
        optimizer.backward(closure)
        selection = optimizer.selection
        assert selection is not None
        found.append([selection.gram, selection.cross_gram, selection.weights, selection.target_weights])
        rows = candidate_gradients(case) + candidate_gradients(case, target=True)
        weights = torch.cat([selection.spread_weights(), selection.target_weights])
        for parameter, name in ((p, name) for name, p in trained(case).items() if p.grad is not None):
            expected = sum(weight * row[name] for weight, row in zip(weights, rows, strict=True))
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_a_remembered_gradient_has_its_share(combine: str) -> None:
    """The second step's target is the first one's mean gradient and what the rows ask now, half each."""
    case = CASES["small-gpt"](torch.float64, N)
    optimizer = optimizer_of(case, combine=combine, target=TargetGradient(case.target_losses, decay=0.5))
    old = mean_gradient(candidate_gradients(case, target=True))
    optimizer.step(case.losses)
    rows = candidate_gradients(case) + candidate_gradients(case, target=True)
    with recorded(optimizer) as shares:
        optimizer.backward(case.losses)
    selection = optimizer.selection
    assert selection is not None
    maps = {share.name: preconditioner_of(optimizer, trained(case)[share.name], share.reference) for share in shares}
    gram, from_old, energy = explicit_matching(rows, old, maps, "preconditioned")
    fresh, _, _ = asked(gram, 3)
    torch.testing.assert_close(selection.cross_gram, (0.5 * fresh + 0.5 * from_old)[:N], rtol=1e-8, atol=1e-9)
    pairs = float((gram[N:, N:].sum() - gram[N:, N:].diagonal().sum()) / 6)
    both = 0.25 * pairs + 0.25 * float(energy) + 0.5 * float(from_old[N:].mean())
    assert selection.target_energy == pytest.approx(both, rel=1e-8)
    kept = optimizer.state_dict()[SelectiveOptimizer.EXTRA_KEY]["target"]
    new = mean_gradient(candidate_gradients(case, target=True))
    for name, gradient in kept.items():
        torch.testing.assert_close(gradient, 0.5 * old[name] + 0.5 * new[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_others_may_guide_rows_that_take_part(combine: str) -> None:
    """The target's gradient is matched as ever, by candidates and by rows of a closure of their own."""
    case = CASES["small-gpt"](torch.float64, N)
    guides, rows = torch.tensor([0, 1]), torch.tensor([2])
    optimizer = optimizer_of(
        case,
        combine=combine,
        target=TargetGradient(lambda: case.target_losses(guides), refresh_every=2),
        train_on_target=lambda: case.target_losses(rows),
    )
    for number in range(2):  # the second with the gradient of the first
        all_targets = candidate_gradients(case, target=True)
        if number == 0:
            goal = mean_gradient(all_targets[:2])
        found = [*candidate_gradients(case), all_targets[2]]
        optimizer.zero_grad()
        with recorded(optimizer) as shares:
            optimizer.backward(case.losses)
        selection = optimizer.selection
        assert selection is not None
        maps = {
            share.name: preconditioner_of(optimizer, trained(case)[share.name], share.reference) for share in shares
        }
        gram, cross, energy = explicit_matching(found, goal, maps, "preconditioned")
        whole = Matching(
            gram=gram,
            cross_gram=cross,
            target_energy=float(energy),
            losses=torch.zeros(N + 1),
            generator=torch.Generator(),
        )
        kept = optimizer.filter(whole.restrict(torch.arange(N)))
        assert selection.kept.tolist() == kept.tolist()
        fitted = optimizer.weight(whole.restrict(torch.cat([kept, torch.tensor([N])]))).weights
        weights = torch.cat([selection.weights, selection.target_weights])
        torch.testing.assert_close(weights, fitted / fitted.sum(), rtol=1e-6, atol=1e-9)
        by_row = torch.cat([selection.spread_weights(), selection.target_weights])
        for name, parameter in trained(case).items():
            expected = torch.stack([weight * row[name] for weight, row in zip(by_row, found, strict=True)]).sum(0)
            given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-11)
        optimizer.step()


def test_a_copy_asks_for_the_rows_again() -> None:
    case = CASES["mlp"](torch.float64, N)
    optimizer = optimizer_of(case, train_on_target=case.target_losses)
    other = copy.deepcopy(optimizer)
    other.target = case.target_losses  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"set optimizer\.train_on_target"):
        other.step(case.losses)
    assert callable(optimizer.train_on_target)


# --- what the fit does with target rows


def step_on(candidates: Tensor, target: Tensor, **options: Any) -> SelectiveOptimizer:
    model = RowGradients(candidates.shape[1])
    options = {"filter": KeepAll(), "train_on_target": True, **options}
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: model(target), metric="euclidean", **options
    )

    def closure(rows: Tensor | None = None) -> Tensor:
        losses: Tensor = model(candidates if rows is None else candidates[rows])
        return losses

    optimizer.step(closure)
    return optimizer


def test_a_useless_pool_leaves_the_step_to_the_target_rows() -> None:
    target = torch.tensor([[1.0, 0.2, 0.0], [1.0, -0.1, 0.3], [0.9, 0.0, -0.2]]).double()
    selection = step_on(-target[:2], target).selection
    assert selection is not None
    assert selection.weights.tolist() == [0.0, 0.0]
    alone = step_on(torch.tensor([[0.0, 0.0, 0.0]]).double(), target).selection
    assert alone is not None
    torch.testing.assert_close(selection.target_weights, alone.target_weights)
    assert float(selection.target_weights.sum()) == pytest.approx(1.0)


def test_target_rows_that_disagree_are_weighed_alike() -> None:
    target = torch.eye(3, dtype=torch.float64) - 0.5
    selection = step_on(torch.ones(2, 3).double(), target).selection
    assert selection is not None
    assert not selection.skipped
    torch.testing.assert_close(selection.target_weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert selection.fitted_scale == 0.0
    assert selection.target_energy > 0


@pytest.mark.parametrize("m", [2, 3, 7])
def test_rows_of_one_strength_share_it(m: int) -> None:
    """With ``K = noise * I + signal`` every row's weight is ``signal / (noise + m * signal)`` before it is scaled."""
    signal, noise = 4.0, 0.25
    own = noise**0.5 * torch.eye(m, dtype=torch.float64)
    target = torch.cat([torch.full((m, 1), signal**0.5, dtype=torch.float64), own], dim=1)
    selection = step_on(torch.zeros(1, m + 1, dtype=torch.float64), target).selection
    assert selection is not None
    assert selection.fitted_scale == pytest.approx(m * signal / (noise + m * signal))
    torch.testing.assert_close(selection.target_weights, torch.full((m,), 1 / m, dtype=torch.float64))
    assert selection.target_energy == pytest.approx(signal)


def test_a_candidate_like_the_target_rows_counts_as_one_of_them() -> None:
    target = torch.cat([torch.ones(3, 1), 0.5 * torch.eye(3, 4)], dim=1).double()
    candidate = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.5]]).double()
    selection = step_on(candidate, target).selection
    assert selection is not None
    torch.testing.assert_close(selection.weights, selection.target_weights[:1])


def test_uniform_weights_are_those_of_a_batch_of_all_rows() -> None:
    candidates, target = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    selection = step_on(candidates, target, weight=UniformWeights()).selection
    assert selection is not None
    torch.testing.assert_close(torch.cat([selection.weights, selection.target_weights]), torch.full((5,), 0.2).double())


def test_confidence_takes_off_candidates_what_may_be_chance() -> None:
    """A candidate on which the target rows disagree goes; one on which they agree keeps its weight."""
    matching = Matching(
        gram=torch.eye(3, dtype=torch.float64),
        cross_gram=torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64),
        target_energy=1.0,
        losses=torch.zeros(3),
        generator=torch.Generator(),
        cross_gram_error=torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64),
    )
    for z, expected in ((0.0, [0.2, 1.0, 0.5]), (0.5, [0.05, 0.95, 0.5]), (1.0, [0.0, 0.9, 0.5])):
        fitted = NonNegativeLeastSquares(confidence=z)(matching).weights
        torch.testing.assert_close(fitted, torch.tensor(expected, dtype=torch.float64))


def test_an_anchor_to_positive_rows_leaves_the_others_at_zero() -> None:
    """In the limit the positive rows have equal weights, whose sum is that of their products over the mean square."""
    matching = Matching(
        gram=torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)),
        cross_gram=torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64),
        target_energy=1.0,
        losses=torch.zeros(3),
        generator=torch.Generator(),
    )
    weak, strong = (
        NonNegativeLeastSquares(anchor=anchor, anchor_to="positive")(matching).weights for anchor in (0.5, 1e8)
    )
    torch.testing.assert_close(weak, torch.tensor([(1 + 0.75) / 2, (2 + 0.75) / 4, 0.0], dtype=torch.float64))
    torch.testing.assert_close(strong, torch.tensor([0.75, 0.75, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
