"""Adagrad, Adadelta and RMSprop: the fresh gradient divided by the root of an accumulator of squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import expected_gradient, number, second_moment
from ftw_optim._preconditioners.maps import Diagonal
from ftw_optim._preconditioners.registry import register_preconditioner

State = dict[str, Any]


@register_preconditioner(torch.optim.Adagrad, stacks=True)
def adagrad(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr / (1 + (t - 1) lr_decay) / (sqrt(sum + reference^2) + eps)``."""
    total = second_moment(param, group, state.get("sum"), reference, decay=1.0, fresh=1.0)
    if "sum" not in state:
        total = total + number(group.get("initial_accumulator_value", 0.0))
    rate = number(group["lr"]) / (1 + number(state.get("step", 0.0)) * number(group["lr_decay"]))
    return Diagonal(rate / (total.sqrt() + group["eps"]))


@register_preconditioner(torch.optim.Adadelta, stacks=True)
def adadelta(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr sqrt(past updates + eps) / sqrt(v' + eps)``, with eps inside of both roots."""
    rho = number(group["rho"])
    moment = second_moment(param, group, state.get("square_avg"), reference, decay=rho, fresh=1 - rho)
    updates = state["acc_delta"].to(moment.dtype) if "acc_delta" in state else torch.zeros_like(moment)
    return Diagonal(number(group["lr"]) * ((updates + group["eps"]) / (moment + group["eps"])).sqrt())


@register_preconditioner(torch.optim.RMSprop, stacks=True)
def rmsprop(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr / (sqrt(v') + eps)`` without bias correction; with ``centered``, ``v'`` is the variance, not the square."""
    alpha = number(group["alpha"])
    moment = second_moment(param, group, state.get("square_avg"), reference, decay=alpha, fresh=1 - alpha)
    if group["centered"]:
        mean = state["grad_avg"].to(moment.dtype) * alpha if "grad_avg" in state else torch.zeros_like(moment)
        if reference is not None:
            mean = mean + (1 - alpha) * expected_gradient(param, group, reference.to(moment.dtype))
        moment = (moment - mean.square()).clamp(min=0.0)  # below zero by rounding alone
    return Diagonal(number(group["lr"]) / (moment.sqrt() + group["eps"]))
