"""Optimizers whose step is the sign of a vector: ``sign(c) = c / |c|``, with ``|c|`` held fixed.

These optimizers have no second moment to hold fixed. With ``|c|`` held at the value that the coming step is expected to
see, the update is linear in the fresh gradient's share of ``c``, with the factor ``1 / |c|``: large where the sign is
uncertain. Muon's polar factor is held fixed in the same way, for a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import (
    dequantised,
    expected_gradient,
    floored,
    moment_dtype,
    number,
    undecayed_gradient,
)
from ftw_optim._preconditioners.maps import Diagonal
from ftw_optim._preconditioners.registry import register_preconditioner

State = dict[str, Any]

NOTE = (
    "its step follows signs alone, which no linear map describes. Candidates are compared with the sizes under the "
    "signs frozen; predicted_decrease is approximate."
)


@register_preconditioner("lion_pytorch.lion_pytorch.Lion", note=NOTE)
@register_preconditioner("pytorch_optimizer.optimizer.lion.Lion", attributes=("maximize",), note=NOTE)
def lion(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr (1 - b1) / |b1 m + (1 - b1) reference|``."""
    for name in ("use_gc", "adanorm", "cautious"):
        if group.get(name):
            raise NotImplementedError(f"Expected Lion without {name}, which couples entries or leaves some out.")
    return frozen_sign(
        param, {**group, "decoupled_weight_decay": group.get("weight_decouple", True)}, state.get("exp_avg"), reference
    )


def frozen_sign(param: Tensor, group: State, momentum: Tensor | None, reference: Tensor | None) -> Diagonal:
    """The map of the step ``lr sign(b1 momentum + (1 - b1) gradient)``, with the size under the sign held fixed."""
    beta1 = number(group["betas"][0])
    dtype = moment_dtype(param)
    mixed = torch.zeros_like(param, dtype=dtype) if momentum is None else dequantised(momentum, dtype) * beta1
    if reference is not None:
        mixed = mixed + (1 - beta1) * expected_gradient(param, group, reference.to(dtype))
    return Diagonal(number(group["lr"]) * (1 - beta1) * _inverse(floored(mixed).abs()))


@register_preconditioner(torch.optim.Rprop, note=NOTE)
def rprop(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """The step size of each entry over ``|reference|``; where a turned sign makes it wait, that of the step after."""
    dtype = moment_dtype(param)
    shrink, grow = (number(eta) for eta in group["etas"])
    smallest, largest = (number(size) for size in group["step_sizes"])
    sizes = torch.full_like(param, number(group["lr"]), dtype=dtype)
    if "step_size" in state:
        sizes = state["step_size"].to(dtype)
    if reference is None:
        return Diagonal(torch.zeros_like(sizes))
    expected = undecayed_gradient(param, group, reference)
    turn = expected * state["prev"].to(dtype) if "prev" in state else torch.zeros_like(expected)
    sizes = torch.where(turn > 0, sizes * grow, torch.where(turn < 0, sizes * shrink, sizes)).clamp(smallest, largest)
    return Diagonal(sizes * _inverse(expected.abs()))


def _inverse(sizes: Tensor) -> Tensor:
    """``1 / sizes``; zero where a size is zero."""
    return torch.where(sizes > 0, sizes, torch.inf).reciprocal()
