"""The step that is measured against: idle, and without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ftw_optim.integrations._trainers.realised import after_idle_step
from tests.support.optimizers import INNER, twin_of, warmed_up, warns_of_overloads


@warns_of_overloads
@pytest.mark.parametrize("name", INNER)
def test_an_idle_step_is_that_at_zero_gradient_and_leaves_no_trace(name: str) -> None:
    optimizer, parameter = warmed_up(INNER[name], 3)
    gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5), dtype=parameter.dtype)
    twins = [twin_of(optimizer) for _ in range(2)]
    for one in (one for group in optimizer.param_groups for one in group["params"]):
        one.grad = gradient.clone()
    before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
    tensors = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
    with after_idle_step(optimizer):
        idle = parameter.detach().clone()
    assert torch.equal(parameter, before)
    leaves, expected = tree_leaves(optimizer.state_dict()), tree_leaves(state)
    for one, other in zip(leaves, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, gradient)
    kept = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
    assert all(one is other for one, other in zip(kept, tensors, strict=True))

    def stepped(twin: Any, given: Tensor) -> Tensor:
        parameters = [one for group in twin.param_groups for one in group["params"]]
        for one in parameters:
            one.grad = given.clone()
        torch.manual_seed(0)
        twin.step()
        return parameters[0].detach()  # type: ignore[no-any-return]

    torch.testing.assert_close(idle, stepped(twins[0], torch.zeros_like(gradient)), rtol=0, atol=0)
    torch.manual_seed(0)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), stepped(twins[1], gradient), rtol=0, atol=0)
