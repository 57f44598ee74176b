"""The comparison of candidates with each other and with the target, which gives the matching problem of a step.

Candidates that are not finite are rejected here. They show by their squares, which are not finite where a factor is
not. The products of the others are not usable then, because the expected gradient, and so ``P``, includes such a
candidate: the others are compared again without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.target_rows import leaving_one_out
from ftw_optim._step.gathering import PassFactors
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.target import LOOK, TargetNow


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The matching problem of a step.

    Attributes:
        problem: products in each metric, zero for rejected candidates; empty where there is nothing to match.
        losses: shape ``(n,)``, on the CPU; of target rows that take part in the step, too, behind the candidates'.
        accepted: mask of the candidates that are not rejected, bool (n,); of these rows, too, which never are.
        targets: the number of target rows that take part.
        overflowed: whether a scaled gradient overflowed, a candidate's or the target's: then nothing may be applied.
        target_overflowed: whether the scaled target gradient overflowed.
    """

    problem: Mapping[Metric, Products]
    losses: Tensor
    accepted: Tensor
    targets: int = 0
    overflowed: bool = False
    target_overflowed: bool = False


def compare(setup: StepSetup, factors: PassFactors, target: TargetNow) -> Comparison:
    """The products of all finite candidates with each other and with the target.

    Raises:
        ValueError: the target losses or the target gradient are not finite.
    """

    def anywhere(flag: bool) -> bool:
        """Whether it holds in any selection of the step: all make the same rounds, as they wait for each other."""
        return setup.ranks.any(lambda: flag) if factors.in_groups else flag

    while True:
        seen, before = factors.measured(), factors.accepted
        target_overflowed = target.overflowed(seen.target, setup.scale)
        left = before & seen.clean & seen.measurable
        if anywhere(target_overflowed or not torch.equal(left, before)):
            overflow = partial(target.rows_overflowed, seen.finite, setup.parameters.scored, setup.scale)
            target_overflowed |= setup.ranks.any(overflow)
            clean = before & factors.clean(seen)
            # Without selection, an infinite gradient would make a GradScaler lower its scale: so it must here.
            overflowed = setup.scale > 1.0 and bool((before & seen.finite & ~clean).any())
            if anywhere(target_overflowed or overflowed):
                return Comparison(
                    problem={},
                    losses=seen.losses,
                    accepted=clean,
                    targets=target.count,
                    overflowed=True,
                    target_overflowed=target_overflowed,
                )
            # Beside a candidate that is not clean nothing is measured rightly: the clean ones get another look.
            left = left if factors.measures_alone or torch.equal(clean, before) else clean
            if anywhere(bool(target.count) and not bool(left[-target.count :].all())):
                raise ValueError(
                    "Expected target rows whose gradients can be compared, but the square of one is not finite. "
                    "Nothing was changed; " + LOOK
                )
            if not torch.equal(left, before):
                factors.keep_only(left)
        nothing = not seen.problem or not bool(left.any())
        if not anywhere(not (nothing or factors.measures_alone or torch.equal(left, before))):
            if nothing:
                return Comparison(problem={}, losses=seen.losses, accepted=left, targets=target.count)
            problem = setup.ranks.beginning(partial(_asked, seen.problem, target, left))
            return Comparison(problem=problem, losses=seen.losses, accepted=left, targets=target.count)


def _asked(problem: Mapping[Metric, Products], target: TargetNow, accepted: Tensor) -> dict[Metric, Products]:
    """The products of the accepted rows with what the target asks for, where its own rows tell it."""
    if target.guides_itself:
        problem = {
            metric: leaving_one_out(one, target.count, remembered=target.share) for metric, one in problem.items()
        }
    return {metric: one.of(accepted) for metric, one in problem.items()}
