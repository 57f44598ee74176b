"""Special cases for single model classes: containers, MultiheadAttention, PEFT, Mamba, RNNs, caches.

All other code treats modules alike. A model that does something unusual with its parameters, its axes or its inputs is
recognised here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ftw_optim._layers.module_parts import own_parameters

_ONLY_READ = (
    nn.ParameterDict,
    nn.ParameterList,
    nn.ModuleDict,
    nn.ModuleList,
    parametrize.ParametrizationList,
    nn.modules.linear.NonDynamicallyQuantizableLinear,  # the output projection of MultiheadAttention
)
"""Classes that hold parameters for the module above them, which never calls them on candidates."""


def reader_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of the module whose calls read the parameters that the module ``name`` holds: itself, or one above it.

    Args:
        name: the name of the module that holds the parameters.
        modules: all modules of the model, by name.
    """
    reader = name
    while reader and (isinstance(modules[reader], _ONLY_READ) or _adapts_a_parameter(reader, modules)):
        reader = reader.rpartition(".")[0]
    above, _, child = name.rpartition(".")
    if reader == name and child and _is_read_by_mixer(modules[above], child, modules[name]):
        return above
    return reader


def _adapts_a_parameter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module belongs to a PEFT wrapper that changes the weights of experts while they run.

    Such a module is a Linear layer that holds a factor, two levels below the wrapper, or another wrapper inside of it.
    """

    def is_wrapper(path: str) -> bool:
        return torch.typename(type(modules[path])) == "peft.tuners.lora.layer.ParamWrapper"

    above = name.rpartition(".")[0]
    wrapper, _, below = above.rpartition(".")
    return (below.startswith("lora_") and is_wrapper(wrapper)) or (is_wrapper(name) and is_wrapper(above))


def _is_read_by_mixer(mixer: nn.Module, child: str, module: nn.Module) -> bool:
    """Whether a Mamba-like mixer may hand the weights of this layer below it to a fused kernel.

    These are the weights of the depthwise convolution over time, or of the projection of the step size. The mixer is
    run again for its own parameters anyway; that finds the gradients of these too, whether it reads or calls the layer.
    """
    own = own_parameters(mixer)
    depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
    return bool(own) and (depthwise or (child == "dt_proj" and "A_log" in own))


def cannot_run_again(module: nn.Module) -> str | None:
    """The reason why running a module again cannot give its gradients, if known before it ran; None if it may."""
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


def candidate_axis_of_output(module: nn.Module, number: int) -> int | None:
    """The candidate axis of output ``number``, where the module's class fixes it; None where the shape must tell it."""
    if isinstance(module, nn.RNNBase):
        return 0 if number == 0 else 1  # the last hidden states have their layers first
    return None


def candidate_axis_of_input(module: nn.Module, number: int) -> int:
    """The candidate axis of input leaf ``number``, if it has one: the first, or the second for a recurrent state."""
    return 1 if isinstance(module, nn.RNNBase) and number > 0 else 0


def has_no_rows(value: Any) -> bool:
    """Whether an input packs rows of many lengths into one axis, as a PackedSequence does."""
    return isinstance(value, PackedSequence)


def is_cache(value: Any) -> bool:
    """Whether an input is a cache that the call fills, as Transformers pass to each layer."""
    return any(torch.typename(cls) == "transformers.cache_utils.Cache" for cls in type(value).__mro__)
