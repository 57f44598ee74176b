"""The algorithm of one step, with one line for each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from ftw_optim._factors.micro_batches import Footprint
from ftw_optim._matching.selection import Selection
from ftw_optim._step.candidates import CandidatePass
from ftw_optim._step.choices import choice_of_all
from ftw_optim._step.closures import CandidateClosure, Plain
from ftw_optim._step.combine import combine
from ftw_optim._step.comparison import compare
from ftw_optim._step.gathering import target_and_factors
from ftw_optim._step.parameters import StepParameters
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.watch import Watch


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """The outcome of one step before it is applied.

    Attributes:
        selection: the kept candidates and their weights.
        gradients: the combined gradient of every updated parameter that was reached, times the scale.
        loss: the weighted loss, detached.
        parameters: the parameters of the step.
        kept_target: the target gradient that the next step is given; None: it forms its own.
        watch: what the last look at held-out rows found, for the next step.
        footprints: number of uses, multiplications and bytes of the factors of each captured parameter.
    """

    selection: Selection
    gradients: Mapping[str, Tensor]
    loss: Tensor
    parameters: StepParameters
    kept_target: Mapping[str, Tensor] | None
    watch: Watch
    footprints: Mapping[str, Footprint]


def selective_step(
    setup: StepSetup, closure: CandidateClosure, apply: Callable[[StepResult], None]
) -> StepResult | Plain:
    """One step: selects, and applies the weighted candidates' gradient that comes closest to the target's.

    Args:
        setup: the inputs and options of the step.
        closure: returns the candidates' losses.
        apply: puts the gradient where the inner optimizer finds it, and lets that make its step.

    Returns:
        The result that was applied; or the request of a closure that has no candidates, for which nothing was done.
    """
    result = select(setup, closure)  # whose factors and graphs are gone when the inner optimizer steps
    if isinstance(result, StepResult):
        apply(result)
    return result


def select(setup: StepSetup, closure: CandidateClosure) -> StepResult | Plain:
    """One selection, which changes nothing: the algorithm, a line a stage; see :func:`selective_step`."""
    with setup.undistracted():
        with CandidatePass(setup, closure) as candidate_pass:
            target, factors = target_and_factors(setup, candidate_pass)
            if isinstance(factors, Plain):
                return factors
            comparison = compare(setup, factors, target)
            selection = choice_of_all(setup, comparison, factors)
            selection, gradients = combine(setup, comparison, selection, factors, candidate_pass)
        watch = setup.watch_after(target)
    guide_loss, held_out_loss, _ = watch.found
    return StepResult(
        selection=replace(
            selection,
            guide_loss=guide_loss,
            held_out_loss=held_out_loss,
            blind=watch.blind,
            stale=setup.target.guides_no_more(setup.backwards),
            mine=factors.mine,
            group=selection.group if factors.in_groups else slice(0, len(selection.losses)),
            milliseconds=setup.clock.milliseconds,
        ),
        gradients=gradients,
        loss=selection.weighted_loss().to(factors.candidates.losses.device),
        parameters=setup.parameters,
        kept_target=target.to_keep(overflowed=comparison.target_overflowed),
        watch=watch,
        footprints=factors.candidates.footprints,
    )
