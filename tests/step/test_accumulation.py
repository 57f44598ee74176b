"""Gradients that add up, and parameters that get none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import SelectiveOptimizer
from tests.support.models import mlp
from tests.support.steps import WAYS, build

pytestmark = pytest.mark.usefixtures("fixed_seed")


@pytest.mark.parametrize("combine", [*WAYS, "rerun"])
def test_backward_adds_and_scales_as_a_loss_does(combine: str) -> None:
    case, optimizer = build(combine)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    expected: dict[str, Tensor] = {}
    for rows, scale in ((first, 1.0), (second, 512.0)):
        twin_case, twin = build(combine)
        twin.backward(lambda rows=None, part=rows, c=twin_case: c.losses(part if rows is None else part[rows]))
        for name, parameter in twin_case.model.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, torch.zeros(())) + scale * parameter.grad
        optimizer.backward(
            lambda rows=None, part=rows: case.losses(part if rows is None else part[rows]), grad_scale=scale
        )
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_parameters_outside_the_optimizer_get_no_gradient() -> None:
    for combine in WAYS:
        case = mlp(torch.float64, 6)
        inner = torch.optim.AdamW([*case.model.first.parameters(), case.model.last.weight])  # type: ignore[misc,union-attr]
        optimizer = SelectiveOptimizer(inner, case.model, case.target_losses, combine=combine)
        optimizer.step(case.losses)
        got = [name for name, p in case.model.named_parameters() if p.grad is not None]
        assert got == ["first.weight", "first.bias", "last.weight"]


def test_parameters_frozen_and_thawed_between_steps() -> None:
    case, optimizer = build()
    for trained in (["first"], ["first", "last"], ["last"]):
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trained)
        optimizer.step(case.losses)
        with_gradient = {name.split(".")[0] for name, p in case.model.named_parameters() if p.grad is not None}
        assert set(trained) <= with_gradient
        assert {row.name.split(".")[0] for row in optimizer.coverage} == set(trained)


def test_a_parameter_the_losses_do_not_reach_keeps_none() -> None:
    for combine in WAYS:
        case = mlp(torch.float64, 6)
        case.model.unused = nn.Linear(2, 2).double()  # type: ignore[assignment]
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, combine=combine
        )
        optimizer.step(case.losses)
        assert case.model.unused.weight.grad is None  # type: ignore[union-attr]
        assert case.model.unused.weight not in optimizer.state  # type: ignore[union-attr]


def test_clearing_gradients_forgets_backwards_that_were_never_stepped() -> None:
    case, optimizer = build()
    for tensor in case.candidates.values():
        tensor[:] = tensor[:1].clone()
    optimizer.target = case.losses
    optimizer.step(case.losses)
    optimizer.backward(case.losses)  # a scaler may skip its step
    optimizer.zero_grad()
    optimizer.target = lambda: -case.losses()  # type: ignore[assignment]
    before = copy.deepcopy(list(case.model.parameters()))
    optimizer.backward(case.losses)
    optimizer.step()
    torch.testing.assert_close(list(case.model.parameters()), before, rtol=0, atol=0)
