"""Trial steps on a copy of an optimizer that holds one parameter alone; the optimizer itself is not changed."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim._layers.randomness import own_randomness

SEED = 0
"""All trials draw the same random numbers, which cancel where two of them are compared."""

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_LEFT_OUT = {"state", "param_groups", "step", *_HOOKS}  # step: what a scheduler put over that of the class


class CannotBeTried(ValueError):
    """Raised where a copy would share state with the optimizer that its steps change."""


def trial(
    optimizer: Optimizer,
    param: Tensor,
    group: dict[str, Any],
    *,
    at_zero: bool = False,
    after: Sequence[Tensor] = (),
    decay: float = 0.0,
    among_others: bool = False,
) -> Callable[[Tensor], Tensor]:
    """A function ``gradient -> update`` of the parameter; each call tries a step on a fresh copy, in float64.

    Args:
        optimizer: the optimizer; neither it nor anything that it holds is changed.
        param: one of its parameters.
        group: the settings to use for the parameter.
        at_zero: start with the parameter at zero, so that the update loses no digits beside it.
        after: gradients for steps that are made before the one that is tried.
        decay: the weight decay to use; by default none, as it cancels or is accounted for elsewhere.
        among_others: keep the places of the other parameters, which get no gradient.

    Raises:
        CannotBeTried: the optimizer holds a model or another optimizer.
    """
    _refuse_what_is_shared(optimizer)
    start = torch.zeros_like(param, dtype=torch.float64) if at_zero else param.detach().double()
    settings = {name: value for name, value in group.items() if name != "params"}
    settings |= {name: value for name, value in (("weight_decay", decay), ("maximize", False)) if name in settings}
    step = step_without_hooks(type(optimizer))

    def update(gradient: Tensor) -> Tensor:
        own = nn.Parameter(start.clone())
        twin = _twin(optimizer, param, own, settings, among_others=among_others)
        begun = start
        with own_randomness([param], SEED):
            for given in (*after, gradient):
                begun = own.detach().clone()
                own.grad = given.to(torch.float64, copy=True)  # some optimizers write into it
                step(twin)
        return own.detach() - begun

    return update


def step_without_hooks(cls: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """The ``step`` of an optimizer's class as it was written: no trial fires anyone's hooks."""
    step: Any = cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def _twin(
    optimizer: Optimizer, param: Tensor, own: nn.Parameter, settings: Mapping[str, Any], *, among_others: bool
) -> Optimizer:
    """A copy of the optimizer that holds ``own`` in place of the parameter, with its state in float64."""
    twin: Optimizer = object.__new__(type(optimizer))  # not copy.copy: it leaves out what pickling would
    # What is kept by parameter, by its identity or as its attribute is kept for the copy's.
    memo: dict[int, Any] = {id(optimizer): twin, id(param): own}
    own.__dict__.update(copy.deepcopy(param.__dict__, memo))
    attributes = {name: value for name, value in optimizer.__dict__.items() if name not in _LEFT_OUT}
    for value in _walk(attributes):
        if isinstance(value, torch.Generator):
            memo[id(value)] = value.clone_state()
    twin.__dict__.update(copy.deepcopy(attributes, memo))
    for value in twin.__dict__.values():
        if isinstance(value, dict) and id(param) in value:
            value[id(own)] = value.pop(id(param))
    twin.__dict__.update({name: OrderedDict() for name in _HOOKS})  # a step may call that of a parent class
    state: defaultdict[Any, Any] = defaultdict(dict)
    state.update((key, copy.deepcopy(value)) for key, value in optimizer.state.items() if not isinstance(key, Tensor))
    if param in optimizer.state:
        state[own] = {name: widened(value) for name, value in optimizer.state[param].items()}
    groups = []
    for group in optimizer.param_groups:
        mine = any(other is param for other in group["params"])
        if not mine and not among_others:
            continue
        held = [own]
        if among_others:
            held = [own if other is param else nn.Parameter(own.detach()[:0]) for other in group["params"]]
            for other, standing in zip(group["params"], held, strict=True):
                if other is not param and other in optimizer.state:
                    state[standing] = {k: widened(v) for k, v in optimizer.state[other].items() if _is_small(v)}
        others = {name: value for name, value in group.items() if name != "params"}
        groups.append({**copy.deepcopy(dict(settings) if mine else others), "params": held})
    twin.__dict__.update(param_groups=groups, state=state)
    return twin


def _refuse_what_is_shared(optimizer: Optimizer) -> None:
    for name, attribute in optimizer.__dict__.items():
        if name in _LEFT_OUT:
            continue
        for value in _walk(attribute):
            if isinstance(value, nn.Module | Optimizer):
                raise CannotBeTried(
                    f"its attribute {name!r} holds a {type(value).__name__}, which a step on a copy would change"
                )


def _walk(value: Any) -> Iterator[Any]:
    """The value, and everything inside of it if it is a container."""
    yield value
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list | tuple | set | deque):
        for item in value:
            yield from _walk(item)


def widened(value: Any) -> Any:
    """A copy of a value; a floating-point tensor becomes float64."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(torch.float64 if value.is_floating_point() else value.dtype)
    return copy.deepcopy(value)


def _is_small(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() <= 1
