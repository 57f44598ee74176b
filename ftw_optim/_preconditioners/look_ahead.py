"""The gradient that the coming step is expected to see, and second moments that already include it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOOR = 0.03
"""Smallest size of a reference entry in the second moment, relative to the root mean square of the non-zero ones.

Without it, entries whose second moment is almost zero while a candidate's gradient is not would dominate the Gram
matrix and ruin its precision: a parameter's first gradient, a rare token's row.
"""

NOISE = 64.0
"""Size up to which an entry counts as zero, in units of the rounding of the largest entry."""


def expected_gradient(param: Tensor, group: dict[str, Any], reference: Tensor) -> Tensor:
    """The reference as it enters the second moment: negated under ``maximize``, with coupled decay, and floored."""
    return floored(_with_decay(param, group, reference), axes=_own_axes(group, reference))


def _with_decay(param: Tensor, group: dict[str, Any], reference: Tensor) -> Tensor:
    gradient = -reference if group.get("maximize") else reference
    if group.get("weight_decay") and not group.get("decoupled_weight_decay", False):
        gradient = gradient + param.detach().to(gradient.dtype) * group["weight_decay"]
    return gradient


def undecayed_gradient(param: Tensor, group: dict[str, Any], reference: Tensor | None) -> Tensor:
    """The expected gradient without decay, for decoupled decay; zeros without a reference. In :func:`moment_dtype`."""
    dtype = moment_dtype(param)
    if reference is None:
        return torch.zeros_like(param, dtype=dtype)
    return expected_gradient(param, {**group, "weight_decay": 0.0}, reference.to(dtype))


def floored(values: Tensor, floor: float = FLOOR, *, axes: Sequence[int] | None = None) -> Tensor:
    """``values`` with small entries raised in size to ``floor`` times the root mean square of the non-zero ones.

    Args:
        values: any tensor.
        floor: the smallest size, relative to that mean.
        axes: the axes of one parameter, where several are stacked; None: all.
    """
    size = _floored_size(values, floor, axes=axes)
    return torch.where(values < 0, -size, size)


STACKED = "stacked"
"""The key that a group has where parameters are stacked: see :func:`register_preconditioner`."""


def _own_axes(group: dict[str, Any], values: Tensor) -> Sequence[int] | None:
    """The axes of one parameter in ``values``; None for all of them."""
    return range(1, values.ndim) if group.get(STACKED) else None


def _floored_size(values: Tensor, floor: float = FLOOR, *, axes: Sequence[int] | None) -> Tensor:
    """The absolute values of :func:`floored`; in place where possible, since fresh memory takes most of the time."""
    size = values.abs()
    if not size.numel():
        return size
    # The rest of a cancelled sum counts as zero: whether it is exactly zero is chance (a key's bias).
    keep, dims = axes is not None, tuple(axes or ())
    zero = size.amax(dims, keepdim=keep).mul_(NOISE * torch.finfo(values.dtype).eps)
    if keep:  # sums of numbers along some axes are faster than of flags
        count = torch.gt(size, zero, out=torch.empty_like(size)).sum(dims, keepdim=True)
    else:
        count = (size > zero).count_nonzero()
    norm = torch.linalg.vector_norm(values, dim=dims or None, keepdim=keep)
    return size.clamp_(min=norm.mul_(floor).div_(count.clamp_(min=1).to(values.dtype).sqrt_()))


def moment_dtype(param: Tensor) -> torch.dtype:
    """The dtype that second moments are computed in: the parameter's, float32 at least."""
    return torch.promote_types(torch.float32, param.dtype)


def second_moment(
    param: Tensor, group: dict[str, Any], stored: Tensor | None, reference: Tensor | None, *, decay: float, fresh: float
) -> Tensor:
    """``decay * stored + fresh * reference^2``: the second moment in the coming step, as a new tensor.

    Args:
        param: the parameter.
        group: the parameter's group.
        stored: the second moment so far; None before the first step.
        reference: the gradient that the coming step is expected to see; None for zero.
        decay: share of ``stored`` that is kept.
        fresh: share of the new square.
    """
    dtype = moment_dtype(param)
    moment = torch.zeros_like(param, dtype=dtype) if stored is None else dequantised(stored, dtype) * decay
    if reference is None:
        return moment
    reference = _with_decay(param, group, reference.to(dtype))
    size = _floored_size(reference, axes=_own_axes(group, reference))
    return moment.addcmul_(size, size, value=fresh)


def dequantised(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the optimizer's state as an ordinary tensor: low-bit tensors are dequantised."""
    if type(stored) not in (Tensor, torch.nn.Parameter) and hasattr(stored, "dequantize"):
        stored = stored.dequantize()
    return stored.to(dtype)


def number(value: Any) -> float:
    """A setting or step count as a Python float; it may be a tensor."""
    return float(value)
