"""SGD with its momentum forms, and its average: scalars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import number
from ftw_optim._preconditioners.maps import Scalar
from ftw_optim._preconditioners.registry import register_preconditioner


@register_preconditioner(torch.optim.SGD)
def sgd(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Scalar:
    """``lr`` times the share of the fresh gradient in the coming step; the first one knows no dampening."""
    momentum = number(group["momentum"])
    share = 1.0
    if momentum:
        share = 1.0 if state.get("momentum_buffer") is None else 1.0 - group["dampening"]
        if group["nesterov"]:
            share = 1.0 + momentum * share
    return Scalar(number(group["lr"]) * share)


@register_preconditioner(torch.optim.ASGD)
def averaged_sgd(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Scalar:
    """The step size that the last step left, which has the learning rate in it.

    One that a learning rate of zero left, as at the start of a warm-up, counts as the rate: a map of nothing would
    skip the step, time and again.
    """
    return Scalar(number(state.get("eta", 0.0)) or number(group["lr"]))
