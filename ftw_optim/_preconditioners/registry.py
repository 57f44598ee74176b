"""The registry of preconditioner rules, looked up by the optimizer's class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._preconditioners.maps import Preconditioner

PreconditionerRule = Callable[[Tensor, dict[str, Any], dict[str, Any], Tensor | None], Preconditioner]
Rule = TypeVar("Rule", bound=PreconditionerRule)


@final
@dataclass(frozen=True)
class Registered:
    """A registered rule, with the optimizer's attributes to add to the group for it, and a note for users.

    ``stacks`` says whether it also takes equal parameters stacked, see :func:`register_preconditioner`.
    """

    rule: PreconditionerRule
    attributes: tuple[str, ...] = ()
    note: str | None = None
    stacks: bool = False


_RULES: dict[str, Registered] = {}


def register_preconditioner(
    cls: type[Optimizer] | str, *, attributes: tuple[str, ...] = (), note: str | None = None, stacks: bool = False
) -> Callable[[Rule], Rule]:
    """Register the rule that reads an optimizer's preconditioner out of its state.

    The rule is called as ``rule(param, group, state, reference)``: the parameter, its group (with ``lr`` 1 where every
    group's is zero), its state (empty before its first step) and the gradient that the coming step is expected to see,
    float32 at least and shaped like ``param``, or None for zero. It returns ``P`` of that coming step, with the
    learning rate, bias corrections and the fresh gradient's share of the momentum included, but without old momentum
    and decay. It serves subclasses too, unless they override ``step`` or a method that it may call.

    Args:
        cls: the class, or its full dotted name, so that its package need not be imported.
        attributes: settings that the optimizer keeps as attributes of its own; the rule finds them in the group.
        note: what users should know about this preconditioner; a warning says it when such an optimizer is wrapped.
        stacks: whether the rule may be given several parameters of one shape at once, which saves time where they are
            small: parameter, reference and the state's tensors of that shape then have a further first axis, and
            everything else is the same for all. It must return a :class:`Scalar` or a :class:`Diagonal` of that shape,
            and treat every entry by itself.

    Returns:
        A decorator that returns the rule unchanged.
    """
    key = cls if isinstance(cls, str) else torch.typename(cls)

    def register(rule: Rule) -> Rule:
        _RULES[key] = Registered(rule, attributes, note, stacks)
        return rule

    return register


ACCELERATED = "accelerate.optimizer.AcceleratedOptimizer"

_REFUSED: dict[str, str] = {
    ACCELERATED: "wrap the optimizer inside of it, and let accelerate prepare the SelectiveOptimizer",
    "torch.optim.lbfgs.LBFGS": "it runs its closure several times a step",
    "torch.optim.sparse_adam.SparseAdam": "it takes sparse gradients alone",
    "torch_optimizer.adahessian.Adahessian": "it needs a backward that keeps its own graph",
    "torch_optimizer.lookahead.Lookahead": "its state dict and hooks fail; wrap the optimizer inside of it",
}


def registered_rule(optimizer: Optimizer) -> Registered | None:
    """The rule of an optimizer's class; None where there is none and the optimizer has to be probed.

    Raises:
        NotImplementedError: the class is known not to work with selection.
    """
    cls = type(optimizer)
    for parent in cls.__mro__:
        name = torch.typename(parent)
        found = _RULES.get(name)
        if found is not None and not _steps_otherwise(cls, parent):
            return found
        if name in _REFUSED:
            raise NotImplementedError(
                f"No preconditioner is known for {name}: {_REFUSED[name]}. Wrap another optimizer, or register a rule "
                f"with @register_preconditioner({cls.__name__})."
            )
    return None


_NO_PART_OF_A_STEP = {"__init__", "add_param_group", "zero_grad", "train", "eval", "state_dict", "load_state_dict"}


def _steps_otherwise(cls: type, parent: type) -> bool:
    """Whether a subclass overrides ``step``, or a method that ``step`` may call."""
    for name, own in inspect.getmembers(cls, callable):
        of_parent = getattr(parent, name, None)
        special = name.startswith("__") or name in _NO_PART_OF_A_STEP
        if of_parent is not None and not special and inspect.unwrap(own) is not inspect.unwrap(of_parent):
            return True
    return False
