"""What a model is made of is kept from step to step, and every change of it is noticed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ftw_optim._capture.coverage import table
from ftw_optim._capture.owners import owners
from ftw_optim._capture.plan import plan
from ftw_optim._capture.structure import KnownStructure, Structure
from tests.support.checks import optimizer_of
from tests.support.layers import Scale
from tests.support.models import SmallGPT, language_model, seeded


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), Scale(), nn.LayerNorm(4), nn.Linear(4, 4)
    )


def swap(model: nn.Sequential) -> None:
    model[1], model[4] = model[4], model[1]


def replace_parameter(model: nn.Sequential) -> None:
    model[4].bias = nn.Parameter(model[4].bias.detach().clone())  # type: ignore[union-attr]


def override_forward(model: nn.Sequential) -> None:
    layer = model[4]
    layer.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), layer)  # type: ignore[method-assign]


def other_class(model: nn.Sequential) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model[4].__class__ = Doubled


def exchange_data(model: nn.Sequential) -> None:
    model[4].weight.data = torch.randn(2, 4)  # type: ignore[union-attr]


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a module is added": lambda m: m.add_module("more", nn.Linear(4, 4)),
    "a module is added below": lambda m: m[1].add_module("more", nn.Linear(4, 4)),  # type: ignore[operator,union-attr]
    "a module is removed": lambda m: m.pop(3),
    "a module is replaced by an equal one": lambda m: m.__setitem__(4, copy.deepcopy(m[4])),
    "two modules change places": swap,
    "a module is there twice": lambda m: m.add_module("again", m[4]),
    "a parameter is frozen": lambda m: m[0].weight.requires_grad_(False),  # type: ignore[operator,union-attr]
    "a parameter is replaced by an equal one": replace_parameter,
    "a parameter is tied": lambda m: setattr(m[4], "weight", m[1][0].weight),  # type: ignore[index,union-attr]
    "a parameter is removed": lambda m: m[4].register_parameter("bias", None),
    "a parameter is added": lambda m: m[2].register_parameter("more", nn.Parameter(torch.ones(4))),
    "a parameter has other data": exchange_data,
    "another dtype": lambda m: m.double(),
    "another device": lambda m: m.to("meta"),
    "a mode": lambda m: m[1].eval(),
    "a parametrisation": lambda m: parametrizations.weight_norm(m[4]),
    "a forward of its own": override_forward,
    "another class": other_class,
    "a hook before the call": lambda m: m[4].register_forward_pre_hook(lambda module, args: None),
    "a hook on a parameter": lambda m: m[4].weight.register_hook(lambda g: g),  # type: ignore[operator,union-attr]
    "a hook after a parameter's gradient": lambda m: m[4].weight.register_post_accumulate_grad_hook(  # type: ignore[operator,union-attr]
        lambda p: None
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(change: Callable[[nn.Sequential], object]) -> None:
    model, known = build(), KnownStructure()
    before = known.of(model)
    assert known.of(model) is before
    change(model)
    after = known.of(model)
    assert after is not before
    assert known.of(model) is after


def described(structure: Structure) -> object:
    found = [(one.name, one.module, one.rule, dict(one.parameters), one.device) for one in owners(structure)]
    names = {name: id(parameter) for name, parameter in structure.parameters.items()}
    return found, names, list(structure.modules.items()), tuple(table(structure))


@settings(max_examples=40)
@given(names=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=4, unique=True))
def test_after_any_changes_the_kept_structure_is_that_of_a_fresh_search(names: list[str]) -> None:
    model, known = build(), KnownStructure()
    described(known.of(model))
    for name in names:
        try:
            CHANGES[name](model)
        except (IndexError, KeyError, AttributeError, TypeError, RuntimeError, ValueError):
            continue  # an earlier change has taken what this one is made on
        assert described(known.of(model)) == described(Structure(model)), name


def test_a_step_leaves_the_structure_as_it_was() -> None:
    case = language_model(seeded(SmallGPT).double(), 4)
    optimizer = optimizer_of(case)
    optimizer.step(case.losses)
    known = optimizer._structure.of(case.model)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.add_(0.01)
    optimizer.step(case.losses)
    assert optimizer._structure.of(case.model) is known


def test_the_mode_of_what_a_compiled_wrapper_wraps_is_noticed() -> None:
    wrapper, known = torch.compile(build(), backend="eager"), KnownStructure()
    assert isinstance(wrapper, nn.Module)
    before = known.of(wrapper)
    assert known.of(wrapper) is before
    wrapper.eval()
    assert known.of(wrapper) is not before


def test_copies_and_pickles_know_no_structure_of_another_model() -> None:
    known = KnownStructure()
    first = build()
    structure = known.of(first)
    for other in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert other.of(first) is not structure
    assert known.of(build()) is not structure


def test_what_is_found_once_is_asked_for_once() -> None:
    structure, asked = Structure(build()), []
    for _ in range(3):
        assert structure.once("it", lambda: asked.append(1) or 7) == 7  # type: ignore[func-returns-value]
    assert asked == [1]


def test_of_what_changes_from_step_to_step_only_the_latest_is_kept() -> None:
    structure = Structure(build())
    first = plan(structure, {"0.weight"})
    assert plan(structure, ["0.weight"]) is first
    assert list(plan(structure, {"4.weight", "4.bias"}).parameters) == ["4.weight", "4.bias"]
    again = plan(structure, {"0.weight"})
    assert again is not first
    assert again.owners == first.owners
    assert len(structure._found) == 3  # owners, what is refused, the plan
