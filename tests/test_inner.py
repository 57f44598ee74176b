"""Every supported inner optimizer inside a selective step: the contract that they all keep, in one table."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, UniformWeights
from tests.models import Case, mlp
from tests.test_preconditioners import OPTIMIZERS
from tests.test_probe import ELEMENTWISE

pytestmark = pytest.mark.filterwarnings("ignore:This overload of")  # of add_, which torch_optimizer still calls

MAXIMIZING = {name for name in OPTIMIZERS if "maximize" in name or name == "adamax"}
INNER: dict[str, Callable[[list[Any]], Optimizer]] = {
    **{name: build for name, build in OPTIMIZERS.items() if name != "adamw two groups"},
    **{f"{name}, probed": build for name, build in ELEMENTWISE.items()},
    "muon": lambda p: torch.optim.Muon(p, lr=0.01),
}


def case_for(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, list[nn.Parameter]]:
    """Without gradients that are nothing but rounding, of which an optimizer that divides by their size makes steps."""
    case = mlp(dtype, 5)
    parameters = list(case.model.parameters())
    if name == "muon":  # which takes matrices alone
        for parameter in parameters:
            parameter.requires_grad_(parameter.ndim == 2)
        parameters = [parameter for parameter in parameters if parameter.ndim == 2]
    return case, parameters


def selective(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Case, SelectiveOptimizer]:
    case, parameters = case_for(name, dtype)
    return case, SelectiveOptimizer(INNER[name](parameters), case.model, case.target_losses, **options)


def weights_of(case: Case) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in case.model.parameters()]


@pytest.mark.parametrize("name", INNER)
def test_all_kept_at_one_over_n_is_the_bare_optimizer(name: str) -> None:
    """For twenty steps, to the rounding that they amplify."""
    case, parameters = case_for(name)
    bare = INNER[name](parameters)
    for _ in range(20):
        bare.zero_grad()
        case.losses().mean().backward()
        bare.step()
    wrapped, optimizer = selective(name, filter=KeepAll(), weight=UniformWeights())
    for _ in range(20):
        optimizer.step(wrapped.losses)
    # Muon orthogonalises in bfloat16, where a last bit of the gradient may turn one of the update.
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if name == "muon" else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(weights_of(case), weights_of(wrapped), **tolerance)


GROWS = pytest.mark.xfail(
    strict=True,
    reason="a gradient larger than all before shrinks what Adamax's old momentum moves, by more than it moves itself",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=GROWS if name == "adamax" else ()) for name in INNER])
def test_predicted_and_realised_movement_agree_in_sign(name: str) -> None:
    """Along the combined gradient, beyond what the step would do without any; from the second step on."""
    case, optimizer = selective(name, filter=GreedyFilter(keep=3))
    optimizer.step(case.losses)
    for _ in range(3):
        optimizer.backward(case.losses)
        selection = optimizer.selection
        assert selection is not None
        assert selection.gram.diagonal().min() > 0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        starts, states = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.optimizer.state_dict())
        moves = []
        for factor in (0.0, 1.0):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = factor * gradient
            optimizer.optimizer.step()
            moves.append([p.detach() - start for p, start in zip(parameters, starts, strict=True)])
            for parameter, start in zip(parameters, starts, strict=True):
                parameter.data.copy_(start)
            optimizer.optimizer.load_state_dict(copy.deepcopy(states))
        along = sum(
            float(((one - still) * gradient).sum())
            for one, still, gradient in zip(moves[1], moves[0], gradients, strict=True)
        )
        assert along < 0 if name not in MAXIMIZING else along > 0
        optimizer.zero_grad()
        optimizer.step(case.losses)


@pytest.mark.parametrize("name", INNER)
def test_a_resumed_run_is_the_run(name: str) -> None:
    """Bit by bit, selection included, through a file that ``weights_only`` loads.

    In float32: torch loads a state in the parameter's precision, also where the optimizer keeps it in float32.
    """
    case, optimizer = selective(name, torch.float32, filter=GreedyFilter(keep=3))
    for _ in range(3):
        optimizer.step(case.losses)
    file = io.BytesIO()
    torch.save({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(3):
        optimizer.step(case.losses)
    again, resumed = selective(name, torch.float32, filter=GreedyFilter(keep=3))
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again.model.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        resumed.step(again.losses)
    assert optimizer.selection is not None
    assert resumed.selection is not None
    assert optimizer.selection.kept.tolist() == resumed.selection.kept.tolist()
    assert torch.equal(optimizer.selection.weights, resumed.selection.weights)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(case), weights_of(again), strict=True))


@pytest.mark.parametrize("name", INNER)
def test_a_scheduler_moves_the_inner_learning_rate_before_and_after_a_load(name: str) -> None:
    case, optimizer = selective(name)
    if optimizer.param_groups[0]["lr"] is None:
        pytest.skip("it has no learning rate of its own")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = float(optimizer.param_groups[0]["lr"])
    optimizer.step(case.losses)
    scheduler.step()
    assert float(optimizer.optimizer.param_groups[0]["lr"]) == pytest.approx(start / 2)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(case.losses)
    scheduler.step()
    assert float(optimizer.optimizer.param_groups[0]["lr"]) == pytest.approx(start / 4)
