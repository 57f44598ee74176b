"""NovoGrad: one second moment for a whole tensor, frozen at the expected gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ftw_optim._preconditioners.look_ahead import expected_gradient, moment_dtype, number
from ftw_optim._preconditioners.maps import Scalar
from ftw_optim._preconditioners.registry import register_preconditioner


@register_preconditioner("torch_optimizer.novograd.NovoGrad")
def novograd(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Scalar:
    """``lr / (sqrt(v') + eps)`` with the tensor's own ``v``, the square of the first gradient to begin with."""
    beta1, beta2 = (number(beta) for beta in group["betas"])
    square = 0.0
    if reference is not None:
        decoupled = {**group, "weight_decay": 0.0}  # added behind the division
        gradient = expected_gradient(param, decoupled, reference.to(moment_dtype(param)))
        square = number(gradient.square().sum())
    moment = number(state["exp_avg_sq"]) if "exp_avg_sq" in state else 0.0
    moment = square if moment == 0.0 else beta2 * moment + (1 - beta2) * square
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        moment = max(moment, number(state["max_exp_avg_sq"]))
    share = 1 - beta1 if group["grad_averaging"] else 1.0
    return Scalar(number(group["lr"]) * share / (moment**0.5 + group["eps"]))
