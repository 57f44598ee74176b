"""Linear layers: the outer product of output gradients and activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ftw_optim._factors.factors import Factors
from ftw_optim._layers.registry import register_layer


@register_layer(nn.Linear, parameters=["weight", "bias"])
def linear(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """``y = x W' + b``: the weight's gradient is ``sum_t outer(output_grad[t], x[t])``."""
    return {"weight": Factors(left=output_grad, right=inputs[0]), "bias": Factors(left=output_grad)}


@register_layer("transformers.pytorch_utils.Conv1D", parameters=["weight", "bias"])
def transposed_linear(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """``y = x W + b``, the weight stored as ``(d_in, d_out)``: the factors change places."""
    return {"weight": Factors(left=inputs[0], right=output_grad), "bias": Factors(left=output_grad)}
