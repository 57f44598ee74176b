"""Optimizers that divide by the norm of a whole tensor, frozen at the expected gradient: NovoGrad, Lamb, LARS."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import expected_gradient, moment_dtype, number, second_moment
from ftw_optim._preconditioners.maps import Diagonal, Scalar
from ftw_optim._preconditioners.registry import register_preconditioner
from ftw_optim._preconditioners.sgd import sgd

State = dict[str, Any]


@register_preconditioner("torch_optimizer.novograd.NovoGrad")
def novograd(param: Tensor, group: State, state: State, reference: Tensor | None) -> Scalar:
    """``lr / (sqrt(v') + eps)`` with the tensor's own ``v``, the square of the first gradient to begin with."""
    beta1, beta2 = (number(beta) for beta in group["betas"])
    square = number(_expected(param, group, reference).square().sum())  # its decay is added behind the division
    moment = number(state["exp_avg_sq"]) if "exp_avg_sq" in state else 0.0
    moment = square if moment == 0.0 else beta2 * moment + (1 - beta2) * square
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        moment = max(moment, number(state["max_exp_avg_sq"]))
    share = 1 - beta1 if group["grad_averaging"] else 1.0
    return Scalar(number(group["lr"]) * share / (moment**0.5 + group["eps"]))


@register_preconditioner("torch_optimizer.lamb.Lamb", attributes=("debias", "clamp_value", "adam"))
def lamb(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr ratio (1 - b1) / (sqrt(v') + eps)``, the ratio of the norms of parameter and step being expected."""
    beta1, beta2 = (number(beta) for beta in group["betas"])
    decoupled = {**group, "weight_decay": 0.0}  # in the step, behind the division
    moment = second_moment(param, decoupled, state.get("exp_avg_sq"), reference, decay=beta2, fresh=1 - beta2)
    root = moment.sqrt() + group["eps"]
    rate = number(group["lr"])
    if group["debias"]:
        step = number(state.get("step", 0.0)) + 1
        rate *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
    fresh = Diagonal(rate * (1 - beta1) / root)
    if group["adam"]:
        return fresh
    momentum = state["exp_avg"].to(root.dtype) * beta1 if "exp_avg" in state else torch.zeros_like(root)
    weights = param.detach().to(root.dtype)
    whole = (momentum + (1 - beta1) * _expected(param, group, reference)) / root + group["weight_decay"] * weights
    size, length = torch.linalg.vector_norm(weights).clamp(0, group["clamp_value"]), torch.linalg.vector_norm(whole)
    return Diagonal(fresh.values * torch.where((size > 0) & (length > 0), size / length, 1.0))


@register_preconditioner("torch_optimizer.lars.LARS")
def lars(param: Tensor, group: State, state: State, reference: Tensor | None) -> Scalar:
    """SGD's, times the ratio of the parameter's norm to the expected gradient's where there is weight decay."""
    plain = sgd(param, group, state, reference).value
    size = number(torch.linalg.vector_norm(param.detach().to(moment_dtype(param))))
    length = number(torch.linalg.vector_norm(_expected(param, group, reference)))
    if not (group["weight_decay"] and size and length):
        return Scalar(plain)
    ratio = size / (length + size * group["weight_decay"] + group["eps"])
    return Scalar(plain * ratio * group["trust_coefficient"])


def _expected(param: Tensor, group: State, reference: Tensor | None) -> Tensor:
    """The gradient of the coming step without decay; zero without a reference."""
    if reference is None:
        return torch.zeros_like(param, dtype=moment_dtype(param))
    return expected_gradient(param, {**group, "weight_decay": 0.0}, reference.to(moment_dtype(param)))
