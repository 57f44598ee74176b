"""Adafactor: a rank-1 second moment of matrices; the clip is taken at the expected gradient and held fixed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import moment_dtype, number, undecayed_gradient
from ftw_optim._preconditioners.maps import Diagonal, RankOne
from ftw_optim._preconditioners.registry import register_preconditioner

State = dict[str, Any]


@register_preconditioner(torch.optim.Adafactor)
def adafactor(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal | RankOne:
    """``alpha / clip * rsqrt(v')``, with ``v' = rows columns / mean(rows)`` for a matrix.

    ``alpha = max(eps2, rms(param)) min(lr, 1 / sqrt(t))``; ``clip`` is that of the expected gradient's update.
    """
    dtype = moment_dtype(param)
    step = number(state["step"]) + 1 if "step" in state else 1.0
    fresh = step ** number(group["beta2_decay"])
    smallest, scale_floor = group["eps"]
    smallest = torch.finfo(param.dtype).eps if smallest is None else number(smallest)
    size = torch.linalg.vector_norm(param.detach().to(dtype)) / param.numel() ** 0.5
    alpha = size.clamp(min=number(scale_floor)) * min(number(group["lr"]), step**-0.5)
    gradient = undecayed_gradient(param, group, reference)
    square = gradient.square()
    mixed = partial(_mixed, state, fresh)
    if param.ndim < 2:
        root = mixed("variance", square).clamp(min=smallest**2).rsqrt()
        return Diagonal(root * alpha / _clip(root * gradient, group))
    rows = mixed("row_var", square.mean(-1, keepdim=True))
    columns = mixed("col_var", square.mean(-2, keepdim=True))
    mean = rows.mean(-2, keepdim=True).clamp(min=smallest)
    estimate = rows @ columns / mean
    root = estimate.clamp(min=smallest**2).rsqrt()
    share = alpha / _clip(root * gradient, group)
    # A floor on the product cannot be split into factors: the rank-1 form holds only where it is never reached.
    if param.ndim > 2 or bool(estimate.min() < smallest**2):
        return Diagonal(root * share)
    return RankOne((rows / mean).rsqrt()[:, 0] * share, columns.rsqrt()[0])


def _mixed(state: State, fresh: float, name: str, new: Tensor) -> Tensor:
    """The average of this name in the state, with a share of the new value that the coming step will give it."""
    old: Tensor = state[name].to(new.dtype) if name in state else torch.zeros_like(new)
    return old.lerp(new, fresh)


def _clip(update: Tensor, group: State) -> Tensor:
    """The divisor that keeps the root mean square of the update at most ``d``; at least one."""
    size: Tensor = torch.linalg.vector_norm(update) / update.numel() ** 0.5
    return (size / number(group["d"])).clamp(min=1.0)


@register_preconditioner("transformers.optimization.Adafactor")
@register_preconditioner("torch_optimizer.adafactor.Adafactor")
def older_adafactor(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal | RankOne:
    """Adafactor with eps inside of the squares, a relative step or the learning rate, and an optional first moment."""
    dtype = moment_dtype(param)
    step = number(state["step"]) + 1 if "step" in state else 1.0
    inside, scale_floor = group["eps2"] if "eps2" in group else group["eps"]
    fresh = step ** number(group["decay_rate"])
    rate = number(group["lr"] or 0.0)
    if group["relative_step"]:
        rate = min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)
    size = torch.linalg.vector_norm(param.detach().to(dtype)) / param.numel() ** 0.5
    alpha = size.clamp(min=number(scale_floor)) * rate if group["scale_parameter"] else size.new_tensor(rate)
    if group["beta1"] is not None:
        alpha = alpha * (1 - number(group["beta1"]))
    gradient = undecayed_gradient(param, group, reference)
    square = gradient.square() + number(inside)
    mixed = partial(_mixed, state, fresh)
    threshold = {"d": group["clip_threshold"]}
    if param.ndim < 2:
        root = mixed("exp_avg_sq", square).rsqrt()
        return Diagonal(root * alpha / _clip(root * gradient, threshold))
    rows, columns = mixed("exp_avg_sq_row", square.mean(-1)), mixed("exp_avg_sq_col", square.mean(-2))
    rows, columns = (rows / rows.mean(-1, keepdim=True)).rsqrt(), columns.rsqrt()
    root = rows.unsqueeze(-1) * columns.unsqueeze(-2)
    share = alpha / _clip(root * gradient, threshold)
    return RankOne(rows * share, columns) if param.ndim == 2 else Diagonal(root * share)
