"""Weights from what a proposal expects of its records, pooled over all that it has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw_optim import Matching, WeightSolution, WeightStage


class ExpectedWeights(WeightStage):
    """Each candidate by its expected score, if that is positive, with a mean of one; target rows by one each.

    Attributes:
        scores: of the step's candidates, all of which are kept.
    """

    def __init__(self) -> None:
        self.scores: Tensor = torch.empty(0)

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        weights = torch.ones(len(matching), dtype=torch.float64)
        useful = self.scores.double().clamp(min=0.0)
        if len(useful) <= len(matching) and bool(useful.any()):
            weights[: len(useful)] = useful / useful.mean()
        slack = matching.cross_gram.double() - matching.gram.double() @ weights
        return WeightSolution(weights=weights, slack=slack, iterations=0, converged=True)
