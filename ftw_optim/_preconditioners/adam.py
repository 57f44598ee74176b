"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.maps import Diagonal
from ftw_optim._preconditioners.registry import register_preconditioner

FLOOR = 0.03
"""Smallest reference entry that enters the second moment, over the root mean square of the non-zero ones.

Entries where the second moment is almost nothing and single candidates are not would dominate the Gram matrix and
ruin its precision: a parameter's first gradient, a rare token's row.
"""


def expected_gradient(param: Tensor, group: dict[str, Any], reference: Tensor) -> Tensor:
    """``|gradient|`` as it enters the second moment: sign turned under ``maximize``, coupled decay added, floored."""
    gradient = -reference if group.get("maximize") else reference
    if group.get("weight_decay") and not group.get("decoupled_weight_decay", False):
        gradient = gradient + param.detach().to(gradient.dtype) * group["weight_decay"]
    count = gradient.count_nonzero().clamp(min=1)
    floor = FLOOR * torch.linalg.vector_norm(gradient) / count.to(gradient.dtype).sqrt()
    return gradient.abs().clamp(min=floor)


@register_preconditioner(torch.optim.Adam)
@register_preconditioner(torch.optim.AdamW)
def adam(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Diagonal:
    """``lr (1 - b1) / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps)`` with ``v' = b2 v + (1 - b2) reference^2``."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    dtype = torch.promote_types(torch.float32, param.dtype)
    step = float(state["step"]) + 1 if state else 1.0
    moment = state["exp_avg_sq"].to(dtype) * beta2 if state else torch.zeros_like(param, dtype=dtype)
    if reference is not None:
        expected = expected_gradient(param, group, reference.to(dtype))
        moment = moment.addcmul(expected, expected, value=1 - beta2)
    if group["amsgrad"] and state:
        moment = torch.maximum(moment, state["max_exp_avg_sq"].to(dtype))
    correction = (1 - beta2**step) ** 0.5
    share = float(group["lr"]) * (1 - beta1) / (1 - beta1**step)
    return Diagonal(share / (moment.sqrt() / correction + group["eps"]))
