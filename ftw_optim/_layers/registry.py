"""The registry of layer rules: which function knows a module, by its class or by its behaviour."""

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

    Without a rule a module is exact as well, but slower: it is run again, candidate by candidate. Compare the two with
    :func:`ftw_optim.testing.check_layer`.

    Args:
        cls: the class, or its full dotted name where importing it would be a dependency.
        name: shown in coverage tables; the class name by default.
        parameters: local names of those the rule knows; by default all that the module owns. The module is run again
            for the others.
        refuses: called with a module before anything runs; returns why its gradients cannot be exact, or None.
        serves: called with a module that is not refused; False where the rule does not hold for it and it has to be
            run again.
        replays: the rule runs parts of the module again, so the random state of the call is restored around it.
        own_layout: the rule finds the candidates in the inputs by itself; the output has one row for each of them.
        channels_second: the second axis of the input is the channels', never the candidates' behind a time axis.

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
    """Register a function that knows a kind of layer by its behaviour; asked where no class is registered."""
    _RECOGNISERS.append(recogniser)
    return recogniser


def rule_for(module: nn.Module) -> LayerRule | str | None:
    """The rule of a module; why its gradients cannot be exact; None if it has to be run again."""
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
    """A block after which the rules are those before it, whatever was registered inside."""
    rules, recognisers = dict(_RULES), list(_RECOGNISERS)
    try:
        yield
    finally:
        _RULES.clear()
        _RULES.update(rules)
        _RECOGNISERS[:] = recognisers
