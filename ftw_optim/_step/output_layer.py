"""The output layer of a language model: whether it, and all that follows it, treats every position by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ftw_optim._layers.module_parts import own_parameters

_POSITION_BY_POSITION = {nn.Linear.forward, nn.Dropout.forward, nn.Identity.forward}
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_ADAPTED = ("peft.tuners.lora.layer.Linear", "peft.utils.other.ModulesToSaveWrapper")

_NUMBER_BY_NUMBER = {"ToCopyBackward0", "TanhBackward0", "CloneBackward0", "AliasBackward0", "NegBackward0"}
_BY_A_SCALAR = {"MulBackward0", "DivBackward0"}


def output_layer(model: nn.Module) -> nn.Module | None:
    """What the model's ``get_output_embeddings()`` returns; None where it has no such layer."""
    model = _unwrapped(model)
    find = getattr(model, "get_output_embeddings", None)
    try:
        layer = None if find is None else find()
    except (NotImplementedError, AttributeError):
        return None
    return layer if isinstance(layer, nn.Module) else None


def why_not_chosen(model: nn.Module) -> str | None:
    """Why the output layer has to run on all positions, as far as the modules show it; None where they allow it."""
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        return "a compiled model runs its output layer inside of one graph"
    layer = output_layer(model)
    if layer is None:
        return "it has no get_output_embeddings() that returns its output layer"
    if not all(map(_is_position_by_position, layer.modules())):
        return "its output layer is not a linear layer, or has hooks before it"
    model = _unwrapped(model)
    around = _above(model, layer)
    if not around:
        return "its output layer is not one of its modules"
    # Such a module is run again for its own parameters, and its output would be one row for all.
    if any(parameter.requires_grad for module in around for parameter in own_parameters(module).values()):
        return "a module around its output layer has parameters of its own"
    return None


_name: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The name of each model's output layer, which a search takes a millisecond for."""


def _above(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules from the model down to the one that holds the layer; none where the model does not hold it."""
    path = _on_the_way(model, _name.get(model, ""))
    if path[-1] is not layer:
        name = next((name for name, module in model.named_modules() if module is layer), None)
        if name is None:
            return []
        _name[model] = name
        path = _on_the_way(model, name)
    return path[:-1]


def _on_the_way(model: nn.Module, name: str) -> list[nn.Module]:
    path = [model]
    for part in name.split(".") if name else ():
        below = path[-1]._modules.get(part)
        if below is None:
            break
        path.append(below)
    return path


def _is_position_by_position(module: nn.Module) -> bool:
    if "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None:
        return False
    if any(map(_is_foreign, module._forward_pre_hooks.values())):  # what hooks do afterwards, the graph shows
        return False
    if torch.typename(type(module)) in _ADAPTED:
        return not getattr(module, "lora_variant", None)  # DoRA and others, which need not be linear
    return isinstance(module, _CONTAINERS) or type(module).forward in _POSITION_BY_POSITION


def _is_foreign(hook: Callable[..., Any]) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("ftw_optim.")


def follows_number_by_number(logits: Tensor, output: Tensor) -> bool:
    """Whether the graph from a layer's ``output`` to the ``logits`` treats each number by itself, and alike.

    What is added cannot be told from the graph, whose nodes do not keep it: it counts as possibly different from
    position to position.
    """
    node, end = logits.grad_fn, output.grad_fn
    if node is None or end is None:
        return logits is output
    while node is not end:
        name = type(node).__name__
        if name in _BY_A_SCALAR:
            other = getattr(node, "_saved_other", None)
            if isinstance(other, Tensor) and other.numel() != 1:
                return False
        elif name not in _NUMBER_BY_NUMBER:
            return False
        below = [one for one, _ in node.next_functions if one is not None]
        if len(below) != 1:
            return False
        node = below[0]
    return True


def runs_again_later() -> bool:
    """Whether the code that runs now may be within a checkpoint: of the kind that reenters, or of the other.

    The former runs its function without gradients, the latter takes the tensors that autograd saves.
    """
    if not torch.is_grad_enabled():
        return True
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model
