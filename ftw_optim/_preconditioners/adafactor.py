"""Adafactor: a rank-1 second moment of matrices, its clip frozen at the expected gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import expected_gradient, moment_dtype, number
from ftw_optim._preconditioners.maps import Diagonal, RankOne
from ftw_optim._preconditioners.registry import register_preconditioner

State = dict[str, Any]


@register_preconditioner(torch.optim.Adafactor)
def adafactor(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal | RankOne:
    """``alpha / clip * rsqrt(v')``, with ``v' = rows columns / mean(rows)`` for a matrix.

    ``alpha = max(eps2, rms(param)) min(lr, 1 / sqrt(t))``; the clip is that of the expected gradient's update.
    """
    dtype = moment_dtype(param)
    step = number(state["step"]) + 1 if "step" in state else 1.0
    fresh = step ** number(group["beta2_decay"])
    smallest, scale_floor = group["eps"]
    smallest = torch.finfo(param.dtype).eps if smallest is None else number(smallest)
    size = torch.linalg.vector_norm(param.detach().to(dtype)) / param.numel() ** 0.5
    alpha = size.clamp(min=number(scale_floor)) * min(number(group["lr"]), step**-0.5)
    gradient = torch.zeros_like(param, dtype=dtype)
    if reference is not None:
        gradient = expected_gradient(
            param, {**group, "weight_decay": 0.0}, reference.to(dtype)
        )  # its decay is decoupled
    square = gradient.square()

    def mixed(name: str, new: Tensor) -> Tensor:
        old: Tensor = state[name].to(dtype) if name in state else torch.zeros_like(new)
        return old.lerp(new, fresh)

    if param.ndim < 2:
        root = mixed("variance", square).clamp(min=smallest**2).rsqrt()
        return Diagonal(root * alpha / _clip(root * gradient, group))
    rows = mixed("row_var", square.mean(-1, keepdim=True))
    columns = mixed("col_var", square.mean(-2, keepdim=True))
    mean = rows.mean(-2, keepdim=True).clamp(min=smallest)
    estimate = rows @ columns / mean
    root = estimate.clamp(min=smallest**2).rsqrt()
    share = alpha / _clip(root * gradient, group)
    # The floor of a product is no product of floors: only where it is never reached does the form hold.
    if param.ndim > 2 or bool(estimate.min() < smallest**2):
        return Diagonal(root * share)
    return RankOne((rows / mean).rsqrt()[:, 0] * share, columns.rsqrt()[0])


def _clip(update: Tensor, group: State) -> Tensor:
    """What the update is divided by to keep its root mean square below ``d``."""
    size: Tensor = torch.linalg.vector_norm(update) / update.numel() ** 0.5
    return (size / number(group["d"])).clamp(min=1.0)
