"""The owner of each trainable parameter: a module with a rule, a module to run again, or a reason for refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final
from weakref import WeakKeyDictionary

from torch import nn

from ftw_optim._capture.structure import Structure
from ftw_optim._layers.module_parts import device_of, own_parameters, place
from ftw_optim._layers.registry import LayerRule, rule_for
from ftw_optim._layers.special import cannot_run_again, reader_of

_known: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], LayerRule | str | None]] = WeakKeyDictionary()


@final
@dataclass(frozen=True, kw_only=True)
class Owner:
    """A module whose calls capture parameters, with their dotted names in the module and in the model.

    Attributes:
        name: the module's name in the model.
        module: the module.
        rule: the module's rule; None where it is run again; a string with the reason where neither is possible.
        parameters: names in the module, mapped to names in the model.
        device: the kind of device that the module's first parameter is on.
    """

    name: str
    module: nn.Module
    rule: LayerRule | str | None
    parameters: Mapping[str, str]
    device: str


def owners(structure: Structure) -> Sequence[Owner]:
    """All modules that own trainable parameters, in the model's order; tied parameters under their first name."""
    return structure.once("owners", lambda: _owners(structure))


def _owners(structure: Structure) -> list[Owner]:
    found: list[Owner] = []
    for name, module, own in _owning(structure):
        rule = _rule(module)
        owner = partial(Owner, name=name, module=module, device=device_of(module).type)
        if not isinstance(rule, LayerRule):
            found.append(owner(rule=rule or cannot_run_again(module), parameters=own))
            continue
        known = own if rule.parameters is None else {key: own[key] for key in own if key in rule.parameters}
        rest = {key: value for key, value in own.items() if key not in known}
        if known:
            found.append(owner(rule=rule, parameters=known))
        if rest:
            found.append(owner(rule=cannot_run_again(module), parameters=rest))
    return _each_use_once(found)


def _owning(structure: Structure) -> list[tuple[str, nn.Module, dict[str, str]]]:
    """Name and module of each module that is called, with the trainable parameters it and containers below it hold."""
    modules, first_name = structure.modules, structure.names
    own: dict[str, dict[str, str]] = {}
    for name, module in modules.items():
        caller = reader_of(name, modules)
        for local, parameter in own_parameters(module).items():
            if parameter.requires_grad:
                within = ".".join(filter(None, (name[len(caller) :].lstrip("."), local)))
                own.setdefault(caller, {})[within] = first_name[id(parameter)]
    return [(name, module, own[name]) for name, module in modules.items() if name in own]


def _each_use_once(found: list[Owner]) -> list[Owner]:
    """The owners without overlaps, so that each use of a parameter is captured only once.

    A module need not be run again for a parameter that a rule captures below it: BERT's prediction head owns the very
    bias that its decoder, a Linear layer, adds. And a module that is run again covers all uses of the same parameter in
    the modules below it.
    """
    ruled = [
        (owner.name, name) for owner in found if isinstance(owner.rule, LayerRule) for name in owner.parameters.values()
    ]
    kept: list[Owner] = []
    for owner in found:
        if not isinstance(owner.rule, LayerRule):
            below = {name for place, name in ruled if place == owner.name or _within(place, owner.name)}
            own = {local: name for local, name in owner.parameters.items() if name not in below}
            for number, above in enumerate(kept):
                shared = [local for local in own if own[local] in above.parameters.values()]
                if shared and above.rule is None and _within(owner.name, above.name):
                    inner = {f"{owner.name[len(above.name) :].lstrip('.')}.{local}": own.pop(local) for local in shared}
                    kept[number] = replace(above, parameters={**above.parameters, **inner})
            owner = replace(owner, parameters=own)
        if owner.parameters:
            kept.append(owner)
    return kept


def _within(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _rule(module: nn.Module) -> LayerRule | str | None:
    """``rule_for(module)``, cached: recognising a layer by its behaviour means running it."""
    if _is_patched(module):
        return None
    key = (
        type(module),
        module.training,
        *((name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in own_parameters(module).items()),
    )
    remembered = _known.get(module)
    if remembered is None or remembered[0] != key:
        remembered = (key, rule_for(module))
        _known[module] = remembered
    return remembered[1]


def _is_patched(module: nn.Module) -> bool:
    """Whether ``forward`` was replaced on the instance, so that no rule of its class holds.

    Accelerate's hooks, which move inputs and weights and then call the class's own, do not count.
    """
    patched = vars(module).get("forward")
    if patched is None:
        return False
    below = getattr(module, "_old_forward", None) if hasattr(module, "_hf_hook") else patched
    return getattr(below, "__func__", below) is not type(module).forward


def parameter_at(module: nn.Module, local: str) -> nn.Parameter | None:
    """The parameter of this dotted name in a module, or what stands in for it."""
    found: nn.Parameter | None = module._parameters.get(local)
    if found is None and "." in local:
        parameters, key = place(module, local)
        found = parameters[key]
    return found
