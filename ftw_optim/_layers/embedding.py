"""Embeddings: a Linear layer without bias on one-hot inputs, never multiplied out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ftw_optim._factors.factors import Factors, PositionMap
from ftw_optim._layers.module_parts import PROBE_ERRORS, inspected, own_parameters, swapped
from ftw_optim._layers.registry import LayerRule, recognise, register_layer


def _refuses(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    if module.sparse:
        return "sparse=True gives sparse gradients; build the embedding with sparse=False"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True makes a candidate's gradient depend on the other candidates"
    return None


@register_layer(nn.Embedding, parameters=["weight"], refuses=_refuses)
def embedding(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """``y[t] = W[ids[t]]``: ``output_grad[t]`` is added to row ``ids[t]`` of the gradient, unless that is padding."""
    assert isinstance(module, nn.Embedding)
    ids = inputs[0].long()  # row indices arrive as int32 too
    ids = ids.reshape(len(ids), math.prod(ids.shape[1:]))  # not -1: a time axis may be empty
    values = output_grad.reshape(*ids.shape, output_grad.shape[-1])
    if module.padding_idx is not None:
        padding = (ids == module.padding_idx)[..., None]
        values = torch.where(padding, torch.zeros((), dtype=values.dtype, device=values.device), values)
    return {"weight": Factors(left=ids, right=values, rows=module.num_embeddings)}


@register_layer(
    nn.EmbeddingBag,
    parameters=["weight"],
    refuses=_refuses,
    serves=lambda module: module.mode != "max",  # whose gradient has another row for each entry
    own_layout=True,
)
def embedding_bag(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """``y[i] = sum_p s[p] W[ids[p]]`` over the positions of bag ``i``, with ``s = 1 / length`` for a mean."""
    assert isinstance(module, nn.EmbeddingBag)
    ids, offsets, scale = (*inputs, None, None)[:3]
    n = len(output_grad)
    if ids.ndim == 2:
        bags = torch.arange(n, device=ids.device)[:, None].expand_as(ids)
    else:
        ends = offsets[1 : n + 1] if module.include_last_offset else offsets[1:]
        bags = torch.searchsorted(ends.contiguous(), torch.arange(len(ids), device=ids.device), right=True)[None]
        behind = bags >= n  # the last offset may leave positions out
        ids, scale = ids[None], None if scale is None else scale[None]
        bags = bags.clamp(max=n - 1)
    counted = torch.ones_like(ids, dtype=output_grad.dtype)
    if inputs[0].ndim == 1:
        counted = counted.masked_fill(behind, 0.0)
    if module.padding_idx is not None:
        counted = counted * (ids != module.padding_idx)
    if module.mode == "mean":
        lengths = torch.zeros(n, dtype=counted.dtype, device=ids.device)
        lengths.index_add_(0, bags.flatten(), counted.flatten())
        counted = counted / lengths.clamp(min=1.0)[bags]
    elif scale is not None:
        counted = counted * scale
    return {
        "weight": Factors(
            left=ids.long(),
            right=output_grad[bags] * counted[..., None],
            rows=module.num_embeddings,
            positions=None if inputs[0].ndim == 2 else PositionMap(candidates=bags, count=n),
        )
    }


@recognise
def scaled_embedding(module: nn.Module) -> LayerRule | None:
    """A subclass of Embedding that returns ``scale * W[ids]``, as in Gemma and BART; recognised by its behaviour."""
    if not isinstance(module, nn.Embedding) or list(own_parameters(module)) != ["weight"]:
        return None
    if _refuses(module) is not None or module.max_norm is not None:
        return None
    try:
        with inspected(module):
            scale = _scale(module)
            ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)[None]
            torch.testing.assert_close(module.forward(ids), module.weight.detach()[ids] * scale)
    except PROBE_ERRORS:  # it does something else, or takes other inputs
        return None

    def rule(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
        return embedding(module, inputs, output_grad * _scale(module))

    return LayerRule(name="scaled Embedding", function=rule)


def _scale(module: nn.Module) -> Tensor:
    """The scale by which the module multiplies a row: its output, shape ``(d,)``, where all weights are one."""
    weight = module._parameters["weight"]
    assert weight is not None
    ones = weight.new_ones(1, 1).expand_as(weight)  # no memory: the stride is zero
    with swapped(module, {"weight": ones}), torch.no_grad():
        output: Tensor = module.forward(torch.zeros(1, 1, dtype=torch.long, device=weight.device))
    return output[0, 0]
