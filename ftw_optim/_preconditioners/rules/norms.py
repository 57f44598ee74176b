"""Optimizers whose step depends on a norm of the whole tensor, taken at the expected gradient and held fixed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import (
    expected_gradient,
    moment_dtype,
    number,
    second_moment,
    undecayed_gradient,
)
from ftw_optim._preconditioners.maps import Diagonal, Scalar
from ftw_optim._preconditioners.registry import register_preconditioner
from ftw_optim._preconditioners.rules.sgd import sgd

State = dict[str, Any]


@register_preconditioner("torch_optimizer.novograd.NovoGrad")
def novograd(param: Tensor, group: State, state: State, reference: Tensor | None) -> Scalar:
    """``lr / (sqrt(v') + eps)`` with one ``v`` for the tensor, which starts as the first gradient's squared norm."""
    beta1, beta2 = (number(beta) for beta in group["betas"])
    square = number(
        undecayed_gradient(param, group, reference).square().sum()
    )  # its decay is added behind the division
    moment = number(state["exp_avg_sq"]) if "exp_avg_sq" in state else 0.0
    moment = square if moment == 0.0 else beta2 * moment + (1 - beta2) * square
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        moment = max(moment, number(state["max_exp_avg_sq"]))
    share = 1 - beta1 if group["grad_averaging"] else 1.0
    return Scalar(number(group["lr"]) * share / (moment**0.5 + group["eps"]))


@register_preconditioner("torch_optimizer.lamb.Lamb", attributes=("debias", "clamp_value", "adam"))
def lamb(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr ratio (1 - b1) / (sqrt(v') + eps)``: ``ratio`` is the parameter's norm over that of the expected step."""
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
    whole = (momentum + (1 - beta1) * undecayed_gradient(param, group, reference)) / root + group[
        "weight_decay"
    ] * weights
    size, length = torch.linalg.vector_norm(weights).clamp(0, group["clamp_value"]), torch.linalg.vector_norm(whole)
    return Diagonal(fresh.values * torch.where((size > 0) & (length > 0), size / length, 1.0))


@register_preconditioner("torch_optimizer.lars.LARS")
def lars(param: Tensor, group: State, state: State, reference: Tensor | None) -> Scalar:
    """SGD's map, with weight decay times the ratio of the parameter's norm to that of the expected gradient."""
    plain = sgd(param, group, state, reference).value
    size = number(torch.linalg.vector_norm(param.detach().to(moment_dtype(param))))
    length = number(torch.linalg.vector_norm(undecayed_gradient(param, group, reference)))
    if not (group["weight_decay"] and size and length):
        return Scalar(plain)
    ratio = size / (length + size * group["weight_decay"] + group["eps"])
    return Scalar(plain * ratio * group["trust_coefficient"])


@register_preconditioner("torch_optimizer.a2grad.A2GradInc")
def fading_a2grad(param: Tensor, group: State, state: State, reference: Tensor | None) -> Scalar:
    """The map of :func:`a2grad`, with a fading sum of squared distances."""
    return a2grad(param, {**group, "fades": True}, state, reference)


@register_preconditioner("torch_optimizer.a2grad.A2GradUni")
@register_preconditioner("torch_optimizer.a2grad.A2GradExp")
def a2grad(param: Tensor, group: State, state: State, reference: Tensor | None) -> Scalar:
    """``(a' + (1 - a') a) / (gamma + beta h)``, with ``h`` from the expected gradient's squared distance to the mean.

    ``a`` and ``a'`` weigh the step of the averaged sequence in this step and in the next one. The three classes differ
    in how ``h`` remembers: by a sum, by a sum with fading, or by the largest of a moving average (``rho``).
    """
    step = number(state.get("step", 0))
    gradient = undecayed_gradient(param, group, reference)
    mean = state["avg_grad"].to(gradient.dtype) if "avg_grad" in state else gradient
    distance = number((gradient - (mean * step + gradient) / (step + 1)).square().sum())
    if "rho" in group:
        moving = distance if step == 0 else group["rho"] * state["v_kk"] + (1 - group["rho"]) * distance
        total = (step + 1) * max(moving, state.get("v_k", 0.0))
    else:
        fading = (step / (step + 1)) ** 2 if group.get("fades") else 1.0
        total = fading * state.get("v_k", 0.0) + distance
    following = 2 / (step + 3)
    share = following + (1 - following) * state.get("alpha_k", 1.0)
    return Scalar(share / (2 * group["lips"] / (step + 1) + group["beta"] * math.sqrt(total)))


@register_preconditioner("torch_optimizer.apollo.Apollo")
def apollo(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr (1 - b) / (1 - b^t) / max(|B|, 1)``: ``B`` includes the coming correction along the last update."""
    step = number(state.get("step", 0))
    dtype = moment_dtype(param)
    zero = torch.zeros_like(param, dtype=dtype)
    gradient = zero if reference is None else expected_gradient(param, group, reference.to(dtype))
    momentum, curvature, last = (
        state[name].to(dtype) if name in state else zero for name in ("exp_avg_grad", "approx_hessian", "update")
    )
    share = (1 - group["beta"]) / (1 - group["beta"] ** (step + 1))
    size = last.norm(p=4) + group["eps"]
    square = (last / size).square()
    change = -share * ((gradient - momentum) / size * (last / size)).sum() - (curvature * square).sum()
    rate = number(group["lr"])
    if step < group["warmup"]:
        rate = (group["base_lr"] - group["init_lr"]) * step / group["warmup"] + group["init_lr"]
    return Diagonal(rate * share / (curvature + square * change).abs().clamp(min=1.0))
