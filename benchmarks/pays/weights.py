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


class TiltedWeights(WeightStage):
    """Uniform weights, tilted by the scores as far as these say more than chance; target rows only guide.

    The score of a candidate is the mean of its products with the target rows, in units of its norm. How far scores
    differ beyond what the target rows' disagreement explains is their reliability: that of a table of candidates by
    target rows, ``1 - noise / variance``, with the noise from what neither a candidate's nor a row's mean explains. A
    candidate gets ``max(0, 1 + strength reliability z)``, with ``z`` its score, standardised.

    Args:
        strength: of the tilt; with 1 a candidate at one standard deviation below the mean gets nothing, if the scores
            are reliable.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength
        self.reliability = 0.0

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        gram = matching.gram.double()
        guides = int((matching.cross_gram_error == 0.0).flip(0).cumprod(0).sum())
        n = len(gram) - guides
        weights = torch.zeros(len(gram), dtype=torch.float64)
        weights[:n] = self.tilt(gram[:n, n:] / gram.diagonal()[:n, None].sqrt())
        slack = matching.cross_gram.double() - gram @ weights
        return WeightSolution(weights=weights, slack=slack, iterations=0, converged=True)

    def tilt(self, products: Tensor) -> Tensor:
        """The weights of candidates from their products with each target row, ``(n, m)``."""
        n, m = products.shape
        if n < 2 or m < 2 or not bool(products.isfinite().all()):
            return torch.ones(n, dtype=torch.float64)
        scores = products.mean(1)
        centred = scores - scores.mean()
        rest = products - scores[:, None] - products.mean(0) + products.mean()
        noise = float(rest.square().sum()) / ((n - 1) * (m - 1)) / m
        variance = float(centred.square().sum()) / (n - 1)
        self.reliability = max(0.0, 1.0 - noise / variance) if variance > 0.0 else 0.0
        if not self.reliability:
            return torch.ones(n, dtype=torch.float64)
        return (1.0 + self.strength * self.reliability * centred / variance**0.5).clamp(min=0.0)


class HorizonWeights(WeightStage):
    """Weights that sum to one and match the target over several steps: ``w' K w / 2 - horizon b' w`` is least.

    What a candidate's gradient has of its own averages out over the steps that a momentum remembers, while what it has
    in common with others adds up: so the target counts ``horizon`` times. Where no candidate's product stands out, the
    weights are nearly uniform; fitted weights that are normalised afterwards are fitted the more sharply, the less the
    products say.

    Args:
        horizon: number of steps, such as ``1 / (1 - beta1)``.
    """

    def __init__(self, horizon: float = 10.0) -> None:
        self.horizon = horizon

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        gram, wanted = matching.gram.double(), self.horizon * matching.cross_gram.double()
        n = len(gram)
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        largest = float(torch.linalg.matrix_norm(gram, 2))
        rounds, converged = 0, not largest > 0.0
        ahead, momentum = weights, 1.0
        while not converged and rounds < 2000:
            rounds += 1
            new = on_simplex(ahead - (gram @ ahead - wanted) / largest)
            next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = new + (momentum - 1) / next_momentum * (new - weights)
            converged = float((new - weights).abs().max()) < 1e-10
            weights, momentum = new, next_momentum
        slack = wanted / self.horizon - gram @ weights
        return WeightSolution(weights=weights, slack=slack, iterations=rounds, converged=converged)


def on_simplex(values: Tensor) -> Tensor:
    """The point with entries >= 0 that sum to one, nearest to ``values``."""
    ordered = values.sort(descending=True).values
    counts = torch.arange(1, len(values) + 1, dtype=values.dtype)
    shifts = (ordered.cumsum(0) - 1) / counts
    kept = int((ordered > shifts).sum())
    return (values - shifts[kept - 1]).clamp(min=0.0)
