"""Candidates compared with each other and with the target: the small problem of a step, and whom it is about.

What is not finite is rejected on the way. A candidate's square tells: it is not finite where a factor is not. Beside
such a candidate nothing can be measured (the expected gradient, and so ``P``, has it inside): the others are compared
anew.
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
from ftw_optim._step.run import Run
from ftw_optim._step.target import TargetNow


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The small problem of a step.

    Attributes:
        problem: products in each metric, zero for rejected candidates; empty where there is nothing to match.
        losses: shape ``(n,)``, on the CPU.
        accepted: bool (n,): candidates that are not rejected.
        overflowed: a scaled gradient did, a candidate's or the target's: nothing may be applied.
        target_overflowed: the target's did.
    """

    problem: Mapping[Metric, Products]
    losses: Tensor
    accepted: Tensor
    overflowed: bool = False
    target_overflowed: bool = False


def compare(run: Run, factors: PassFactors, target: TargetNow) -> Comparison:
    """The products of all candidates that are finite, with each other and with the target.

    Raises:
        ValueError: the target is not finite.
    """
    while True:
        seen, before = factors.measured(), factors.accepted
        target_overflowed = target.overflowed(seen.target, run.scale)
        left = before & seen.clean & seen.measurable
        if target_overflowed or not torch.equal(left, before):
            clean = before & factors.clean(seen)
            # A bare run would leave what makes a GradScaler back off.
            overflowed = run.scale > 1.0 and bool((before & seen.finite & ~clean).any())
            if target_overflowed or overflowed:
                return Comparison(
                    problem={},
                    losses=seen.losses,
                    accepted=clean,
                    overflowed=True,
                    target_overflowed=target_overflowed,
                )
            left = left if torch.equal(clean, before) else clean  # beside one that is not, nothing can be measured
            factors.keep_only(left)
        if not seen.problem or not bool(left.any()):
            return Comparison(problem={}, losses=seen.losses, accepted=left)
        if run.sketch is not None or torch.equal(left, before):  # in a sketch each is alone
            problem = {metric: one.of(left) for metric, one in seen.problem.items()}
            return Comparison(problem=problem, losses=seen.losses, accepted=left)
