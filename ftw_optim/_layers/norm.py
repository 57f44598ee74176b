"""Normalisation layers: their parameters act entry by entry, so a candidate's gradient is a sum over positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim._factors.factors import Factors
from ftw_optim._layers.module_parts import PROBE_ERRORS, inspected, own_parameters, swapped
from ftw_optim._layers.registry import LayerRule, recognise, register_layer


def _summed(values: Tensor, parameter_shape: torch.Size) -> Factors:
    """Factors of the sums of ``values`` (n, ..., *parameter_shape) over the axes in between."""
    axes = len(parameter_shape)
    values = values.flatten(values.ndim - axes)
    return Factors(left=values.unsqueeze(1) if values.ndim == 2 else values.flatten(1, -2))


@register_layer(nn.LayerNorm, parameters=["weight", "bias"])
def layer_norm(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """``y = weight * normalised(x) + bias``."""
    assert isinstance(module, nn.LayerNorm)
    shape = torch.Size(module.normalized_shape)
    normalised = functional.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)
    return {"weight": _summed(output_grad * normalised, shape), "bias": _summed(output_grad, shape)}


@register_layer(nn.GroupNorm, parameters=["weight", "bias"], channels_second=True)
def group_norm(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Tensor]:
    """``y = weight * normalised(x) + bias``, with one weight and one bias for each channel."""
    assert isinstance(module, nn.GroupNorm)
    normalised = functional.group_norm(inputs[0], module.num_groups, eps=module.eps)
    return _by_channel(output_grad, normalised)


@register_layer(nn.InstanceNorm1d, parameters=["weight", "bias"], channels_second=True)
@register_layer(nn.InstanceNorm2d, parameters=["weight", "bias"], channels_second=True)
@register_layer(nn.InstanceNorm3d, parameters=["weight", "bias"], channels_second=True)
def instance_norm(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Tensor]:
    """``y = weight * normalised(x) + bias``, each channel normalised alone, or by running statistics in evaluation."""
    assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    x = inputs[0]
    if x.ndim != module._get_no_batch_dim() + 1:
        raise NotImplementedError(
            f"Expected {type(module).__name__} to take inputs (n, channels, ...) of {module._get_no_batch_dim() + 1} "
            f"axes, got shape {tuple(x.shape)}: without the first it has no candidates."
        )
    if not module.training and module.track_running_stats:
        return _by_channel(output_grad, _with_running_statistics(module, x))
    return _by_channel(output_grad, functional.instance_norm(x, eps=module.eps))


def _mixes_rows(module: nn.Module) -> str | None:
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    if module.training or module.running_mean is None:
        return f"{type(module).__name__} mixes the candidates in training; call eval() on it, or use GroupNorm"
    return None


@register_layer(nn.BatchNorm1d, parameters=["weight", "bias"], refuses=_mixes_rows, channels_second=True)
@register_layer(nn.BatchNorm2d, parameters=["weight", "bias"], refuses=_mixes_rows, channels_second=True)
@register_layer(nn.BatchNorm3d, parameters=["weight", "bias"], refuses=_mixes_rows, channels_second=True)
def batch_norm(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Tensor]:
    """``y = weight * (x - running_mean) / sqrt(running_var + eps) + bias``; refused in training."""
    return _by_channel(output_grad, _with_running_statistics(module, inputs[0]))


def _with_running_statistics(module: Any, x: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    mean, scale = module.running_mean.view(shape), (module.running_var + module.eps).rsqrt().view(shape)
    normalised: Tensor = (x - mean) * scale
    return normalised


def _by_channel(output_grad: Tensor, normalised: Tensor) -> dict[str, Tensor]:
    """The gradients ``(n, d)`` of a scale and a shift for each channel, from values ``(n, d, ...)``."""
    dtype = torch.promote_types(output_grad.dtype, torch.float32)  # a sum over many positions
    scaled, plain = (
        (values.flatten(2) if values.ndim > 2 else values[..., None])
        for values in (output_grad * normalised, output_grad)
    )
    return {"weight": scaled.sum(2, dtype=dtype), "bias": plain.sum(2, dtype=dtype)}


@recognise
def scale_norm(module: nn.Module) -> LayerRule | None:
    """Any layer ``y = (a + b weight) * f(x)`` with a single weight: torch's RMSNorm and those of model families.

    It is recognised by its behaviour: at three weights, on a random input, the output is linear in the weight, entry by
    entry.
    """
    weight = own_parameters(module).get("weight")
    if weight is None or len(own_parameters(module)) != 1:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None  # running it would run others, or change what it remembers
    if weight.ndim == 0 or not 1 < weight.numel() <= 2**20:  # the probe runs on six times as many numbers
        return None
    generator = torch.Generator().manual_seed(0)
    x, other = (
        torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)
        for shape in ((2, 3, *weight.shape), weight.shape)
    )
    try:
        with inspected(module):
            with swapped(module, {"weight": other}):
                output = module.forward(x)
            if output.shape != x.shape:
                return None
            zero, one = _at(module, (x,), 0.0), _at(module, (x,), 1.0)
            torch.testing.assert_close(output, zero + other * (one - zero), rtol=1e-2, atol=1e-4)
            offset = bool(zero.any())  # where a random input gives exactly zero, a is zero
    except PROBE_ERRORS:  # it does something else, or takes other inputs
        return None
    return LayerRule(name="scale norm", function=_offset_scale_norm if offset else _scale_norm)


def _scale_norm(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """``dy / dweight`` of ``y = b weight * f(x)``, from a run at weight one."""
    return {"weight": _summed(output_grad * _at(module, inputs, 1.0), own_parameters(module)["weight"].shape)}


def _offset_scale_norm(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """``dy / dweight`` from the difference of two runs: exact, since the output is linear in the weight."""
    slope = _at(module, inputs, 1.0) - _at(module, inputs, 0.0)
    return {"weight": _summed(output_grad * slope, own_parameters(module)["weight"].shape)}


def _at(module: nn.Module, inputs: tuple[Any, ...], value: float) -> Tensor:
    weight = own_parameters(module)["weight"]
    whole = torch.full(weight.shape, value, dtype=weight.dtype, device=weight.device)  # of a shard too
    with swapped(module, {"weight": whole}), torch.no_grad():
        output: Tensor = module.forward(*inputs)
    return output
