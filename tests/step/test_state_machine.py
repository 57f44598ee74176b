"""Any order of what training loops do: with the selection that is none, wrapped and bare never differ."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights
from tests.support.models import mlp
from tests.support.optimizers import INNER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),  # before any step: any order
]

CASE = mlp(torch.float64, 5)
NAMES = ["sgd momentum", "adam amsgrad", "adamw", "nadam", "adagrad", "adafactor", "rmsprop", "schedule-free"]


def losses_of(model: nn.Module) -> Tensor:
    return CASE.losses_of(model, CASE.candidates)


class Side:
    """A model with its optimizer and scheduler, bare or wrapped."""

    def __init__(self, name: str, *, wrapped: bool) -> None:
        self.wrapped = wrapped
        self.model = copy.deepcopy(CASE.model)
        parameters = list(self.model.parameters())
        self.later = [parameters[4:]]  # for a group of its own
        inner = INNER[name](parameters[:4])
        self.optimizer: Any = inner
        if wrapped:
            self.optimizer = SelectiveOptimizer(
                inner, self.model, self.target, filter=KeepAll(), weight=UniformWeights()
            )
        self.schedule()

    def target(self) -> Tensor:
        return CASE.losses_of(self.model, CASE.target)

    def schedule(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.7)

    def step(self) -> None:
        if self.wrapped:
            self.optimizer.step(lambda: losses_of(self.model))
        else:
            self.optimizer.zero_grad()
            self.backward(1.0)
            self.optimizer.step()

    def backward(self, scale: float) -> None:
        if self.wrapped:
            self.optimizer.backward(lambda: losses_of(self.model), grad_scale=scale)
        else:
            # The model's other parameters get no gradient from the wrapper.
            updated = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            torch.autograd.backward(losses_of(self.model).mean() * scale, inputs=updated)

    def replace(self, way: str) -> None:
        """By a copy of everything; a scheduler belongs to one optimizer, and is made anew."""
        whole = (self.model, self.optimizer, self.later)
        self.model, self.optimizer, self.later = (
            copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
        )
        if self.wrapped:
            self.optimizer.target = self.target
        self.schedule()


class WrappedAndBare(RuleBasedStateMachine):
    """Each rule does the same to both sides."""

    @initialize(name=st.sampled_from(NAMES))
    def start(self, name: str) -> None:
        self.wrapped, self.bare = self.sides = Side(name, wrapped=True), Side(name, wrapped=False)
        self.saved: tuple[Any, Any] | None = None

    @rule()
    def step(self) -> None:
        for side in self.sides:
            side.step()

    @rule(scale=st.sampled_from([1.0, 0.5, 256.0]))
    def backward(self, scale: float) -> None:
        for side in self.sides:
            side.backward(scale)

    @rule(closure=st.booleans())
    def step_on_whatever_grad_holds(self, closure: bool) -> None:
        for side in self.sides:
            side.optimizer.step((lambda: None) if closure else None)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for side in self.sides:
            side.optimizer.zero_grad(set_to_none=set_to_none)

    @rule()
    def scheduler_step(self) -> None:
        for side in self.sides:
            side.scheduler.step()

    @precondition(lambda self: self.wrapped.later)
    @rule()
    def add_group(self) -> None:
        for side in self.sides:
            side.optimizer.add_param_group({"params": side.later.pop(), "weight_decay": 0.05})

    @rule(index=st.integers(0, 5))
    def freeze_or_thaw(self, index: int) -> None:
        for side in self.sides:
            parameter = list(side.model.parameters())[index]
            parameter.requires_grad_(not parameter.requires_grad)
            if not any(p.requires_grad for group in side.optimizer.param_groups for p in group["params"]):
                parameter.requires_grad_(True)

    @rule(of_wrapped=st.booleans())
    def save(self, of_wrapped: bool) -> None:
        side = self.wrapped if of_wrapped else self.bare
        self.saved = copy.deepcopy((side.optimizer.state_dict(), side.model.state_dict()))

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        """Whichever side it is of; one with other groups is refused by both."""
        assert self.saved is not None
        optimizer_state, model_state = copy.deepcopy(self.saved)
        for side in self.sides:
            if len(optimizer_state["param_groups"]) != len(side.optimizer.param_groups):
                with pytest.raises(ValueError, match="parameter groups"):
                    side.optimizer.load_state_dict(copy.deepcopy(optimizer_state))
            else:
                side.optimizer.load_state_dict(copy.deepcopy(optimizer_state))
                side.model.load_state_dict(model_state)

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, way: str) -> None:
        for side in self.sides:
            side.replace(way)

    @rule(backward=st.booleans())
    def closure_that_raises(self, backward: bool) -> None:
        def fails() -> Tensor:
            losses_of(self.wrapped.model)
            raise LookupError("no more data")

        with pytest.raises(LookupError):
            (self.wrapped.optimizer.backward if backward else self.wrapped.optimizer.step)(fails)

    @invariant()
    def nothing_differs(self) -> None:
        if not hasattr(self, "sides"):
            return
        tolerance = {"rtol": 1e-7, "atol": 1e-9}
        for one, other in zip(self.wrapped.model.parameters(), self.bare.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, **tolerance)
            assert (one.grad is None) is (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, **tolerance)
        wrapped, bare = self.wrapped.optimizer.state_dict(), self.bare.optimizer.state_dict()
        assert wrapped.pop("selective")
        torch.testing.assert_close(wrapped["state"], bare["state"], **tolerance)
        assert wrapped["param_groups"] == bare["param_groups"]
        assert self.wrapped.optimizer.param_groups is self.wrapped.optimizer.optimizer.param_groups


TestWrappedAndBare = WrappedAndBare.TestCase
TestWrappedAndBare.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
