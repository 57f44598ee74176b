"""The registry of layer rules, and what a rule may call on its module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, final

from torch import Tensor, nn

from ftw_optim._factors import Factors

LayerFunction = Callable[[nn.Module, tuple[Any, ...], Tensor], Mapping[str, Factors | Tensor]]
Function = TypeVar("Function", bound=LayerFunction)


@final
@dataclass(frozen=True)
class LayerRule:
    """A registered function together with the layers it refuses.

    Attributes:
        name: shown in coverage tables.
        function: ``(module, inputs, output_grad) -> {parameter name: Factors or per-candidate gradients}``.
        refuses: ``module -> reason``, or None where the rule is exact.
        parameters: local names of those it knows; None: all that the module owns directly.
    """

    name: str
    function: LayerFunction
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    parameters: Collection[str] | None = None


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

    The rule is called as ``rule(module, inputs, output_grad)`` with the detached positional inputs of one call of
    the module, keyword ones behind them, and the gradient of its output, both with the candidate as first axis. It
    returns, for every trainable parameter that the module owns directly, its :class:`Factors` or the candidates'
    gradients, shape ``(n, *parameter.shape)``. It serves subclasses too, unless they override ``forward``.

    Args:
        cls: the class, or its full dotted name where importing it would be a dependency.
        name: shown in coverage tables; the class name by default.
        parameters: local names of those the rule knows; by default all that the module owns directly.
        refuses: called with a module before anything runs; returns why the rule is not exact for it, or None.

    Returns:
        A decorator that returns the rule unchanged.
    """
    key = cls if isinstance(cls, str) else _dotted(cls)

    def register(function: Function) -> Function:
        rule = LayerRule(name or key.rpartition(".")[2], function, refuses or (lambda module: None), parameters)
        _RULES[key] = rule
        return function

    return register


def recognise(recogniser: Callable[[nn.Module], LayerRule | None]) -> Callable[[nn.Module], LayerRule | None]:
    """Register a function that knows a kind of layer by its behaviour; asked where no class is registered."""
    _RECOGNISERS.append(recogniser)
    return recogniser


def rule_for(module: nn.Module) -> LayerRule | str:
    """The rule of a module, or why there is none."""
    cls = type(module)
    for parent in cls.__mro__:
        rule = _RULES.get(_dotted(parent))
        if rule is not None:
            if inspect.unwrap(cls.forward) is not inspect.unwrap(parent.forward):  # type: ignore[attr-defined]
                break
            return rule.refuses(module) or rule
    for recogniser in _RECOGNISERS:
        rule = recogniser(module)
        if rule is not None:
            return rule
    return f"no rule for {_dotted(cls)}"


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module owns directly, by their local names."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``tensors`` stand in for the parameters of these names while the block runs."""
    before = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]  # a plain tensor serves for a forward
    try:
        yield
    finally:
        module._parameters.update(before)


def by_position(values: Tensor) -> Tensor:
    """``(n, ..., d)`` as ``(n, t, d)``: all axes between the first and the last are positions."""
    return values.unsqueeze(1) if values.ndim == 2 else values.flatten(1, -2)


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
