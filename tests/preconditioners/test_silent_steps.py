"""Steps that move nothing: groups whose learning rate is zero, and first steps that only fill a state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from ftw_optim import GreedyFilter, Scalar, SelectiveOptimizer, preconditioner_of
from tests.support.optimizers import PROBED

Build = Callable[[Any], Optimizer]
SCHEDULES: dict[str, Callable[[int], float]] = {
    "from the first step": lambda step: 0.0,
    "from the third step": lambda step: 0.01 * (step < 2),
    "until the third step": lambda step: 0.01 * (step >= 2),
    "now and again": lambda step: 0.01 * (step % 2),
}
OTHERS: dict[str, Build] = {
    name: PROBED[name]
    for name in ("AdaBelief of torch_optimizer", "Yogi of torch_optimizer", "AdEMAMix of pytorch_optimizer")
}
OTHERS["SGD of schedulefree"] = lambda groups: schedulefree.SGDScheduleFree(groups, lr=0.01)
OTHERS["RAdam of schedulefree"] = lambda groups: schedulefree.RAdamScheduleFree(groups, lr=0.01)


def problem() -> tuple[nn.Sequential, Callable[..., Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    return model, lambda rows=slice(None): functional.cross_entropy(model(x[rows]), y[rows], reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("when", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_a_group_at_learning_rate_zero_counts_as_nothing(build: Build, when: Callable[[int], float]) -> None:
    model, losses = problem()
    inner = build([{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}])
    optimizer = SelectiveOptimizer(inner, model, lambda: losses(slice(2)), filter=GreedyFilter(keep=3))
    optimizer.train()
    applied = 0
    for step in range(5):
        inner.param_groups[0]["lr"] = when(step)
        optimizer.step(losses)
        assert optimizer.selection is not None
        applied += not optimizer.selection.skipped
        still = preconditioner_of(inner, model[0].weight, torch.ones_like(model[0].weight))
        assert isinstance(still, Scalar) == (when(step) == 0.0)
    assert applied == 5


@pytest.mark.parametrize("bare", [0, 1, 3, 4, 6])
def test_first_steps_that_move_nothing_are_made_all_the_same(bare: int) -> None:
    """Those of schedule-free RAdam: else nothing would be applied, and its steps would never be over."""
    model, losses = problem()
    inner = schedulefree.RAdamScheduleFree(model.parameters(), lr=0.01)
    inner.train()
    for _ in range(bare):
        inner.zero_grad()
        losses().mean().backward()
        inner.step()
    optimizer = SelectiveOptimizer(inner, model, lambda: losses(slice(2)), filter=GreedyFilter(keep=3))
    before = copy.deepcopy(model.state_dict())
    for _ in range(8):
        optimizer.step(losses)
        assert optimizer.selection is not None
        assert not optimizer.selection.skipped
    assert inner.param_groups[0]["k"] == bare + 8
    assert not torch.equal(before["0.weight"], model[0].weight)
