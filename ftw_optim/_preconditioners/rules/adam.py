"""Adam and its relatives: the fresh share of the momentum over the root of a decaying second moment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import dequantised, expected_gradient, moment_dtype, number, second_moment
from ftw_optim._preconditioners.maps import Diagonal, Scalar
from ftw_optim._preconditioners.registry import register_preconditioner

State = dict[str, Any]


def _betas(group: State) -> tuple[float, float]:
    first, second = group["betas"][:2]
    return number(first), number(second)


def _coming(state: State, group: State) -> float:
    """The number of the coming step, counted from one; some optimizers keep the count in the group."""
    return number(state.get("step", group.get("step", 0.0))) + 1


def _moment(param: Tensor, group: State, state: State, reference: Tensor | None) -> Tensor:
    beta2 = _betas(group)[1]
    return second_moment(param, group, state.get("exp_avg_sq"), reference, decay=beta2, fresh=1 - beta2)


@register_preconditioner(torch.optim.Adam, stacks=True)
@register_preconditioner(torch.optim.AdamW, stacks=True)
def adam(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr (1 - b1) / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps)`` with ``v' = b2 v + (1 - b2) reference^2``."""
    beta1, beta2 = _betas(group)
    step = _coming(state, group)
    moment = _moment(param, group, state, reference)
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        moment = torch.maximum(moment, dequantised(state["max_exp_avg_sq"], moment.dtype))
    share = number(group["lr"]) * (1 - beta1) / (1 - beta1**step)
    root = moment.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])  # in place: it is the large layers' time
    return Diagonal(root.reciprocal_().mul_(share))


@register_preconditioner("schedulefree.adamw_schedulefree.AdamWScheduleFree", stacks=True)
def schedule_free_adamw(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr (1 - b1 (1 - c)) / (sqrt(v' / (1 - b2^t)) + eps)`` at the point the model trains at.

    ``c`` is the weight of the coming iterate in the average; the counter is the group's.
    """
    beta1, beta2 = _betas(group)
    done = number(group["k"])
    warmup = number(group["warmup_steps"])
    rate = number(group["lr"]) * (min(1.0, (done + 1) / warmup) if warmup else 1.0)
    weight = (done + 1) ** number(group["r"]) * max(rate, number(group["lr_max"])) ** number(group["weight_lr_power"])
    total = number(group["weight_sum"]) + weight
    average = weight / total if total else 0.0
    moment = _moment(param, {**group, "weight_decay": 0.0}, state, reference)  # its decay is decoupled
    root = moment.sqrt() / (1 - beta2 ** (done + 1)) ** 0.5 + group["eps"]
    return Diagonal(rate * (1 - beta1 * (1 - average)) / root)


@register_preconditioner(torch.optim.NAdam, stacks=True)
def nadam(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """Adam with Nesterov momentum: the fresh gradient counts in this step and in the look-ahead to the next one."""
    beta1, beta2 = _betas(group)
    step = _coming(state, group)
    momentum, following = (
        beta1 * (1.0 - 0.5 * 0.96 ** (at * number(group["momentum_decay"]))) for at in (step, step + 1)
    )
    product = number(state.get("mu_product", 1.0)) * momentum
    share = (1 - momentum) / (1 - product) + following * (1 - beta1) / (1 - product * following)
    moment = _moment(param, group, state, reference)
    return Diagonal(number(group["lr"]) * share / ((moment / (1 - beta2**step)).sqrt() + group["eps"]))


@register_preconditioner(torch.optim.RAdam, stacks=True)
def radam(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal | Scalar:
    """A scalar in the first steps; then rectified Adam, with eps added before the second moment is corrected."""
    beta1, beta2 = _betas(group)
    step = _coming(state, group)
    share = number(group["lr"]) * (1 - beta1) / (1 - beta1**step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 5.0:
        return Scalar(share)
    rectified = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    moment = _moment(param, group, state, reference)
    return Diagonal(share * rectified * math.sqrt(1 - beta2**step) / (moment.sqrt() + group["eps"]))


@register_preconditioner(torch.optim.Adamax, stacks=True)
def adamax(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """``lr (1 - b1) / (1 - b1^t) / max(b2 u, |reference| + eps)``, with ``u`` the decayed maximum of past gradients."""
    beta1, beta2 = _betas(group)
    dtype = moment_dtype(param)
    largest = state["exp_inf"].to(dtype) * beta2 if "exp_inf" in state else torch.zeros_like(param, dtype=dtype)
    fresh = torch.zeros_like(largest)
    if reference is not None:
        fresh = expected_gradient(param, group, reference.to(dtype)).abs()
    share = number(group["lr"]) * (1 - beta1) / (1 - beta1 ** _coming(state, group))
    return Diagonal(share / torch.maximum(largest, fresh + group["eps"]))
