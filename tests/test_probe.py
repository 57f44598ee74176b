"""Optimizers that no rule knows: what two steps on a copy tell of them, and whom they cannot tell of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim import Diagonal, SelectiveOptimizer, preconditioner_of
from ftw_optim._preconditioners.probe import NotElementwise, check_separable, couples_decay, probed
from tests.optimizers import ELEMENTWISE, PROBED, SHAPE, update_of, warmed_up, warns_of_overloads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer
    import torch_optimizer


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_rules_say_what_two_steps_on_a_copy_tell(name: str, steps: int) -> None:
    """In float64, without a reference and with one."""
    optimizer, parameter = warmed_up(ELEMENTWISE[name], steps)
    group = optimizer.param_groups[0]
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE) * torch.tensor([1.0, -1.0, 1.0])
    ones = torch.ones(SHAPE, dtype=torch.float64)
    if group["weight_decay"]:
        coupled = couples_decay(optimizer, parameter, group, reference)
        assert coupled is not any(word in name for word in ("adamw", "decoupled", "schedule-free"))
        group = {**group, "decoupled_weight_decay": not coupled}
    for given, rtol in ((None, 1e-6), (reference, 1e-9)):
        expected = preconditioner_of(optimizer, parameter, given).apply(ones)
        torch.testing.assert_close(probed(optimizer, parameter, group, given).values, expected, rtol=rtol, atol=0.0)


pytestmark = warns_of_overloads

COUPLED: dict[str, Callable[[list[Any]], Optimizer]] = {
    "A2GradUni": lambda p: torch_optimizer.A2GradUni(p),
    "Lamb": lambda p: pytorch_optimizer.Lamb(p, lr=0.01),
    "Shampoo": lambda p: pytorch_optimizer.Shampoo(p, lr=0.01),
}


@pytest.mark.parametrize("steps", [0, 1, 5, 50])
@pytest.mark.parametrize("name", PROBED)
def test_elementwise_optimizers_are_told_by_trying(name: str, steps: int) -> None:
    """Half the difference of two opposite steps, by a copy of the whole optimizer, is what the map says."""
    optimizer, parameter = warmed_up(PROBED[name], steps)
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE)
    before = [group["params"][0].detach().clone() for group in optimizer.param_groups], copy.deepcopy(optimizer.state)
    moved = preconditioner_of(optimizer, parameter, reference)
    assert isinstance(moved, Diagonal)
    assert torch.equal(before[0][0], parameter)
    assert len(before[1]) == len(optimizer.state)

    odd = (update_of(optimizer, reference) - update_of(optimizer, -reference)) / 2
    if not odd.any():
        assert steps == 0, "a first step that only fills the state"
        return
    computes_in_float32 = ("RAdam of torch_optimizer", "RangerVA of torch_optimizer", "RangerQH of torch_optimizer")
    rtol = 1e-3 if name.startswith("Ranger") or name in computes_in_float32 else 1e-6
    torch.testing.assert_close(moved.apply(reference), -odd, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_optimizers_that_couple_entries_are_found_out(name: str) -> None:
    optimizer, parameter = warmed_up(COUPLED[name], 5)
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    with pytest.raises(NotElementwise, match="depends on the gradients of other entries"):
        check_separable(optimizer, parameter, optimizer.param_groups[0], reference)
    with pytest.raises(NotImplementedError, match=rf"{name}.*trying it on a copy did not tell.*@register_precond"):
        preconditioner_of(optimizer, parameter, reference)


class Sign(Optimizer):
    """Follows the sign of the gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(group["lr"] * param.grad.sign())


def test_an_update_without_history_that_only_looks_elementwise_is_looked_at_again() -> None:
    optimizer, parameter = warmed_up(COUPLED["Lamb"], 0)
    reference = torch.ones(SHAPE, dtype=torch.float64)
    preconditioner_of(optimizer, parameter, reference)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.linspace(-1, 2, 12, dtype=torch.float64).view(SHAPE)
    optimizer.step()
    with pytest.raises(NotImplementedError, match="depends on the gradients of other entries"):
        preconditioner_of(optimizer, parameter, torch.linspace(0.3, 2, 12, dtype=torch.float64).view(SHAPE))


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.SparseAdam(p),
        lambda p: torch_optimizer.Adahessian(p),
        lambda p: torch_optimizer.Lookahead(torch.optim.SGD(p, lr=0.1)),
    ],
    ids=["LBFGS", "SparseAdam", "Adahessian", "Lookahead"],
)
def test_refused_at_construction_with_the_reason(build: Callable[[list[Any]], Any]) -> None:
    model = nn.Linear(2, 2)
    optimizer = build(list(model.parameters()))
    with pytest.raises((NotImplementedError, TypeError), match=r"No preconditioner is known for .*:|Expected a torch"):
        SelectiveOptimizer(optimizer, model, lambda: model(torch.ones(2, 2)).sum(1))


def _apply(optimizer: Optimizer, gradient: Tensor) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = gradient
    optimizer.step()


def test_a_sign_is_no_multiple_of_the_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer = Sign([parameter])
    _apply(optimizer, torch.ones(SHAPE, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="no multiple of it"):
        preconditioner_of(optimizer, parameter)
