"""Optimizers that treat a matrix as a whole: Muon (polar factor), Shampoo (inverse roots), SOAP (rotated basis)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ftw_optim._preconditioners.look_ahead import FLOOR, floored, moment_dtype, number, undecayed_gradient
from ftw_optim._preconditioners.maps import Diagonal, Kronecker, RotatedDiagonal, Scalar, along_axes
from ftw_optim._preconditioners.registry import register_preconditioner

DAMPING = 0.03
"""Damping relative to the largest singular value: directions with almost no momentum would dominate otherwise."""


@register_preconditioner("torch.optim.Muon")  # by name: older releases of torch have none
def muon(param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None) -> Kronecker | Scalar:
    """``lr scale share (M M' + damping)^(-1/2)`` from the left, or from the right with ``M' M``, whichever is smaller.

    ``M`` is the matrix that the coming step orthogonalises: the momentum, with the expected gradient included. The
    optimizer's Newton-Schulz iteration only approximates this inverse root, within its intended factor of 0.7 to 1.2.
    """
    dtype = moment_dtype(param)
    momentum, rows, columns = number(group["momentum"]), *param.shape
    buffer = state["momentum_buffer"].to(dtype) if "momentum_buffer" in state else torch.zeros_like(param, dtype=dtype)
    gradient = undecayed_gradient(param, group, reference)
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
    """``(square + damping)^(-1/2)`` of a symmetric matrix; None where that is zero."""
    # float64: the square of a matrix has the square of its condition.
    values, vectors = torch.linalg.eigh(square.double())
    largest = values[-1]
    if not bool(largest > 0):
        return None
    damped = (values.clamp(min=0.0) + DAMPING**2 * largest).rsqrt()
    root: Tensor = ((vectors * damped) @ vectors.T).to(square)
    return root


@register_preconditioner("torch_optimizer.shampoo.Shampoo")
def shampoo(
    param: Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    reference: Tensor | None,
    *,
    floor: float = FLOOR,
) -> Kronecker | Scalar:
    """``lr share`` times ``statistics^(-1/order)`` along each axis, or the roots that the coming step keeps.

    The statistics include the expected gradient, axis by axis, already preconditioned along the axes before. The
    eigenvalues of its squares are floored: a direction without any part in them or in the past would outweigh all
    others. With a ``floor`` near zero the statistics are those of the step itself.
    """
    momentum = number(group["momentum"])
    share = 1 - momentum if momentum and "momentum_buffer" in state else 1.0
    dtype, order = moment_dtype(param), param.ndim
    if order == 0:
        return Scalar(number(group["lr"]) * share)
    whole = None
    if reference is not None:
        whole = reference.to(dtype) * share
        if share < 1:
            whole = whole + momentum * state["momentum_buffer"].to(dtype)
        if group["weight_decay"]:
            whole = whole + group["weight_decay"] * param.detach().to(dtype)
    roots: list[Tensor] = []
    for axis, size in enumerate(param.shape):
        if number(state.get("step", 0)) % number(group["update_freq"]):
            roots.append(state[f"inv_precond_{axis}"].to(dtype))
            continue
        if f"precond_{axis}" in state:
            statistics = state[f"precond_{axis}"].double()
        else:
            statistics = torch.eye(size, dtype=torch.float64, device=param.device) * group["epsilon"]
        if whole is not None:
            statistics = statistics + _floored_square(whole.movedim(axis, 0).reshape(size, -1), floor)
        values, vectors = torch.linalg.eigh(statistics)
        # Clamped to rounding level: eigenvalues below zero are rounding errors.
        values = values.clamp(min=torch.finfo(values.dtype).eps * number(values[-1]))
        roots.append(((vectors * values.pow(-1 / order)) @ vectors.T).to(dtype))
        if whole is not None:
            whole = along_axes(whole, [roots[-1] if other == axis else None for other in range(order)])
    roots[-1] = roots[-1] * (number(group["lr"]) * share)
    return Kronecker(left=roots[0] if order > 1 else None, right=roots[-1], between=tuple(roots[1:-1]))


def _floored_square(matrix: Tensor, floor: float) -> Tensor:
    """``matrix matrix'`` with eigenvalues raised to at least ``floor^2`` times the mean of the non-zero ones."""
    values, vectors = torch.linalg.eigh((matrix @ matrix.T).double())
    values = values.clamp(min=0.0)
    present = (values > 1e-12 * values[-1]).sum().clamp(min=1)
    square: Tensor = (vectors * values.clamp(min=floor**2 * number(values.sum() / present))) @ vectors.T
    return square


@register_preconditioner("pytorch_optimizer.optimizer.soap.SOAP", attributes=("maximize",))
def soap(
    param: Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    reference: Tensor | None,
    *,
    floor: float = FLOOR,
) -> RotatedDiagonal | Diagonal:
    """Adam's map in the basis ``Q`` of the state: ``lr (1 - b1) / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps)``.

    The very first step of a group only fills the state and moves nothing; its map is that of the step after it, in the
    basis that the expected gradient will give. With a ``floor`` near zero the second moment is that of the step itself.
    """
    if group["merge_dims"] and param.ndim > 1:
        raise NotImplementedError("Expected merge_dims=False: a basis of merged axes is not supported.")
    dtype = moment_dtype(param)
    beta1, beta2 = (number(beta) for beta in group["betas"])
    gradient = torch.zeros_like(param, dtype=dtype)
    if reference is not None:
        # Floored in its basis, not here; the decay is decoupled.
        gradient = -reference.to(dtype) if group["maximize"] else reference.to(dtype)
    if state.get("Q") is not None:
        bases = [basis.to(dtype) if len(basis) else None for basis in state["Q"]]
    else:
        limit = number(group["max_precondition_dim"]) if param.ndim > 1 or group["precondition_1d"] else 0
        bases = [
            torch.linalg.eigh(_square_along(gradient, axis))[1].flip(1).to(dtype) if size <= limit else None
            for axis, size in enumerate(param.shape)
        ]
    rotation = [None if basis is None else basis.T for basis in bases]
    fresh = along_axes(gradient, rotation)
    fresh = fresh if reference is None else floored(fresh, floor)
    moment = fresh.square() * (1 - beta2)
    if "exp_avg_sq" in state:
        moment = moment + beta2 * state["exp_avg_sq"].to(dtype)
    step = max(1.0, number(group.get("step", 0)))  # the group counts its initialisation too
    correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step) if group["correct_bias"] else 1.0
    root = moment.sqrt() + group["eps"]
    decay = 1 - number(group["lr"]) * number(group["weight_decay"])  # of the moved parameter
    values = number(group["lr"]) * correction * (1 - beta1) * decay / root
    if group["normalize_gradient"]:
        momentum = state["exp_avg"].to(dtype) * beta1 if "exp_avg" in state else torch.zeros_like(gradient)
        update = along_axes(momentum + (1 - beta1) * gradient, rotation) / root
        values = values / (update.square().mean().sqrt() + group["eps"])  # a rotation does not change it
    if all(basis is None for basis in bases):
        return Diagonal(values)
    return RotatedDiagonal(
        left=bases[0] if param.ndim > 1 else None, right=bases[-1], values=values, between=tuple(bases[1:-1])
    )


def _square_along(gradient: Tensor, axis: int) -> Tensor:
    matrix = gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1)
    return (matrix @ matrix.T).double()
