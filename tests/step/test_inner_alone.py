"""Single inner optimizers inside a selective step: what the table of all of them cannot say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ftw_optim import GreedyFilter, SelectiveOptimizer
from tests.support.contract import alike, bare, everyone, plain_step, selective, weights_of
from tests.support.grids import slow
from tests.support.optimizers import SOAPS
from tests.support.releases import EARLY_PYTHON

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of"),  # of add_, which torch_optimizer still calls
    pytest.mark.filterwarnings("ignore:.*follows signs alone"),
    EARLY_PYTHON,
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # dynamo, on what it imports
@pytest.mark.parametrize("name", ["sgd momentum", "adamw", *map(slow, ("adam", "adamw tensor lr", "adagrad"))])
def test_a_compiled_step_is_the_step(name: str) -> None:
    """Without a closure, as training loops compile it."""
    runs = []
    for compiled in (False, True):
        case, optimizer = everyone(name)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.backward(case.losses)
            step()
        torch.compiler.reset()
        runs.append(weights_of(case))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-6)  # compiled, some scalars are float32


@pytest.mark.parametrize("name", SOAPS)
def test_each_step_of_soap_is_the_bare_one_from_the_same_state(name: str) -> None:
    case, optimizer = bare(name)
    wrapped, selected = everyone(name)
    for _ in range(20):
        wrapped.model.load_state_dict(case.model.state_dict())
        selected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        plain_step(case, optimizer)
        selected.step(wrapped.losses)
        alike(name, weights_of(case), weights_of(wrapped))


def test_train_and_eval_reach_a_schedule_free_inner_optimizer() -> None:
    case, optimizer = selective("schedule-free")
    for _ in range(3):
        optimizer.step(case.losses)
    training = weights_of(case)
    optimizer.eval()
    assert any(not torch.equal(a, b) for a, b in zip(training, weights_of(case), strict=True))
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step(case.losses)
    optimizer.train()
    torch.testing.assert_close(weights_of(case), training)
    optimizer.step(case.losses)
    _, other = selective("adamw")
    other.train()  # nothing to do, and no error
    other.eval()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_step_with_a_closure_selects_outside_of_the_graph() -> None:
    case, optimizer = selective("adamw", filter=GreedyFilter(keep=2))
    other, reference = selective("adamw", filter=GreedyFilter(keep=2))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        loss = step(case.losses)
        torch.testing.assert_close(loss, reference.step(other.losses))
    torch.compiler.reset()
    torch.testing.assert_close(weights_of(case), weights_of(other))


@pytest.mark.parametrize("name", ["asgd", "rprop", "sgd momentum", "adamw", "schedule-free"])
def test_a_warm_up_from_a_learning_rate_of_zero_trains(name: str) -> None:
    """A step size that such a step left must not make a map of nothing, by which every later step would be skipped."""
    case, optimizer = selective(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    start = weights_of(case)
    for _ in range(6):
        optimizer.step(case.losses)
        scheduler.step()
        assert optimizer.selection is not None
        assert not optimizer.selection.skipped
    assert any(not torch.equal(a, b) for a, b in zip(start, weights_of(case), strict=True))


def test_rprop_goes_on_after_every_sign_has_turned() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, -1.0)
    ones = torch.ones(2, 1, dtype=torch.float64)
    optimizer = SelectiveOptimizer(
        torch.optim.Rprop(model.parameters(), lr=0.3), model, lambda: model(ones).square().mean(1)
    )
    for _ in range(12):
        optimizer.step(lambda: model(ones).square().mean(1))
    assert abs(model.weight.item()) < 0.05


def test_a_decrease_is_predicted_where_the_optimizer_has_no_learning_rate_of_its_own() -> None:
    case, optimizer = selective("adafactor of transformers")
    optimizer.step(case.losses)
    assert optimizer.selection is not None
    assert optimizer.param_groups[0]["lr"] is None
    assert optimizer.selection.predicted_decrease != 0
