"""Convolutions: a Linear layer on the patches of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim._factors.factors import Factors
from ftw_optim._layers.registry import register_layer


@register_layer(nn.Conv1d, parameters=["weight", "bias"], channels_second=True)
@register_layer(nn.Conv2d, parameters=["weight", "bias"], channels_second=True)
@register_layer(nn.Conv3d, parameters=["weight", "bias"], channels_second=True)
def convolution(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors | Tensor]:
    """``y = W * patches(x) + b``: outer products of output gradients and patches, within each group.

    The gradients are multiplied out where that takes less memory than the patches, as with groups or large images.
    """
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    patches = _patches(module, inputs[0])
    output_grads = output_grad.flatten(2)  # (n, d_out, t)
    weight = module.weight
    found: dict[str, Factors | Tensor] = {"bias": Factors(left=output_grads.transpose(1, 2))}
    if module.groups == 1 and weight.shape[0] >= output_grads.shape[2]:
        # (n, t, d_in * kernel): a copy
        found["weight"] = Factors(left=output_grads.transpose(1, 2), right=patches.flatten(3).flatten(1, 2).mT)
        return found
    # float32 at least: a sum over many positions.
    dtype = torch.promote_types(torch.promote_types(output_grads.dtype, patches.dtype), torch.float32)
    n, groups = len(output_grads), module.groups
    grouped = output_grads.to(dtype).reshape(n, groups, -1, output_grads.shape[2])
    columns = patches.to(dtype).reshape(n, groups, weight[0].numel(), output_grads.shape[2])
    found["weight"] = torch.einsum("ngot,ngit->ngoi", grouped, columns).reshape(-1, *weight.shape)
    return found


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """The inputs of every output position: ``(n, d_in, kernel, *positions)``, with the kernel flattened."""
    axes = len(module.kernel_size)
    if x.ndim != axes + 2:
        raise NotImplementedError(
            f"Expected {type(module).__name__} to take inputs (n, channels, ...) of {axes + 2} axes, got shape "
            f"{tuple(x.shape)}: without the first it has no candidates."
        )
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * dilation + 1, step)[..., ::dilation]
    # (n, d_in, *positions, *kernel): views until here
    x = x.flatten(2 + axes)
    return x.movedim(-1, 2)
