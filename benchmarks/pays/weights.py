"""Stages that go by what a proposal expects of the step's candidates, pooled over all that it has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from ftw_optim import FilterStage, Matching, WeightSolution, WeightStage


class Expecting:
    """The mark of a stage that wants expected scores.

    Attributes:
        scores: of the step's candidates.
    """

    scores: Tensor = torch.empty(0)


class ExpectedWeights(WeightStage, Expecting):
    """Each candidate by its expected score, if that is positive, with a mean of one; target rows by one each."""

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        weights = torch.ones(len(matching), dtype=torch.float64)
        useful = self.scores.double().clamp(min=0.0)
        if len(useful) <= len(matching) and bool(useful.any()):
            weights[: len(useful)] = useful / useful.mean()
        slack = matching.cross_gram.double() - matching.gram.double() @ weights
        return WeightSolution(weights=weights, slack=slack, iterations=0, converged=True)


class ExpectedFilter(FilterStage, Expecting):
    """Keeps the candidates of which at least a share of the best one's score is expected; all, where none is positive.

    Args:
        share: the share.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, matching: Matching, *more: Matching) -> Tensor:
        if len(self.scores) != len(matching) or not bool((self.scores > 0.0).any()):
            return torch.arange(len(matching))
        return (self.scores >= self.share * self.scores.max()).nonzero()[:, 0]
