"""The registry of layer rules, which finds the rule of a module by its class or by its behaviour."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from ftw_optim._factors.factors import Factors

LayerFunction = Callable[[nn.Module, tuple[Any, ...], Any], Mapping[str, Factors | Tensor]]
Function = TypeVar("Function", bound=LayerFunction)


@final
@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """A layer rule: the registered function, and the modules and parameters it is for.

    Attributes:
        name: the name shown in coverage tables.
        function: ``(module, inputs, output_grad) -> {parameter name: Factors or per-candidate gradients}``.
        refuses: ``module -> reason`` where no rule can be exact; returns None where one can.
        serves: ``module -> bool`` for a module that is not refused; False: the rule is not exact, run the module again.
        parameters: local names of the parameters that the rule knows; None: all that the module owns.
        replays: whether the rule runs parts of the module again, so that the random state of the call is restored.
        own_layout: whether the rule finds the candidates in its inputs by itself; the output has one row for each.
        channels_second: whether the second axis of the input holds channels, so that it is never taken for the
            candidates' axis behind a time axis.
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
    serves: Callable[[nn.Module], bool] | None = None,
    replays: bool = False,
    own_layout: bool = False,
    channels_second: bool = False,
) -> Callable[[Function], Function]:
    """Register the rule of a layer class.

    The rule is called as ``rule(module, inputs, output_grad)`` with the detached inputs of one call of the module, in
    the order of its ``forward``, and the gradient of its output, all with the candidate as first axis. Where the module
    returns several tensors, ``output_grad`` is a tuple with one entry for each, None where no gradient reached it. The
    rule returns, for every trainable parameter that the module owns, its :class:`Factors` or the candidates' gradients,
    shape ``(n, *parameter.shape)``. It serves subclasses too, unless they override ``forward``.

    The gradients of a module without a rule are exact as well, but slower: the module is run again, candidate by
    candidate. Check a new rule with :func:`ftw_optim.testing.check_layer`.

    Args:
        cls: the class, or its full dotted name, so that its package need not be imported.
        name: the name shown in coverage tables; by default the class name.
        parameters: local names of the parameters that the rule knows; by default all that the module owns. For the
            others the module is run again.
        refuses: called with a module before anything runs; returns why its gradients cannot be exact, or None.
        serves: called with a module that is not refused; returns False where the rule does not hold for the module,
            which then is run again.
        replays: whether the rule runs parts of the module again; the random state of the call is restored around it.
        own_layout: whether the rule finds the candidates in the inputs by itself; the output has one row for each.
        channels_second: whether the second axis of the input holds channels, so that it is never taken for the
            candidates' axis behind a time axis.

    Returns:
        A decorator that returns the rule unchanged.
    """
    key = cls if isinstance(cls, str) else torch.typename(cls)
    options: dict[str, Any] = {"refuses": refuses, "serves": serves}

    def register(function: Function) -> Function:
        _RULES[key] = LayerRule(
            name=name or key.rpartition(".")[2],
            function=function,
            parameters=parameters,
            replays=replays,
            own_layout=own_layout,
            channels_second=channels_second,
            **{option: value for option, value in options.items() if value is not None},
        )
        return function

    return register


def recognise(recogniser: Callable[[nn.Module], LayerRule | None]) -> Callable[[nn.Module], LayerRule | None]:
    """Register a function that recognises layers by their behaviour; it is asked where no class is registered."""
    _RECOGNISERS.append(recogniser)
    return recogniser


def rule_for(module: nn.Module) -> LayerRule | str | None:
    """The rule of a module; a string with the reason if no rule can be exact; None if it has to be run again."""
    cls = type(module)
    for parent in cls.__mro__:
        rule = _RULES.get(torch.typename(parent))
        if rule is not None:
            if inspect.unwrap(cls.forward) is not inspect.unwrap(parent.forward):  # type: ignore[attr-defined]
                break
            return rule.refuses(module) or (rule if rule.serves(module) else None)
    for recogniser in _RECOGNISERS:
        rule = recogniser(module)
        if rule is not None:
            return rule
    return None


@contextmanager
def rules_apart() -> Iterator[None]:
    """A block after which the registered rules are those from before it."""
    rules, recognisers = dict(_RULES), list(_RECOGNISERS)
    try:
        yield
    finally:
        _RULES.clear()
        _RULES.update(rules)
        _RECOGNISERS[:] = recognisers
