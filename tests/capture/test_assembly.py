"""Factors that several layers give of one parameter: of one shape, or refused by the same name in every way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import Factors, SelectiveOptimizer, register_layer


class Upright(nn.Linear):
    """``y = x W'``."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Turned(Upright):
    """The same, by a rule that takes the sides for each other."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight)


class Shared(nn.Module):
    """Two layers that share a weight, of 4 x 3 entries."""

    def __init__(self) -> None:
        super().__init__()
        self.upright, self.turned = Upright(3, 4, bias=False), Turned(3, 4, bias=False)
        self.turned.weight = self.upright.weight

    def forward(self, x: Tensor) -> Tensor:
        return (self.upright(x) + self.turned(x)).square().mean((1, 2))


@pytest.fixture
def disagreeing_rules(restored_rules: None) -> None:
    register_layer(Upright)(lambda _, inputs, grad: {"weight": Factors(left=grad, right=inputs[0])})
    register_layer(Turned)(lambda _, inputs, grad: {"weight": Factors(left=2 * inputs[0], right=grad)})


@pytest.mark.usefixtures("disagreeing_rules")
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_rules_that_disagree_about_a_shared_parameter_are_refused_by_its_name(combine: str, self_check: bool) -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(5, 2, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(x[:2]),
        combine=combine,
        self_check=self_check,
    )
    before = model.upright.weight.clone()
    with pytest.raises(RuntimeError, match=r"share upright.weight return gradients of (4 x 3 and of 3 x 4|3 x 4 and)"):
        optimizer.step(lambda rows=None: model(x if rows is None else x[rows]))
    assert torch.equal(model.upright.weight, before)
    assert model.upright.weight.grad is None
