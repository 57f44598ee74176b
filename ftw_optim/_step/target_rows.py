"""What the target of a step is: a gradient that guides, or rows that take part in the step and guide each other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ftw_optim._capture.stand_ins import whole_zeros
from ftw_optim._factors.factors import weighted_sum
from ftw_optim._step.candidates import CandidatePass
from ftw_optim._step.captured_rows import CapturedRows
from ftw_optim._step.setup import StepSetup, full_precision
from ftw_optim._step.target import TargetNow, usable


def target_of(setup: StepSetup, candidate_pass: CandidatePass) -> TargetNow:
    """The target of this step.

    Where target rows take part, they are captured as candidates are, before these, and no gradient of theirs is formed
    unless it is to be remembered, or a sketch wants to know what gradient to expect. Where others guide, the rows have
    a closure of their own.
    """
    if not setup.trains_on_target:
        return setup.target_gradient()
    if callable(setup.trains_on_target):
        guide = setup.target_gradient()
        with setup.clock.phase("target"):
            return replace(guide, rows=candidate_pass.target_rows(setup.trains_on_target, at_least=1))
    with setup.clock.phase("target"):
        rows = candidate_pass.target_rows(setup.target.closure, at_least=2 if setup.ranks.alone else 1)
        with torch.no_grad(), full_precision(rows.losses):
            return _of_rows(setup, rows)


def _of_rows(setup: StepSetup, rows: CapturedRows) -> TargetNow:
    target, scored = setup.target, setup.parameters.scored
    kept = usable(setup.kept_target, scored) if target.remembers else None
    guide, coming = kept, None
    if target.remembers or setup.sketch is not None:
        new = {name: _mean(rows, name, parameter, setup.scale) for name, parameter in scored.items()}
        coming = target.averaged(kept, new) if target.remembers else None
        guide = kept if kept is not None or setup.sketch is None else new
    return TargetNow(
        gradients={} if guide is None else guide,
        finite=torch.ones(0, dtype=torch.bool),
        before=setup.kept_target,
        remembered=target.remembers,
        coming=coming,
        rows=rows,
        share=0.0 if kept is None else target.decay,
        guides_itself=True,
        guide_losses=rows.losses.detach(),
    )


def _mean(rows: CapturedRows, name: str, parameter: Tensor, scale: float) -> Tensor:
    """The mean gradient of the target rows, float32 at least; zero where they do not reach the parameter."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if name not in rows.found:
        return whole_zeros(parameter, dtype)
    weights = torch.full((len(rows.losses),), 1 / len(rows.losses), dtype=torch.float64)
    return weighted_sum(rows.found[name], weights, parameter.shape).to(dtype) / scale
