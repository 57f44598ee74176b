"""``nn.MultiheadAttention``: four Linear layers whose weights the module reads itself, without calling layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim._factors.factors import Factors
from ftw_optim._layers.registry import register_layer

_DEFAULTS = (None, True, None, True, False)
"""Default values of key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal."""


def _refuses(module: nn.Module) -> str | None:
    assert isinstance(module, nn.MultiheadAttention)
    return None if module.batch_first else "MultiheadAttention takes the time first; build it with batch_first=True"


@register_layer(
    nn.MultiheadAttention,
    parameters=[
        "in_proj_weight",
        "in_proj_bias",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
        "out_proj.bias",
    ],
    refuses=_refuses,
    replays=True,  # the dropout of the attention weights
)
def attention(module: nn.Module, inputs: tuple[Any, ...], output_grad: Any) -> dict[str, Factors | Tensor]:
    """Each projection is a Linear layer; the attention between them is run again to get their output gradients."""
    assert isinstance(module, nn.MultiheadAttention)
    sources: list[Tensor] = list(inputs[:3])
    given: list[Any] = list(inputs[3:])
    padding, need, mask, average, causal = given + list(_DEFAULTS[len(given) :])
    if sources[0].ndim != 3:
        raise NotImplementedError(
            f"Expected MultiheadAttention to take queries (n, t, d), got shape {tuple(sources[0].shape)}: without the "
            "first axis it has no candidates."
        )
    weights, biases = _projections(module)
    projected = [
        functional.linear(x, weight, bias).requires_grad_()
        for x, weight, bias in zip(sources, weights, biases, strict=True)
    ]
    identity = torch.eye(module.embed_dim, dtype=weights[0].dtype, device=weights[0].device)
    with torch.enable_grad():
        queries, keys, values = (x.transpose(0, 1) for x in projected)
        # The same function as in the forward, so that it draws and rounds alike, with projections that change nothing.
        mixed, attended = functional.multi_head_attention_forward(
            queries,
            keys,
            values,
            module.embed_dim,
            module.num_heads,
            None,
            None,  # no bias beside separate projections
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            module.dropout,
            identity,
            None,
            training=module.training,
            key_padding_mask=padding,
            need_weights=need,
            attn_mask=mask,
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            average_attn_weights=average,
            is_causal=causal,
        )
        mixed = mixed.transpose(0, 1)
    behind, of_weights = (*output_grad, None)[:2]
    behind = torch.zeros_like(mixed) if behind is None else behind
    outputs, grads = [mixed], [(behind @ module.out_proj.weight).to(mixed)]
    if of_weights is not None and attended is not None:
        outputs.append(attended)
        grads.append(of_weights)
    before = torch.autograd.grad(outputs, projected, grads)
    found: dict[str, Factors | Tensor] = {
        "out_proj.weight": Factors(left=behind, right=mixed.detach()),
        "out_proj.bias": Factors(left=behind),
    }
    for name, grad, x in zip(("q", "k", "v"), before, sources, strict=True):
        found[f"{name}_proj_weight"] = Factors(left=grad, right=x)
    places = {(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in sources}
    same = len(places) == 1  # self-attention
    # The three projections share one matrix: their rows side by side, on common positions if the inputs are the same.
    rows = torch.cat(before, dim=2) if same else _block_diagonal(before)
    if module.in_proj_weight is not None:
        found["in_proj_weight"] = Factors(left=rows, right=sources[0] if same else torch.cat(sources, dim=1))
    found["in_proj_bias"] = Factors(left=rows)
    return found


def _projections(module: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    if module.in_proj_weight is not None:
        weights: tuple[Tensor, ...] = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.chunk(3)
    return weights, biases


def _block_diagonal(parts: tuple[Tensor, ...]) -> Tensor:
    """Parts ``(n, t_i, d_i)`` as one tensor ``(n, sum t_i, sum d_i)``, each at positions and columns of its own."""
    widths = [part.shape[2] for part in parts]
    padded = [
        functional.pad(part, (sum(widths[:number]), sum(widths[number + 1 :]))) for number, part in enumerate(parts)
    ]
    return torch.cat(padded, dim=1)
