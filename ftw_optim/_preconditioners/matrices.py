"""Muon: the momentum's polar factor, whose inverse square root is frozen on the smaller side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import expected_gradient, moment_dtype, number
from ftw_optim._preconditioners.maps import Kronecker, Scalar
from ftw_optim._preconditioners.registry import register_preconditioner

DAMPING = 0.03
"""Smallest singular value that counts, over the largest: directions that the momentum hardly has would dominate."""


@register_preconditioner(torch.optim.Muon)
def muon(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Kronecker | Scalar:
    """``lr scale share (M M' + damping)^(-1/2)`` from the left, or from the right with ``M' M``, whichever is smaller.

    ``M`` is what the coming step orthogonalises: the momentum with the expected gradient in it. The Newton-Schulz
    iteration of the optimizer only comes near that inverse root, within the factor of 0.7 to 1.2 it is made for.
    """
    dtype = moment_dtype(param)
    momentum, rows, columns = number(group["momentum"]), *param.shape
    buffer = state["momentum_buffer"].to(dtype) if "momentum_buffer" in state else torch.zeros_like(param, dtype=dtype)
    gradient = torch.zeros_like(buffer)
    if reference is not None:
        gradient = expected_gradient(
            param, {**group, "weight_decay": 0.0}, reference.to(dtype)
        )  # its decay is decoupled
    matrix = buffer.lerp(gradient, 1 - momentum)
    share = 1 - momentum
    if group["nesterov"]:
        matrix, share = gradient.lerp(matrix, momentum), (1 - momentum) * (1 + momentum)
    scale = {"match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}.get(
        group["adjust_lr_fn"] or "original", math.sqrt(max(1.0, rows / columns))
    )
    factor = number(group["lr"]) * scale * share
    root = _inverse_root(matrix @ matrix.T if rows <= columns else matrix.T @ matrix)
    if root is None:
        return Scalar(factor)
    return Kronecker(left=root * factor) if rows <= columns else Kronecker(right=root * factor)


def _inverse_root(square: Tensor) -> Tensor | None:
    """``(square + damping)^(-1/2)`` of a symmetric matrix; None of zero."""
    # float64: the square of a matrix has the square of its condition.
    values, vectors = torch.linalg.eigh(square.double())
    largest = values[-1]
    if not bool(largest > 0):
        return None
    damped = (values.clamp(min=0.0) + DAMPING**2 * largest).rsqrt()
    root: Tensor = ((vectors * damped) @ vectors.T).to(square)
    return root
