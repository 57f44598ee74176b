"""What a closure may return, raise and do on its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.steps import WAYS, build

pytestmark = pytest.mark.usefixtures("fixed_seed")


WRONG_CLOSURES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "reduced": (
        lambda losses: losses.mean(),
        ValueError,
        r"one loss for each candidate.*reduction=.none.*shape \(\)",
    ),
    "two axes": (lambda losses: losses[:, None], ValueError, r"got shape \(6, 1\)"),
    "detached": (lambda losses: losses.detach(), ValueError, "got losses that are detached"),
    "empty": (lambda losses: losses[:0], ValueError, "got an empty batch"),
    "fewer": (lambda losses: losses[:4], ValueError, "returned 4 losses, but the model ran on 6 rows"),
    "a list": (lambda losses: list(losses), TypeError, "got list"),
    "an iterator of numbers": (lambda losses: iter(losses.tolist()), TypeError, "The closure must return one loss"),
    "an iterator of scalars": (lambda losses: iter(losses), ValueError, "keep the candidates apart"),
    "an iterator of nothing": (lambda losses: iter(()), ValueError, "yields losses"),
    "a number": (lambda losses: float(losses.detach().sum()), TypeError, "got float"),
}


@pytest.mark.parametrize("method", ["step", "backward"])
@pytest.mark.parametrize("combine", WAYS)
@pytest.mark.parametrize("wrong", WRONG_CLOSURES)
def test_wrong_returns_say_what_a_closure_must_return(
    wrong: str, combine: str, method: str, unchanged: Callable[..., None]
) -> None:
    change, error, message = WRONG_CLOSURES[wrong]
    case, optimizer = build(combine)

    def failing() -> None:
        with pytest.raises(error, match=message):
            getattr(optimizer, method)(lambda: change(case.losses()))

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("combine", WAYS)
def test_a_closure_that_raises_leaves_everything_as_it_was(combine: str, unchanged: Callable[..., None]) -> None:
    case, optimizer = build(combine)

    def raises() -> Tensor:
        case.losses()
        raise KeyError("the user's own")

    def failing() -> None:
        with pytest.raises(KeyError, match="the user's own"):
            optimizer.step(raises)

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("combine", WAYS)
def test_a_backward_pass_that_raises_leaves_everything_as_it_was(combine: str, unchanged: Callable[..., None]) -> None:
    case, optimizer = build(combine)
    broken = True

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            if broken:
                raise ArithmeticError("in the backward")
            return grads[0]

    case.model.middle.register_forward_hook(
        lambda module, args, output: Fails.apply(output) if broken else None  # type: ignore[no-untyped-call]
    )

    def failing() -> None:
        nonlocal broken
        with pytest.raises(ArithmeticError, match="in the backward"):
            optimizer.step(case.losses)
        broken = False
        case.model.middle._forward_hooks.clear()

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("combine", WAYS)
def test_a_closure_is_run_once_with_gradients_enabled(combine: str) -> None:
    case, optimizer = build(combine)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        losses: Tensor = case.losses()
        return losses

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert seen == [True]
    assert not loss.requires_grad
    assert optimizer.selection is not None
    assert not optimizer.selection.skipped


def test_step_without_a_closure_is_the_inner_step() -> None:
    for closure in (None, lambda: None):
        case, optimizer = build()
        twin = copy.deepcopy(case.model)
        bare = torch.optim.AdamW(twin.parameters(), lr=0.01)
        for model in (case.model, twin):
            case.losses_of(model, case.candidates).mean().backward()
        bare.step()
        assert optimizer.step(closure) is None
        torch.testing.assert_close(list(case.model.parameters()), list(twin.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("combine", WAYS)
def test_a_closure_with_its_own_backward_gets_the_inner_step_and_one_warning(combine: str, as_float: bool) -> None:
    case, optimizer = build(combine)
    twin = copy.deepcopy(case.model)
    bare = torch.optim.AdamW(twin.parameters(), lr=0.01)

    def own(model: nn.Module, opt: torch.optim.Optimizer) -> Any:
        opt.zero_grad()
        loss = case.losses_of(model, case.candidates).mean()
        loss.backward()
        return loss.item() if as_float else loss

    with pytest.warns(UserWarning, match="ran its own backward and returned a scalar"):
        optimizer.step(lambda: own(case.model, optimizer))
    optimizer.step(lambda: own(case.model, optimizer))  # a second warning would be an error
    for _ in range(2):
        own(twin, bare)
        bare.step()
    torch.testing.assert_close(list(case.model.parameters()), list(twin.parameters()), rtol=1e-12, atol=1e-14)


def test_step_discards_the_old_gradient_and_leaves_the_applied_one() -> None:
    case, optimizer = build(inner=torch.optim.SGD)
    before = [p.detach().clone() for p in case.model.parameters()]
    for parameter in case.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    optimizer.step(case.losses)
    for parameter, old in zip(case.model.parameters(), before, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), old - 0.01 * parameter.grad)


def test_a_closure_with_its_own_backward_that_returns_none_keeps_its_gradients() -> None:
    """As a closure of manual optimisation does."""
    for combine in WAYS:
        case, optimizer = build(combine)
        twin = copy.deepcopy(case.model)
        bare = torch.optim.AdamW(twin.parameters(), lr=0.01)
        bare.zero_grad()
        case.losses_of(twin, case.candidates).mean().backward()
        bare.step()
        optimizer.step(lambda case=case: case.losses().mean().backward())
        torch.testing.assert_close(list(case.model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("select", [True, False])
def test_a_closure_without_candidates_does_not_apply_what_was_skipped(select: bool) -> None:
    """Not even a gradient of zero, which would decay momentum and parameters."""
    case, optimizer = build()
    optimizer.step(case.losses)
    optimizer.target = lambda: -case.losses()  # type: ignore[assignment]
    for tensor in case.candidates.values():
        tensor[:] = tensor[:1].clone()
    before = copy.deepcopy(list(case.model.parameters()))
    optimizer.backward(case.losses, grad_scale=2.0)
    assert optimizer.selection is not None
    assert optimizer.selection.skipped
    optimizer.step(lambda: None, select=select)
    torch.testing.assert_close(list(case.model.parameters()), before, rtol=0, atol=0)


def test_without_selecting_a_closure_is_run_and_the_gradient_applied() -> None:
    """As if there were no closure: once, gradients enabled, its value returned, the target left alone."""
    calls: list[bool] = []

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        return "value"

    results = []
    for given in (None, closure):
        case, optimizer = build()
        optimizer.backward(case.losses)
        optimizer.target = lambda: pytest.fail("the target was evaluated")  # type: ignore[assignment]
        with torch.no_grad():
            value = optimizer.step(given, select=False)
        assert value == (given and "value")
        results.append(list(case.model.parameters()))
    assert calls == [True]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_an_inner_step_that_raises_leaves_gradients_and_counters_as_they_were(unchanged: Callable[..., None]) -> None:
    case, optimizer = build()

    def refuse(*args: Any) -> None:
        raise ArithmeticError("by the user's hook")

    def failing() -> None:
        handle = optimizer.optimizer.register_step_pre_hook(refuse)
        with pytest.raises(ArithmeticError, match="by the user's hook"):
            optimizer.step(case.losses)
        handle.remove()

    unchanged(case, optimizer, failing)
