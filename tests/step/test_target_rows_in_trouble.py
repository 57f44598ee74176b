"""Target rows that take part in the step, where something goes wrong, and what else may be in such a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import KeepAll, NonNegativeLeastSquares, SelectiveOptimizer, TargetGradient
from tests.support.checks import training_on_target as optimizer_of
from tests.support.models import CASES, trained

N = 6


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
@pytest.mark.parametrize("bad", [[0], [1, 4], list(range(N))], ids=str)
def test_candidates_that_are_not_finite_are_rejected_beside_target_rows(combine: str, bad: list[int]) -> None:
    case = CASES["mlp"](torch.float64, N)
    factors = torch.ones(N, dtype=torch.float64)
    factors[bad] = torch.nan

    def losses(rows: Tensor | None = None) -> Tensor:
        return case.losses(rows) * (factors if rows is None else factors[rows])

    optimizer = optimizer_of(case, combine=combine)
    optimizer.step(losses)
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == bad
    assert not selection.skipped
    good = [row for row in range(N) if row not in bad]
    assert set(selection.kept.tolist()) <= set(good)
    assert all(bool(p.isfinite().all()) for p in trained(case).values())


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_a_target_row_that_is_not_finite_is_an_error_that_changes_nothing(combine: str, scale: float) -> None:
    case = CASES["mlp"](torch.float64, N)
    optimizer = optimizer_of(case, combine=combine)
    optimizer.step(case.losses)
    before, selection = copy.deepcopy(trained(case)), optimizer.selection
    factors = torch.ones(len(case.target["x"]), dtype=torch.float64)
    factors[1] = torch.inf
    optimizer.target = lambda: case.target_losses() * factors  # type: ignore[assignment]
    with pytest.raises(ValueError, match="finite target losses"):
        optimizer.backward(case.losses, grad_scale=scale)
    assert optimizer.selection is selection
    for name, parameter in trained(case).items():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("self_check", [True, "first", 100])
def test_a_self_check_of_target_rows_does_not_vouch_for_as_many_candidates(self_check: Any) -> None:
    """A loss that sorts its rows before the model is wrong where they are not sorted already; the target's are."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def losses(x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        found: Tensor = model(x[order]).square()[:, 0]
        return found[order.argsort()]

    sorted_rows = torch.arange(4.0, dtype=torch.float64)[:, None]
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: losses(sorted_rows),
        combine="factors",
        train_on_target=True,
        self_check=self_check,
    )
    with pytest.raises(RuntimeError, match="Self-check"):
        optimizer.step(lambda: losses(sorted_rows.flip(0).roll(1, 0)))


def test_candidates_run_again_beside_target_rows_where_the_graph_gives_no_finite_gradient() -> None:
    """One that is not kept may have an infinite gradient where nothing is captured, and zero times that is NaN."""
    scored, unscored = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 1, bias=False).double()
    model = nn.Sequential(unscored, nn.Linear(1, 3).double(), scored)
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [torch.inf, 0.0, 1.0]], dtype=torch.float64)

    def losses(rows: Tensor) -> Tensor:
        hidden = unscored(torch.where(rows.isinf(), 0.0, rows))
        # sqrt at 0: a finite value with an infinite derivative below, which no scored layer meets.
        last, edge = rows[:, 0].isinf(), hidden.clone()
        edge[last] = (hidden[last] - hidden[last].detach()).abs().sqrt()
        found: Tensor = scored(model[1](edge)).square().sum(1)
        return found

    target = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.5]], dtype=torch.float64)

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: losses(target),
        filter=lambda matching, *more: torch.tensor([0, 1]),  # type: ignore[arg-type]
        combine="graph",
        scored=lambda name, parameter: name.startswith("2."),
        train_on_target=True,
    )
    optimizer.backward(lambda rows=None: losses(x if rows is None else x[rows]))
    selection = optimizer.selection
    assert selection is not None
    assert selection.combine == "rerun"
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_what_cannot_be_asked_is_refused_by_name() -> None:
    case = CASES["mlp"](torch.float64, N)
    with pytest.raises(ValueError, match=r"refresh_every=1, got 4.*decay="):
        optimizer_of(case, target=TargetGradient(case.target_losses, refresh_every=4))
    optimizer = optimizer_of(case, target=lambda: case.target_losses(torch.tensor([0])))
    with pytest.raises(ValueError, match="two target rows"):
        optimizer.step(case.losses)
    with pytest.raises(TypeError, match="True, False or a closure"):
        optimizer_of(case, train_on_target=3)
    with pytest.raises(ValueError, match="anchor_to must be"):
        NonNegativeLeastSquares(anchor_to="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence must be"):
        NonNegativeLeastSquares(confidence=-1.0)


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_the_target_closure_is_called_once_and_what_is_applied_is_what_was_measured(combine: str) -> None:
    """It may draw dropout masks, or hand out the next batch of a cycle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double().train()
    batches = iter(torch.randn(2, 3, 4, dtype=torch.float64))
    kept: list[list[Tensor]] = []

    def target() -> Tensor:
        losses: Tensor = model(next(batches))[:, 0]
        kept.append([torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses])  # type: ignore[misc]
        return losses

    def closure(rows: Tensor | None = None) -> Tensor:
        x = torch.ones(2, 4, dtype=torch.float64)
        losses: Tensor = 0.0 * model(x if rows is None else x[rows])[:, 0]
        return losses

    options: dict[str, Any] = {"filter": KeepAll(), "combine": combine, "train_on_target": True, "self_check": False}
    optimizer = SelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, target, **options)
    optimizer.backward(closure)
    assert len(kept) == 1
    assert optimizer.selection is not None
    for number, parameter in enumerate(model.parameters()):
        weights = optimizer.selection.target_weights
        expected = torch.stack([w * row[number] for w, row in zip(weights, kept[0], strict=True)]).sum(0)
        torch.testing.assert_close(parameter.grad, expected)


def test_a_copy_and_a_checkpoint_go_on_alike() -> None:
    found = []
    for stop in (None, 2):
        case = CASES["small-gpt"](torch.float64, N)
        target = TargetGradient(case.target_losses, decay=0.75)
        optimizer = optimizer_of(case, target=target)
        for step in range(4):
            if step == stop:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = optimizer_of(case, target=target)
                optimizer.load_state_dict(state)
            optimizer.step(case.losses)
        found.append([p.detach().clone() for p in trained(case).values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
