"""One map for several parameters: that of each, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim import Diagonal, Scalar, register_preconditioner
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._preconditioners.registry import _RULES, registered_rule
from tests.support.optimizers import INNER, Build

COUNT, SHAPE = 3, (4, 3)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(SHAPE, dtype=torch.float64, generator=generator).to(dtype)) for _ in range(COUNT)]


def stepped(optimizer: Optimizer, params: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            scale = torch.randn(SHAPE, generator=generator).exp().pow(3)  # entries far apart: the floor is at work
            param.grad = (torch.randn(SHAPE, generator=generator) * scale).to(param)
        optimizer.step()


def references(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    size = torch.randn(COUNT, *SHAPE, generator=generator, dtype=torch.float64).exp().pow(4)
    drawn = torch.randn(COUNT, *SHAPE, generator=generator, dtype=torch.float64) * size
    drawn[0, 0] = 0.0
    return drawn.to(torch.promote_types(dtype, torch.float32))


def groups_of(optimizer: Optimizer, params: list[nn.Parameter]) -> dict[str, dict[str, Any]]:
    return {
        str(number): next(group for group in optimizer.param_groups if any(one is param for one in group["params"]))
        for number, param in enumerate(params)
    }


def stacking() -> list[Any]:
    found = []
    for name, build in INNER.items():
        known = registered_rule(build(parameters()))
        if known is not None and known.stacks:
            found.append(pytest.param(build, id=name))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("build", stacking())
def test_a_stacked_map_is_that_of_each_parameter(build: Build, steps: int, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = build(params)
    stepped(optimizer, params, steps)
    named, groups = {str(number): param for number, param in enumerate(params)}, groups_of(optimizer, params)
    lookup, at = Preconditioners(optimizer), references(dtype)
    kinds = lookup.kinds(named, groups)
    assert kinds.keys() == named.keys()
    for kind in set(kinds.values()):
        names = [name for name in named if kinds[name] == kind]
        index = [int(name) for name in names]
        found = lookup.stacked([named[name] for name in names], groups[names[0]], at[index].clone())
        for number, name in enumerate(names):
            own = lookup(named[name], groups[name], at[int(name)].clone())
            assert isinstance(own, type(found))
            values = found.values[number] if isinstance(found, Diagonal) else torch.tensor(found.value)
            expected = own.values if isinstance(own, Diagonal) else torch.tensor(own.value)  # type: ignore[union-attr]
            rtol = 1e-12 if values.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(values, expected, rtol=rtol, atol=0.0)


def test_the_optimizers_that_people_use_stack() -> None:
    for cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad):
        assert _RULES[torch.typename(cls)].stacks


def test_parameters_at_different_steps_or_in_different_groups_have_maps_of_their_own() -> None:
    params = parameters()
    optimizer = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], lr=0.01)
    stepped(optimizer, params[:1], 1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    named = {str(number): param for number, param in enumerate(params)}
    kinds = Preconditioners(optimizer).kinds(named, groups_of(optimizer, params))
    assert len(set(kinds.values())) == 3


class Odd(torch.Tensor):
    """A tensor that keeps its entries in a way of its own."""


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "of another shape": lambda state: state.update(exp_avg_sq=torch.ones(4, dtype=torch.float64)),
    "of a class of its own": lambda state: state.update(exp_avg_sq=torch.ones(4, 3).as_subclass(Odd)),
    "no tensor": lambda state: state.update(history=[1.0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_that_cannot_be_stacked_leaves_the_parameter_alone(change: Callable[[dict[str, Any]], object]) -> None:
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=0.01)
    stepped(optimizer, params, 1)
    change(optimizer.state[params[1]])
    named = {str(number): param for number, param in enumerate(params)}
    assert Preconditioners(optimizer).kinds(named, groups_of(optimizer, params)).keys() == {"0", "2"}


def test_parameters_of_one_entry_stay_alone() -> None:
    params = [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.AdamW(params, lr=0.01)
    named = {str(number): param for number, param in enumerate(params)}
    assert Preconditioners(optimizer).kinds(named, groups_of(optimizer, params)) == {}


def test_a_rule_that_returns_something_else_for_several_is_refused() -> None:
    class Wrong(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    register_preconditioner(Wrong, stacks=True)(lambda param, group, state, reference: reference)  # type: ignore[arg-type,return-value]
    try:
        params = parameters()
        optimizer = Wrong(params, lr=0.1)
        with pytest.raises(TypeError, match="expected a Scalar or a Diagonal for 3 stacked parameters, got Tensor"):
            Preconditioners(optimizer).stacked(params, optimizer.param_groups[0], references())
    finally:
        del _RULES[torch.typename(Wrong)]


def test_a_learning_rate_of_zero_in_every_group_counts_as_one() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.0)
    found = Preconditioners(optimizer).stacked(params, optimizer.param_groups[0], references())
    assert isinstance(found, Scalar)
    assert found.value == 1.0
