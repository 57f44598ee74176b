"""The registry of layer rules, and what a rule may call on its module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from ftw_optim._factors.factors import Factors
from ftw_optim._layers.randomness import RandomState

LayerFunction = Callable[[nn.Module, tuple[Any, ...], Any], Mapping[str, Factors | Tensor]]
Function = TypeVar("Function", bound=LayerFunction)


@final
@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """A registered function together with the layers it refuses.

    Attributes:
        name: shown in coverage tables.
        function: ``(module, inputs, output_grad) -> {parameter name: Factors or per-candidate gradients}``.
        refuses: ``module -> reason``, where no rule can be exact; None where one can.
        serves: whether this rule is exact for a module that is not refused; where not, the module is run again.
        parameters: local names of those it knows; None: all that the module owns.
        replays: it runs parts of the module again, so the random state of the call must be restored.
        own_layout: it finds the candidates in its inputs by itself; the output has one row for each.
        channels_second: the second axis of its input is the channels', never the candidates' behind a time axis.
    """

    name: str
    function: LayerFunction
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    serves: Callable[[nn.Module], bool] = lambda module: True
    parameters: Collection[str] | None = None
    replays: bool = False
    own_layout: bool = False
    channels_second: bool = False


_RULES: dict[str, LayerRule] = {}
_RECOGNISERS: list[Callable[[nn.Module], LayerRule | None]] = []


def register_layer(
    cls: type[nn.Module] | str,
    *,
    name: str | None = None,
    parameters: Collection[str] | None = None,
    refuses: Callable[[nn.Module], str | None] | None = None,
) -> Callable[[Function], Function]:
    """Register the rule of a layer class.

    The rule is called as ``rule(module, inputs, output_grad)`` with the detached inputs of one call of the module, in
    the order of its ``forward``, and the gradient of its output, all with the candidate as first axis. Where the module
    returns several tensors, ``output_grad`` is a tuple with one entry for each, None where no gradient reached it. The
    rule returns, for every trainable parameter that the module owns, its :class:`Factors` or the candidates' gradients,
    shape ``(n, *parameter.shape)``. It serves subclasses too, unless they override ``forward``.

    Without a rule a module is exact as well, but slower: it is run again, candidate by candidate. Compare the two with
    :func:`ftw_optim.testing.check_layer`.

    Args:
        cls: the class, or its full dotted name where importing it would be a dependency.
        name: shown in coverage tables; the class name by default.
        parameters: local names of those the rule knows; by default all that the module owns.
        refuses: called with a module before anything runs; returns why its gradients cannot be exact, or None.

    Returns:
        A decorator that returns the rule unchanged.
    """
    return add_rule(cls, name=name, parameters=parameters, **({} if refuses is None else {"refuses": refuses}))


def add_rule(cls: type[nn.Module] | str, *, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
    """:func:`register_layer` with all options of a :class:`LayerRule`."""
    key = cls if isinstance(cls, str) else dotted(cls)

    def register(function: Function) -> Function:
        _RULES[key] = LayerRule(name=name or key.rpartition(".")[2], function=function, **options)
        return function

    return register


def recognise(recogniser: Callable[[nn.Module], LayerRule | None]) -> Callable[[nn.Module], LayerRule | None]:
    """Register a function that knows a kind of layer by its behaviour; asked where no class is registered."""
    _RECOGNISERS.append(recogniser)
    return recogniser


def rule_for(module: nn.Module) -> LayerRule | str | None:
    """The rule of a module; why its gradients cannot be exact; None if it has to be run again."""
    cls = type(module)
    for parent in cls.__mro__:
        rule = _RULES.get(dotted(parent))
        if rule is not None:
            if inspect.unwrap(cls.forward) is not inspect.unwrap(parent.forward):  # type: ignore[attr-defined]
                break
            return rule.refuses(module) or (rule if rule.serves(module) else None)
    for recogniser in _RECOGNISERS:
        rule = recogniser(module)
        if rule is not None:
            return rule
    return None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module owns directly, by their local names."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def place(module: nn.Module, local: str) -> tuple[dict[str, Any], str]:
    """Where a module keeps the parameter of this dotted name: the dictionary and the key."""
    if "." not in local:
        return module._parameters, local
    path, _, key = local.rpartition(".")
    return module.get_submodule(path)._parameters, key


def exchange(module: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``tensors`` in the places of the parameters of these dotted names; returns what stood there."""
    before = {}
    for local, tensor in tensors.items():
        parameters, key = place(module, local)
        before[local] = parameters[key]
        parameters[key] = tensor  # a plain tensor serves for a forward
    return before


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``tensors`` stand in for the parameters of these dotted names while the block runs."""
    before = exchange(module, tensors)
    try:
        yield
    finally:
        exchange(module, before)


PROBE_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, IndexError)
"""What a layer may raise on inputs that are not meant for it, or a comparison of its outputs."""


@contextmanager
def probed(module: nn.Module) -> Iterator[None]:
    """A block in which a layer is run to see what it does, without gradients; no generator shows that it has.

    Raises:
        AssertionError: it drew random numbers.
    """
    before = RandomState.now(module.parameters())
    try:
        with torch.no_grad():
            yield
        assert before == RandomState.now(module.parameters())
    finally:
        before.restore()


def by_position(values: Tensor) -> Tensor:
    """``(n, ..., d)`` as ``(n, t, d)``: all axes between the first and the last are positions."""
    return values.unsqueeze(1) if values.ndim == 2 else values.flatten(1, -2)


def dotted(cls: type) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"
