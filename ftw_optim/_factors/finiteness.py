"""Whether losses, factors and gradients are finite, asked with as few looks at a device as can be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors


def finite_candidates(found: Mapping[str, Sequence[Factors]], losses: Tensor, *others: Tensor) -> Tensor:
    """Mask of the candidates whose loss and factors are all finite, in ``others`` too: bool ``(n,)``."""
    loss = losses.detach().isfinite()
    masks = [mask.to(loss.device) for mask in (*others, *(use.finite() for uses in found.values() for use in uses))]
    return torch.stack([loss, *masks]).all(dim=0)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every entry of all tensors is finite: a bool scalar on their device, in one kernel for many of them."""
    some = [tensor for tensor in tensors if tensor.numel()]  # of no entries there is no largest
    # A sum of sizes takes a third of the time of the largest, but has no room in float16.
    short = any(tensor.dtype == torch.float16 for tensor in some)
    return torch.nn.utils.get_total_norm(some, norm_type=math.inf if short else 1.0).isfinite()


def told(flags: Sequence[Tensor]) -> list[bool]:
    """The values of some flags, bool of any shape, one after another, copied from the device at once."""
    if not flags:
        return []
    answers: list[bool] = torch.cat([flag.to(flags[0].device).reshape(-1) for flag in flags]).cpu().tolist()
    return answers
