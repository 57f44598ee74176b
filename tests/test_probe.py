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

from ftw_optim import Diagonal, KeepAll, SelectiveOptimizer, UniformWeights, preconditioner_of
from ftw_optim._preconditioners.probe import NotElementwise, check_separable, probed
from tests.models import SmallGPT, language_model, seeded
from tests.test_preconditioners import OPTIMIZERS, SHAPE, warmed_up

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_optimizer


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "adafactor" not in name and "novograd" not in name])
def test_rules_say_what_two_steps_on_a_copy_tell(name: str, steps: int) -> None:
    """In float64, without a reference and with one."""
    optimizer, parameter = warmed_up(OPTIMIZERS[name], steps)
    group = optimizer.param_groups[0]
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE) * torch.tensor([1.0, -1.0, 1.0])
    ones = torch.ones(SHAPE, dtype=torch.float64)
    for given, rtol in ((None, 1e-6), (reference, 1e-9)):
        expected = preconditioner_of(optimizer, parameter, given).apply(ones)
        torch.testing.assert_close(probed(optimizer, parameter, group, given).values, expected, rtol=rtol, atol=0.0)


ELEMENTWISE: dict[str, Callable[[list[Any]], Optimizer]] = {
    name: (lambda p, name=name: getattr(torch_optimizer, name)(p, lr=0.01))  # type: ignore[misc]
    for name in (
        "AccSGD",
        "AdaBelief",
        "AdaBound",
        "AdaMod",
        "AggMo",
        "DiffGrad",
        "MADGRAD",
        "PID",
        "QHAdam",
        "QHM",
        "RAdam",
        "RangerVA",
        "SGDW",
        "SWATS",
        "Yogi",
    )
}
COUPLED: dict[str, Callable[[list[Any]], Optimizer]] = {
    "A2GradUni": lambda p: torch_optimizer.A2GradUni(p),
    "Lamb": lambda p: torch_optimizer.Lamb(p, lr=0.01),
    "Shampoo": lambda p: torch_optimizer.Shampoo(p, lr=0.01),
}


@pytest.mark.filterwarnings("ignore:This overload of")  # of add_ and its like, which torch_optimizer still calls
@pytest.mark.parametrize("steps", [0, 1, 5, 50])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_told_by_trying(name: str, steps: int) -> None:
    """Half the difference of two opposite steps, by a copy of the whole optimizer, is what the map says."""
    optimizer, parameter = warmed_up(ELEMENTWISE[name], steps)
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE)
    before = [group["params"][0].detach().clone() for group in optimizer.param_groups], copy.deepcopy(optimizer.state)
    moved = preconditioner_of(optimizer, parameter, reference)
    assert isinstance(moved, Diagonal)
    assert torch.equal(before[0][0], parameter)
    assert len(before[1]) == len(optimizer.state)

    updates = []
    for sign in (1.0, -1.0):
        # A deep copy of torch_optimizer's loses attributes; the parameter is put back by hand instead.
        state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
        settings = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        held = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            p.grad = sign * reference
        optimizer.step()
        updates.append(parameter.detach() - held[0])
        for p, value in zip((p for g in optimizer.param_groups for p in g["params"]), held, strict=True):
            p.data.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, kept in zip(optimizer.param_groups, settings, strict=True):
            group.update(kept)
    odd = (updates[0] - updates[1]) / 2
    rtol = 1e-3 if name in ("RAdam", "RangerVA") else 1e-6  # these compute in float32, whatever they are given
    torch.testing.assert_close(moved.apply(reference), -odd, rtol=rtol, atol=1e-12)


@pytest.mark.filterwarnings("ignore:This overload of")
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
        lambda p: torch.optim.Rprop(p),
        lambda p: torch_optimizer.Adahessian(p),
        lambda p: torch_optimizer.Lookahead(torch.optim.SGD(p, lr=0.1)),
    ],
    ids=["LBFGS", "SparseAdam", "Rprop", "Adahessian", "Lookahead"],
)
def test_refused_at_construction_with_the_reason(build: Callable[[list[Any]], Any]) -> None:
    model = nn.Linear(2, 2)
    optimizer = build(list(model.parameters()))
    with pytest.raises((NotImplementedError, TypeError), match=r"No preconditioner is known for .*:|Expected a torch"):
        SelectiveOptimizer(optimizer, model, lambda: model(torch.ones(2, 2)).sum(1))


@pytest.mark.filterwarnings("ignore:This overload of")
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_all_kept_at_one_over_n_is_the_bare_optimizer(name: str) -> None:
    """Twenty steps; trying it on copies leaves nothing behind."""
    runs = []
    for selective in (False, True):
        case = language_model(seeded(lambda: SmallGPT(depth=1)).double(), 4)
        optimizer: Any = ELEMENTWISE[name](list(case.model.parameters()))
        if selective:
            optimizer = SelectiveOptimizer(
                optimizer, case.model, case.target_losses, filter=KeepAll(), weight=UniformWeights()
            )
        for _ in range(20):
            if selective:
                optimizer.step(case.losses)
            else:
                optimizer.zero_grad()
                case.losses().mean().backward()
                optimizer.step()
        runs.append([parameter.detach() for parameter in case.model.parameters()])
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-8)


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
