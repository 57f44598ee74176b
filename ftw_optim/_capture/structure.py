"""What a model is made of: its modules and parameters, and all that is found out about them, until they change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from operator import is_
from typing import Any, TypeVar, cast, final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Found = TypeVar("Found")


@final
class Structure:
    """The modules and parameters of a model at one time.

    Args:
        model: the whole model.

    Attributes:
        model: the whole model.
        modules: all modules by their dotted names, the model itself under the empty one.
        parameters: all parameters by their dotted names; tied ones once, under their first name.
        names: the name of each parameter, by its identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules())
        self.parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
        self.names: Mapping[int, str] = {id(parameter): name for name, parameter in self.parameters.items()}
        self.sharding: Sequence[nn.Module] = [module for module in self.modules.values() if is_sharding(module)]
        """The modules that FSDP2 has made, which hold shards of their parameters."""
        self._noticed = _Noticed(list(self.modules.values()))
        self._found: dict[str, tuple[Hashable, Any]] = {}

    def holds(self) -> bool:
        """Whether the model is still made of the same. What it was made of is held, so no identity comes again."""
        return self._noticed.holds()

    def reshard(self) -> None:
        """Put the shards back in the places of whole parameters, where a pass has left these."""
        for module in self.sharding:
            cast(Any, module).reshard()

    @property
    def outermost(self) -> list[nn.Module]:
        """The modules that FSDP2 has made, but those within others of them."""
        roots: dict[str, nn.Module] = {}
        for name, module in self.modules.items():
            if is_sharding(module) and not any(not root or name.startswith(f"{root}.") for root in roots):
                roots[name] = module
        return list(roots.values())

    def forget_failed_pass(self) -> None:
        """Let FSDP2 forget a pass that an exception ended, of which it would keep what it had begun."""
        for module in self.outermost:
            # Of a module within another that is not the model's, or that never ran, there is nothing to forget.
            with suppress(RuntimeError, AttributeError):
                cast(Any, module).reset_iter_state()

    def once(self, what: str, find: Callable[[], Found], *, of: Hashable = None) -> Found:
        """What ``find`` returned when it was first asked for ``what``.

        It may depend on the structure, and on ``of``, of which only the latest is kept.
        """
        if what not in self._found or self._found[what][0] != of:
            self._found[what] = of, find()
        found: Found = self._found[what][1]
        return found


@final
class KnownStructure:
    """The structure that a model had when it was last looked at, if it still has it."""

    def __init__(self) -> None:
        self._known: Structure | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownStructure, ()  # copies and pickles belong to another model

    def of(self, model: nn.Module) -> Structure:
        """The present structure of the model: the same object as long as nothing has changed."""
        if self._known is not None:
            self._known.reshard()
        if self._known is None or self._known.model is not model or not self._known.holds():
            self._known = None  # whatever has been removed from the model is free
            for module in filter(is_sharding, model.modules()):  # a forward without a backward leaves whole parameters
                cast(Any, module).reshard()
            self._known = Structure(model)
        return self._known


def is_sharding(module: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) has made this module one of its own."""
    return any(
        kind.__name__ == "FSDPModule" and "torch.distributed" in kind.__module__ for kind in type(module).__mro__
    )


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether a hook on the parameter itself sees its gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


@final
class _Noticed:
    """What tells the structure of a model from another: what the plan of a step depends on, and may change.

    Of each module: its class, its mode, a ``forward`` of its own with what Accelerate's hooks keep beside it, the hooks
    before its call, its children and parameters by name. Of each parameter: whether it trains, its dtype, device and
    shape, which ``module.to`` changes in place, and whether it has hooks.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # Compiled by torch.jit, a module keeps what it has elsewhere, and gives out copies: nothing is known of it.
        self._known = not any(isinstance(module, torch.jit.ScriptModule) for module in modules)
        self._modules = [
            (
                module,
                type(module),
                module.__dict__.get("training"),  # wrappers have none of their own: that of what they wrap is noticed
                dict(module._modules),
                dict(module._parameters),
                _around(module),
            )
            for module in modules
        ]
        parameters = {id(p): p for _, _, _, _, own, _ in self._modules for p in own.values() if p is not None}
        self._parameters = [(parameter, _form(parameter)) for parameter in parameters.values()]

    def holds(self) -> bool:
        """Whether all of this is as it was."""
        if not self._known:
            return False
        for module, kind, training, children, parameters, around in self._modules:
            held = module.__dict__  # read directly: attributes of thousands of modules would take several times as long
            if type(module) is not kind or held.get("training") is not training or held["_modules"] != children:
                return False
            own = held["_parameters"]
            if (parameters or own) and not (
                list(own) == list(parameters) and _all_is(own.values(), parameters.values())
            ):
                return False
            if (around or "forward" in held or held["_forward_pre_hooks"]) and not _all_is(_around(module), around):
                return False
        return all(_form(parameter) == form for parameter, form in self._parameters)


def _around(module: nn.Module) -> list[object]:
    """What decides, beside its class, what a call of the module runs."""
    held = module.__dict__
    forward = [held["forward"], held.get("_old_forward"), held.get("_hf_hook")] if "forward" in held else []
    return [*forward, *module._forward_pre_hooks.values()]


def _form(parameter: nn.Parameter) -> tuple[object, ...]:
    shape = None if is_lazy(parameter) else parameter.shape
    return parameter.requires_grad, parameter.dtype, parameter.device, shape, has_hooks(parameter)


def _all_is(now: Collection[object], before: Collection[object]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))
