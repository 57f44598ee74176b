"""SGD with its forms of momentum, and averaged SGD: scalars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import number
from ftw_optim._preconditioners.maps import Scalar
from ftw_optim._preconditioners.registry import register_preconditioner


@register_preconditioner(torch.optim.SGD, stacks=True)
def sgd(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Scalar:
    """``lr`` times the share of the fresh gradient in the coming step; the first step has no dampening."""
    momentum = number(group["momentum"])
    share = 1.0
    if momentum:
        share = 1.0 if state.get("momentum_buffer") is None else 1.0 - group["dampening"]
        if group["nesterov"]:
            share = 1.0 + momentum * share
    return Scalar(number(group["lr"]) * share)


@register_preconditioner(torch.optim.ASGD, stacks=True)
def averaged_sgd(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Scalar:
    """The step size ``eta`` that the last step left in the state; it includes the learning rate.

    Where it is zero after a step at learning rate zero, as at the start of a warm-up, the present learning rate is
    taken: with a map of zero every step would be skipped.
    """
    return Scalar(number(state.get("eta", 0.0)) or number(group["lr"]))
