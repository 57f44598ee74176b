"""The comparison of candidates with each other and with the target, which gives the matching problem of a step.

Candidates that are not finite are rejected here. They show by their squares, which are not finite where a factor is
not. The products of the others are not usable then, because the expected gradient, and so ``P``, includes such a
candidate: the others are compared again without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._step.gathering import PassFactors
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.target import TargetNow


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The matching problem of a step.

    Attributes:
        problem: products in each metric, zero for rejected candidates; empty where there is nothing to match.
        losses: shape ``(n,)``, on the CPU.
        accepted: mask of the candidates that are not rejected, bool (n,).
        overflowed: whether a scaled gradient overflowed, a candidate's or the target's: then nothing may be applied.
        target_overflowed: whether the scaled target gradient overflowed.
    """

    problem: Mapping[Metric, Products]
    losses: Tensor
    accepted: Tensor
    overflowed: bool = False
    target_overflowed: bool = False


def compare(setup: StepSetup, factors: PassFactors, target: TargetNow) -> Comparison:
    """The products of all finite candidates with each other and with the target.

    Raises:
        ValueError: the target losses or the target gradient are not finite.
    """
    while True:
        seen, before = factors.measured(), factors.accepted
        target_overflowed = target.overflowed(seen.target, setup.scale)
        left = before & seen.clean & seen.measurable
        if target_overflowed or not torch.equal(left, before):
            clean = before & factors.clean(seen)
            # Without selection, an infinite gradient would make a GradScaler lower its scale: so it must here.
            overflowed = setup.scale > 1.0 and bool((before & seen.finite & ~clean).any())
            if target_overflowed or overflowed:
                return Comparison(
                    problem={},
                    losses=seen.losses,
                    accepted=clean,
                    overflowed=True,
                    target_overflowed=target_overflowed,
                )
            # Beside a candidate that is not clean nothing is measured rightly: the clean ones get another look.
            left = left if factors.measures_alone or torch.equal(clean, before) else clean
            factors.keep_only(left)
        if not seen.problem or not bool(left.any()):
            return Comparison(problem={}, losses=seen.losses, accepted=left)
        if factors.measures_alone or torch.equal(left, before):
            problem = {metric: one.of(left) for metric, one in seen.problem.items()}
            return Comparison(problem=problem, losses=seen.losses, accepted=left)
