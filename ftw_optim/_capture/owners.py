"""Which module captures which parameter: every trainable parameter gets a rule, a module to run again, or a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ftw_optim._layers.registry import LayerRule, dotted, own_parameters, place, rule_for

_known: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], LayerRule | str | None]] = WeakKeyDictionary()


@final
@dataclass(frozen=True, kw_only=True)
class Owner:
    """A module whose calls capture parameters, with the dotted names they have in it and in the model.

    Attributes:
        name: of the module.
        module: the module.
        rule: its rule; None where it is run again; why neither is possible.
        parameters: names in the module to names in the model.
    """

    name: str
    module: nn.Module
    rule: LayerRule | str | None
    parameters: Mapping[str, str]


def owners(model: nn.Module) -> list[Owner]:
    """All modules that own trainable parameters, in the model's order; tied parameters under their first name."""
    found: list[Owner] = []
    for name, module, own in _owning(model):
        rule = _rule(module)
        if not isinstance(rule, LayerRule):
            found.append(Owner(name=name, module=module, rule=rule or _not_repeatable(module), parameters=own))
            continue
        known = own if rule.parameters is None else {key: own[key] for key in own if key in rule.parameters}
        rest = {key: value for key, value in own.items() if key not in known}
        if known:
            found.append(Owner(name=name, module=module, rule=rule, parameters=known))
        if rest:
            found.append(Owner(name=name, module=module, rule=_not_repeatable(module), parameters=rest))
    return _each_use_once(found)


def _owning(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, str]]]:
    """Modules that are called, with the trainable parameters they and the containers below them hold."""
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first_name.setdefault(id(parameter), name)
    modules = dict(model.named_modules())
    own: dict[str, dict[str, str]] = {}
    for name, module in modules.items():
        caller = name
        while caller and (_is_only_read(modules[caller]) or _adapts_a_parameter(caller, modules)):
            caller = caller.rpartition(".")[0]
        above, _, child = name.rpartition(".")
        if caller == name and child and _is_read_by_mixer(modules[above], child, module):
            caller = above
        for local, parameter in own_parameters(module).items():
            if parameter.requires_grad:
                within = ".".join(filter(None, (name[len(caller) :].lstrip("."), local)))
                own.setdefault(caller, {})[within] = first_name[id(parameter)]
    return [(name, module, own[name]) for name, module in modules.items() if name in own]


def _is_only_read(module: nn.Module) -> bool:
    """Whether a module holds parameters for the one above it, which never calls it on candidates."""
    return isinstance(
        module,
        nn.ParameterDict
        | nn.ParameterList
        | nn.ModuleDict
        | nn.ModuleList
        | parametrize.ParametrizationList
        | nn.modules.linear.NonDynamicallyQuantizableLinear,  # the output projection of MultiheadAttention
    )


def _adapts_a_parameter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module is part of what PEFT adds to the weights of experts while a wrapper around them runs.

    That is a Linear layer that holds a factor, two levels below the wrapper, or another wrapper inside of it.
    """

    def is_wrapper(path: str) -> bool:
        return dotted(type(modules[path])) == "peft.tuners.lora.layer.ParamWrapper"

    above = name.rpartition(".")[0]
    wrapper, _, below = above.rpartition(".")
    return (below.startswith("lora_") and is_wrapper(wrapper)) or (is_wrapper(name) and is_wrapper(above))


def _is_read_by_mixer(mixer: nn.Module, child: str, module: nn.Module) -> bool:
    """Whether a Mamba-like mixer hands the weights of this layer below it to a fused kernel, or may do so.

    Those of the depthwise convolution over time, or of the projection of the step size. The mixer is run again for
    parameters of its own anyway, and then finds these too, read or called.
    """
    own = own_parameters(mixer)
    depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
    return bool(own) and (depthwise or (child == "dt_proj" and "A_log" in own))


def _each_use_once(found: list[Owner]) -> list[Owner]:
    """The same owners, each use of a parameter captured once.

    What a rule captures below a module needs no running it again: BERT's prediction head owns the very bias that its
    decoder, a Linear layer, adds. And a module that is run again covers the uses of the same parameter in the modules
    below it.
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
    """``rule_for(module)``, remembered: a layer known by its behaviour is run to see it."""
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


def _not_repeatable(module: nn.Module) -> str | None:
    """Why running a module again cannot give its gradients, as far as can be said before it has run."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit compiled it; capture the module it was made from"
    if type(module).forward is nn.Module.forward:
        return f"{type(module).__name__} has no forward"
    if getattr(module, "batch_first", True) is False:
        return f"{type(module).__name__} takes the time first; build it with batch_first=True"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return f"its weight is made by a hook before the call; use torch.nn.utils.parametrizations.{kind}"
        if isinstance(hook, BasePruningMethod):
            return "a hook before the call prunes its weight; use torch.nn.utils.parametrize for the mask"
    return None


def parameter_at(module: nn.Module, local: str) -> nn.Parameter | None:
    """The parameter of this dotted name in a module, or what stands in for it."""
    parameters, key = place(module, local)
    found: nn.Parameter | None = parameters[key]
    return found
