"""What a model is made of: its modules and parameters, and all that is found out about them, until they change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import is_
from typing import Any, TypeVar, final

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
        self._noticed = _noticed(model)
        self._found: dict[Hashable, Any] = {}

    def holds(self) -> bool:
        """Whether the model is still made of the same: a walk that reads everything the plan of a step depends on."""
        (objects, values), (now, values_now) = self._noticed, _noticed(self.model)
        # Objects by identity: tensors do not compare as wholes. The old ones are held, so that no address comes again.
        return values == values_now and len(objects) == len(now) and all(map(is_, objects, now))

    def once(self, what: Hashable, find: Callable[[], Found]) -> Found:
        """What ``find`` returned when first asked for ``what``; it may depend on the structure and that alone."""
        if what not in self._found:
            self._found[what] = find()
        found: Found = self._found[what]
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
        if self._known is None or self._known.model is not model or not self._known.holds():
            self._known = None  # whatever has been removed from the model is free
            self._known = Structure(model)
        return self._known


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether a hook on the parameter itself sees its gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _noticed(model: nn.Module) -> tuple[Sequence[object], Sequence[object]]:
    """All that tells one structure from another: objects that are the same if identical, and values that may be equal.

    Of each module: its class, its mode, a ``forward`` of its own with what Accelerate's hooks keep beside it, the hooks
    before its call, its children and parameters by name. Of each parameter: whether it trains, its dtype, device and
    shape, which ``module.to`` changes in place, and whether it has hooks.
    """
    objects: list[object] = []
    values: list[object] = []
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        objects.append(module)
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        held = module.__dict__
        objects.append(type(module))
        values.append(module.training)
        if "forward" in held:
            objects += (held["forward"], held.get("_old_forward"), held.get("_hf_hook"))
        if module._forward_pre_hooks:
            objects += module._forward_pre_hooks.values()
        if module._modules:
            values += module._modules.keys()
            waiting += module._modules.values()
        for name, parameter in module._parameters.items():
            values.append(name)
            objects.append(parameter)
            if parameter is not None:
                values += (parameter.requires_grad, parameter.dtype, parameter.device)
                values.append(None if is_lazy(parameter) else parameter.shape)
                values.append(has_hooks(parameter))
    return objects, values
