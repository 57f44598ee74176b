"""Weight stages: the weight of each kept candidate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from ftw_optim._matching.active_set import ActiveSet
from ftw_optim._matching.nnls import damped
from ftw_optim._matching.problem import Matching
from ftw_optim._matching.scaled_system import ScaledSystem
from ftw_optim._matching.solution import WeightSolution

Normalization = Literal["sum", "norm"] | None


class WeightStage(ABC):
    """The interface of weight stages, which give each of the kept candidates a non-negative weight.

    A stage consists of its hyper-parameters and one call. It sees the matching problem of one step, restricted to the
    kept candidates, and keeps no state.

    Attributes:
        metrics: names of further metrics in which the stage is given the matching problem, after the first one.
        normalize: how the fitted weights are scaled afterwards. ``"sum"``: divided by their sum. ``"norm"``: scaled so
            that the combined gradient is as long, in the preconditioned metric, as the mean gradient of all accepted
            candidates. None: applied as fitted.
    """

    metrics: ClassVar[tuple[str, ...]] = ()
    normalize: Normalization = "sum"

    @abstractmethod
    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        """The fitted weights, before they are normalised.

        Args:
            matching: the problem of the kept candidates, in the optimizer's metric.
            more: the problem of the same candidates in each of the stage's ``metrics``.
        """


@final
@dataclass(frozen=True, kw_only=True)
class NonNegativeLeastSquares(WeightStage):
    """Weights whose combined gradient lies closest to the target gradient; see :func:`solve_nnls`.

    The weights are the non-negative minimiser for ``gram + (ridge + anchor) * d * I`` and
    ``cross_gram + anchor * d / k``, where ``d`` is the mean diagonal of the kept block of ``gram``. Their slack is that
    of this system. ``anchor_to`` and ``confidence`` are for target rows in the step, whose gradients are few and noisy.

    Args:
        ridge: strength of the pull towards zero weights, in units of ``d``.
        anchor: strength of the pull towards equal weights, in units of ``d``.
        anchor_to: ``"uniform"``: towards ``1 / k`` each; ``"positive"``: towards equal weights on the rows of positive
            ``cross_gram``, whose sum is the sum of these over ``d``, and zero on all others.
        confidence: number of standard errors of ``cross_gram`` that are taken off it first, where it is estimated from
            target rows in the step.
        normalize: how the fitted weights are scaled afterwards; see :class:`WeightStage`.
        tol: largest slack accepted at a zero weight, relative to the largest ``cross_gram``.

    Raises:
        ValueError: a strength is negative or not finite, ``tol`` is not in (0, 1), or ``normalize`` is not
            known.
    """

    ridge: float = 0.0
    anchor: float = 0.0
    anchor_to: Literal["uniform", "positive"] = "uniform"
    confidence: float = 0.0
    normalize: Normalization = "sum"
    tol: float = 1e-10

    def __post_init__(self) -> None:
        for name, strength in (("ridge", self.ridge), ("anchor", self.anchor)):
            if not 0.0 <= strength < math.inf:
                raise ValueError(
                    f"{name} must be finite and not negative, got {strength}. "
                    "It is relative to the mean squared length of the kept gradients: 0.1 is gentle, 0 off."
                )
        if self.anchor_to not in ("uniform", "positive"):
            raise ValueError(f"anchor_to must be 'uniform' or 'positive', got {self.anchor_to!r}.")
        if not 0.0 <= self.confidence < math.inf:
            raise ValueError(f"confidence must be finite and not negative, got {self.confidence}: 1 is usual, 0 off.")
        if self.normalize not in ("sum", "norm", None):
            raise ValueError(f"normalize must be 'sum', 'norm' or None, got {self.normalize!r}.")
        if not 0.0 < self.tol < 1.0:
            raise ValueError(f"tol must be in (0, 1), got {self.tol}. Choose one near 1e-10.")

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        """See :class:`WeightStage`."""
        asked = matching.cross_gram
        if self.confidence and matching.cross_gram_error is not None:
            asked = asked - self.confidence * matching.cross_gram_error
        to_positive = self.anchor_to == "positive"
        gram, cross_gram = damped(matching.gram, asked, ridge=self.ridge, anchor=self.anchor, to_positive=to_positive)
        # Damping is formed in float64, yet what it is added to has no more digits than before.
        eps = torch.finfo(matching.gram.dtype).eps
        system = ScaledSystem(gram, cross_gram, tol=self.tol, eps=eps, target_energy=matching.target_energy)
        active = ActiveSet.to_fit(system)
        active.admit_all()
        return active.solution()


@final
@dataclass(frozen=True, kw_only=True)
class UniformWeights(WeightStage):
    """Uniform weights ``1 / k``, so that the combined gradient is the mean of the kept ones."""

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        """See :class:`WeightStage`; nothing is fitted, so ``converged`` is always True."""
        k = len(matching)
        weights = torch.full((k,), 1.0 / max(k, 1), dtype=torch.float64)
        slack = matching.cross_gram.double() - matching.gram.double() @ weights
        return WeightSolution(weights=weights, slack=slack, iterations=0, converged=True)
