"""The choice of all ranks: one of them makes it for those whose candidates are one selection; such choices are joined.

Each group of ranks fits its own candidates to the same target. The mean of the groups' combined gradients is applied:
where each of them is as close to the target as ``e``, their mean is as close or closer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from ftw_optim._matching.selection import Selection, SketchReport
from ftw_optim._step.choice import choose
from ftw_optim._step.comparison import Comparison
from ftw_optim._step.gathering import PassFactors
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.shared_factors import SharedFactors


def choice_of_all(setup: StepSetup, comparison: Comparison, factors: PassFactors) -> Selection:
    """The selection of this step, the same on all ranks but for the Gram matrix, where each has that of its group."""
    if not isinstance(factors, SharedFactors) or not factors.in_groups:
        return setup.ranks.as_first_says(lambda: choose(setup, comparison))
    within = factors.within

    def told(selection: Selection) -> Selection | None:
        squares = selection.squares.clone()  # and not the whole matrix that it is a view of
        return replace(selection, gram=torch.empty(0, 0), group_squares=squares) if within.own == 0 else None

    own, others = setup.ranks.told(lambda: within.as_first_says(lambda: choose(setup, comparison)), told)
    groups = [selection for selection in others if selection is not None]
    return joined(groups, own=own, number=setup.ranks.own // within.count)


def joined(groups: Sequence[Selection], *, own: Selection, number: int) -> Selection:
    """The selections of all groups as one, whose combined gradient is the mean of those that keep some candidate.

    Args:
        groups: the selections, in the order of the ranks.
        own: that of this rank's group, with its Gram matrix.
        number: of this group.
    """
    starts = [0, *accumulate(len(one.losses) for one in groups)]
    active = [one for one in groups if not one.skipped]
    share = 1 / max(1, len(active))
    weights = torch.cat([one.weights for one in groups]) * share
    target_weights = torch.cat([one.target_weights * (0.0 if one.skipped else share) for one in groups])
    applied = torch.cat([weights, target_weights])
    total = float(applied.sum())

    def mean(of: Callable[[Selection], float]) -> float:
        return share * sum(map(of, active))

    energies = [one.target_energy for one in groups if one.target_energy > 0.0]  # of those that compared any candidate
    cosine = mean(lambda one: one.cosine)
    sketches = [one.sketch for one in groups if one.sketch is not None]
    return replace(
        own,
        losses=torch.cat([one.losses for one in groups]),
        kept=torch.cat([one.kept + start for one, start in zip(groups, starts, strict=False)]),
        weights=weights,
        fitted_scale=mean(lambda one: one.fitted_scale),
        group_squares=torch.cat([one.squares for one in groups]),
        cross_gram=torch.cat([one.cross_gram for one in groups]),
        target_energy=sum(energies) / max(1, len(energies)),
        cosine=cosine,
        residual=1.0 - max(0.0, cosine) ** 2,
        predicted_decrease=mean(lambda one: one.predicted_decrease),
        effective_size=total**2 / float(applied.square().sum()) if total > 0.0 else 0.0,
        rejected=torch.cat([one.rejected + start for one, start in zip(groups, starts, strict=False)]),
        skipped=not active,
        converged=all(one.converged for one in groups),
        target_weights=target_weights,
        target_losses=torch.cat([one.target_losses for one in groups]),
        group=slice(starts[number], starts[number + 1]),
        sketch=None
        if not sketches
        else SketchReport(dim=sketches[0].dim, error=sum(one.error for one in sketches) / len(sketches)),
    )
