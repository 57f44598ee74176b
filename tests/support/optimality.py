"""The optimality conditions of non-negative least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw_optim import WeightSolution

EPS = torch.finfo(torch.float64).eps


def assert_optimal(solution: WeightSolution, gram: Tensor, cross_gram: Tensor) -> None:
    """At the minimum, and only there: w >= 0, slack <= 0, and slack = 0 where w > 0."""
    lengths = gram.diagonal().sqrt()
    # Relative to the largest product; and rounding of gram @ weights itself, which is all that is left of the
    # products of a long candidate that the target is orthogonal to.
    rounding = 100 * EPS * len(gram) * lengths * (solution.weights * lengths).sum()
    atol = 1e-9 * cross_gram.abs().max() + rounding
    assert solution.converged
    assert (solution.weights >= 0).all()
    assert (solution.slack <= atol).all()
    assert (solution.slack[solution.weights > 0].abs() <= atol[solution.weights > 0]).all()
