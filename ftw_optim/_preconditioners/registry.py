"""The registry of preconditioner rules, and the look-up for one parameter of a live optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._preconditioners.probe import check_separable, probed

PreconditionerRule = Callable[[Tensor, dict[str, Any], dict[str, Any], Tensor | None], Preconditioner]
Rule = TypeVar("Rule", bound=PreconditionerRule)

_RULES: dict[str, PreconditionerRule] = {}


def register_preconditioner(cls: type[Optimizer] | str) -> Callable[[Rule], Rule]:
    """Register the rule that reads an optimizer's preconditioner out of its state.

    The rule is called as ``rule(param, group, state, reference)``: the parameter, its group (with ``lr`` 1 where every
    group's is zero), its state (empty before its first step) and the gradient that the coming step is expected to see,
    float32 at least and shaped like ``param``, or None for zero. It returns ``P`` of that coming step, with the
    learning rate, bias corrections and the fresh gradient's share of the momentum included; momentum and decay left
    out. It serves subclasses too, unless they override ``step``.

    Args:
        cls: the class, or its full dotted name where importing it would be a dependency.

    Returns:
        A decorator that returns the rule unchanged.
    """
    key = cls if isinstance(cls, str) else _dotted(cls)

    def register(rule: Rule) -> Rule:
        _RULES[key] = rule
        return rule

    return register


_REFUSED: dict[str, str] = {
    "torch.optim.lbfgs.LBFGS": "it runs its closure several times a step",
    "torch.optim.sparse_adam.SparseAdam": "it takes sparse gradients alone",
    "torch.optim.rprop.Rprop": "its step follows the sign of the gradient, not its size",
    "torch_optimizer.adahessian.Adahessian": "it needs a backward that keeps its own graph",
    "torch_optimizer.lookahead.Lookahead": "its state dict and hooks fail; wrap the optimizer inside of it",
}


def preconditioner_rule(optimizer: Optimizer) -> PreconditionerRule | None:
    """The rule of an optimizer's class; None where two steps on a copy must tell.

    Raises:
        NotImplementedError: the class is known not to work.
    """
    cls = type(optimizer)
    for parent in cls.__mro__:
        name = _dotted(parent)
        rule = _RULES.get(name)
        if rule is not None and inspect.unwrap(cls.step) is inspect.unwrap(parent.step):  # type: ignore[attr-defined]
            return rule
        if name in _REFUSED:
            raise NotImplementedError(
                f"No preconditioner is known for {name}: {_REFUSED[name]}. Known are {', '.join(sorted(_RULES))}, and "
                f"every other optimizer whose update is element-wise. Register one with "
                f"@register_preconditioner({cls.__name__})."
            )
    return None


def preconditioner_of(optimizer: Optimizer, param: Tensor, reference: Tensor | None = None) -> Preconditioner:
    """The map ``P`` of the optimizer's coming step on one parameter: ``update = update_at_zero - P gradient``.

    Args:
        optimizer: a supported optimizer, or a :class:`SelectiveOptimizer` around one.
        param: one of its parameters.
        reference: the gradient the step is expected to see, shaped like ``param``; it enters the second moment as the
            step would let it, with entries below 0.03 of the root mean square of its non-zero ones raised to that, so
            that no entry without history outweighs all others. None: the step at zero gradient.

    Returns:
        ``P``; call ``.apply(gradient)``.

    Raises:
        NotImplementedError: the optimizer has no rule and its update is not element-wise.
        ValueError: ``param`` is not one of the optimizer's, or ``reference`` has another shape.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if reference is not None and reference.shape != param.shape:
        raise ValueError(f"Expected a reference of shape {tuple(param.shape)}, got {tuple(reference.shape)}.")
    for group, other in _parameters(inner):
        if other is param:
            return Preconditioners(inner)(param, group, reference)
    raise ValueError(
        f"The parameter of shape {tuple(param.shape)} is in none of the optimizer's groups; expected one of its own."
    )


_separable: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()


class Preconditioners:
    """The preconditioners of an optimizer's coming step; made anew for each step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._rule = preconditioner_rule(optimizer)
        self._state = optimizer.state
        self.learning_rate_is_zero = all(float(group.get("lr") or 0.0) == 0.0 for group in optimizer.param_groups)

    def __call__(self, param: Tensor, group: dict[str, Any], reference: Tensor | None) -> Preconditioner:
        """``P`` of one parameter of a group, as :func:`preconditioner_of` gives it."""
        if self.learning_rate_is_zero:
            group = {**group, "lr": 1.0}
        if self._rule is not None:
            with torch.no_grad():
                return self._rule(param, group, self._state.get(param, {}), reference)
        return self._probed(param, group, reference)

    def _probed(self, param: Tensor, group: dict[str, Any], reference: Tensor | None) -> Preconditioner:
        """By two steps on a copy, after a look whether the update is element-wise at all."""
        cls = type(self._optimizer)
        try:
            seen = _separable.setdefault(self._optimizer, set())
            # Without history some updates only look element-wise: a look with it follows.
            key = 2 * id(param) + (param in self._state)
            if key not in seen:
                check_separable(
                    self._optimizer, param, group, torch.ones_like(param) if reference is None else reference
                )
                seen.add(key)
            return probed(self._optimizer, param, group, reference)
        except Exception as error:  # whatever an optimizer that is tried on a copy may raise
            raise NotImplementedError(
                f"No preconditioner is known for {_dotted(cls)}, and trying it on a copy did not tell one: {error}. "
                f"Known are {', '.join(sorted(_RULES))}. Register one with @register_preconditioner({cls.__name__})."
            ) from error


def _parameters(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield group, param


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
