"""Damping and non-negative least squares of small dense systems, in Gram form."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw_optim._matching.active_set import ActiveSet
from ftw_optim._matching.scaled_system import ScaledSystem
from ftw_optim._matching.solution import WeightSolution


def solve_nnls(gram: Tensor, cross_gram: Tensor, *, tol: float = 1e-10) -> WeightSolution:
    r"""Non-negative weights whose combined gradient lies closest to the target gradient.

    The weights minimise ``w @ gram @ w / 2 - cross_gram @ w`` over ``w >= 0``: up to a constant, half the squared
    distance to the target in the norm of the preconditioner. The system is solved in float64 on the CPU; the dtype of
    ``gram`` tells which of its digits are rounding, and the weights are not fitted to those. Multiplying ``gram`` by
    ``4**p`` and ``cross_gram`` by ``2**p`` multiplies the weights by ``2**-p``, to the last bit.

    Where candidates are linearly dependent, one of the minimisers is found; its candidates of positive weight are
    linearly independent. Where no minimum exists (a combination of length zero with a positive ``cross_gram``), the
    weights stay bounded and ``converged`` is False.

    Args:
        gram: shape ``(k, k)``, symmetric positive semi-definite (not checked), may be singular.
        cross_gram: shape ``(k,)``.
        tol: largest slack accepted at a zero weight, relative to the largest ``cross_gram``. The comparison must hold
            for both as they are, and for both divided by the length of their candidate, so that a short candidate
            counts as much as a long one. Slack that may be rounding is always accepted.

    Returns:
        Weights without unit (``1 / k`` each gives the mean gradient), their slack in the unit of
        ``cross_gram``, the iterations used and whether they converged. Empty and converged for ``k = 0``.

    Raises:
        ValueError: the shapes disagree, an entry is not finite or ``tol`` is not in (0, 1).
        TypeError: ``gram`` or ``cross_gram`` is not of a floating-point dtype.

    Source: Lawson and Hanson (1974), algorithm 23.10, in the Gram form of Bro and De Jong (1997).
    """
    active = ActiveSet.to_fit(ScaledSystem(gram, cross_gram, tol=tol))
    active.admit_all()
    return active.solution()


def damped(
    gram: Tensor, cross_gram: Tensor, *, ridge: float, anchor: float, to_positive: bool = False
) -> tuple[Tensor, Tensor]:
    """The damped system in float64: ``ridge`` pulls towards zero weights and ``anchor`` towards equal ones.

    Args:
        gram: shape ``(k, k)``.
        cross_gram: shape ``(k,)``.
        ridge: strength in units of the mean diagonal ``d`` of ``gram``.
        anchor: strength in the same unit.
        to_positive: whether it pulls towards equal weights ``s / p`` on the ``p`` rows with ``cross_gram > 0`` and zero
            on all others, where ``s`` is the sum of these ``cross_gram`` over ``d``; else towards ``1 / k`` on all.

    Returns:
        ``gram + (ridge + anchor) * d * I`` and ``cross_gram + anchor * d * w``, with the weights ``w`` pulled towards.
    """
    gram = gram.to("cpu", torch.float64)
    cross_gram = cross_gram.to("cpu", torch.float64)
    k = len(cross_gram)
    if k == 0 or ridge == anchor == 0:
        return gram, cross_gram
    unit = gram.diagonal().mean()
    pull = unit / k
    if to_positive:
        positive = cross_gram > 0
        pull = torch.where(positive, cross_gram, 0.0).sum() / positive.sum().clamp(min=1) * positive
    return gram + (ridge + anchor) * unit * torch.eye(k, dtype=torch.float64), cross_gram + anchor * pull
