"""SGD with its momentum forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.maps import Scalar
from ftw_optim._preconditioners.registry import register_preconditioner


@register_preconditioner(torch.optim.SGD)
def sgd(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Scalar:
    """``lr`` times the share of the fresh gradient in the coming step; the first one knows no dampening."""
    momentum = float(group["momentum"])
    share = 1.0
    if momentum:
        share = 1.0 if state.get("momentum_buffer") is None else 1.0 - group["dampening"]
        if group["nesterov"]:
            share = 1.0 + momentum * share
    return Scalar(float(group["lr"]) * share)
