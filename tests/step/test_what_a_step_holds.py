"""A step in which something overflows, and what is still in memory when the inner optimizer steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import Factors, GreedyFilter, SelectiveOptimizer, Sketch
from tests.support.checks import optimizer_of
from tests.support.grids import slow
from tests.support.models import SmallGPT, language_model, seeded

BAD = {"nan and a square that overflows": (float("nan"), 1e25), "two squares that overflow": (1e25, 1e30)}


@pytest.mark.parametrize("scale", [1.0, 256.0])
@pytest.mark.parametrize("gram", ["exact", Sketch(dim=64)], ids=str)
@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_whoever_cannot_be_measured_is_rejected_beside_whoever_is_not_finite(
    bad: tuple[float, float], combine: str, gram: Any, scale: float
) -> None:
    torch.manual_seed(0)
    model, x, factors = nn.Linear(4, 3), torch.randn(6, 4), torch.ones(6)
    factors[0], factors[1] = bad

    def losses(rows: Tensor | None = None) -> Tensor:
        rows = torch.arange(6) if rows is None else rows
        return model(x[rows]).square().mean(1) * factors[rows]

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(x[:2]).square().mean(1),
        filter=GreedyFilter(keep=2),
        gram=gram,
        combine=combine,
    )
    optimizer.backward(losses, grad_scale=scale)
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == [0, 1]
    assert not selection.skipped
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("gram", ["exact", Sketch(dim=64)], ids=str)
def test_a_scaled_gradient_that_overflows_is_no_use_outside(gram: Any) -> None:
    """The random weights of the self-check may keep autograd's sum finite where a factor is not."""
    for seed in range(30):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).half()
        x = torch.randn(2, 4).half()
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            lambda model=model, x=x: model(x).sum(1) * 0.01,
            combine="rerun",
            gram=gram,
            seed=seed,
        )
        optimizer.backward(
            lambda rows=None, model=model, x=x: model(x if rows is None else x[rows]).float().sum(1), grad_scale=7e4
        )
        assert optimizer.selection is not None
        assert optimizer.selection.skipped
        assert model.weight.grad is not None
        assert bool(model.weight.grad.isinf().all())


def test_the_error_of_a_sketch_is_that_of_those_who_are_left() -> None:
    """A candidate whose square is infinite has no part in it."""
    errors = []
    for spoilt in (False, True):
        torch.manual_seed(0)
        model, x, factors = nn.Linear(4, 3), torch.randn(6, 4), torch.ones(6)
        factors[5] = 1e25 if spoilt else 1.0
        rows = torch.arange(6 if spoilt else 5)
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            lambda model=model, x=x: model(x[:2]).square().mean(1),
            gram=Sketch(dim=64),
            combine="rerun",
        )
        optimizer.backward(
            lambda rows=rows, model=model, x=x, factors=factors: model(x[rows]).square().mean(1) * factors[rows]
        )
        assert optimizer.selection is not None
        assert optimizer.selection.sketch is not None
        errors.append(optimizer.selection.sketch.error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("combine", ["factors", slow("graph"), slow("rerun")])
def test_neither_graph_nor_factors_are_held_while_the_inner_optimizer_steps(combine: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(6, 5, 8)
    alive: dict[str, Any] = {}
    seen: list[bool] = []

    def factors() -> int:
        gc.collect()
        return sum(type(thing) is Factors for thing in gc.get_objects())

    before = factors()

    def look(*_: Any) -> None:
        seen.append(factors() > before or any(reference() is not None for reference in alive.values()))

    def losses(rows: Tensor | None = None) -> Tensor:
        hidden = model(x if rows is None else x[rows])
        found: Tensor = hidden.square().mean((1, 2))
        alive["hidden"], alive["losses"] = weakref.ref(hidden), weakref.ref(found)
        return found

    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    inner.register_step_pre_hook(look)
    optimizer = SelectiveOptimizer(inner, model, lambda: model(x[:2]).square().mean((1, 2)), combine=combine)
    for _ in range(3):
        optimizer.step(losses)
    assert seen == [False] * 3


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_is_as_before(enabled: bool, fails: bool) -> None:
    case = language_model(seeded(SmallGPT).double(), 4)
    optimizer = optimizer_of(case)
    seen: list[bool] = []

    def losses() -> Iterator[Tensor]:
        for _ in range(2):
            seen.append(gc.isenabled())
            yield case.losses()
            if fails:
                raise LookupError

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(LookupError) if fails else nullcontext():
            optimizer.backward(losses)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False] * len(seen) != []
