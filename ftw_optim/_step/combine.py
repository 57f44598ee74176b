"""The combined gradient: from the factors, from the graph, or from running the kept candidates once more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ftw_optim._capture.backward import Graph, gradients_set_aside
from ftw_optim._capture.projections import verify_projection
from ftw_optim._capture.stand_ins import is_sharded
from ftw_optim._factors.factors import weighted_sum
from ftw_optim._factors.finiteness import all_finite, told
from ftw_optim._matching.selection import Selection
from ftw_optim._step import combine_shards
from ftw_optim._step.candidates import CandidatePass
from ftw_optim._step.comparison import Comparison
from ftw_optim._step.gathering import PassFactors
from ftw_optim._step.kept_graphs import Total
from ftw_optim._step.setup import StepSetup, full_precision
from ftw_optim._step.way import WAYS

Combined = tuple[dict[str, Tensor], bool]
"""The gradients by parameter name, and whether all of them are finite."""


def combine(
    setup: StepSetup, comparison: Comparison, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> tuple[Selection, Mapping[str, Tensor]]:
    """Form ``scale * sum_i weights[i] g_i`` for every updated parameter that was reached, in the first usable way.

    No ``.grad`` is changed.

    Args:
        setup: the inputs and options of the step.
        comparison: the matching problem; where it overflowed, the gradients are infinite, as a GradScaler expects.
        selection: the kept candidates and their weights.
        factors: the candidates' factors, multiplied by the scale.
        candidate_pass: runs the kept candidates once more.

    Returns:
        The selection, with the way that was taken, or skipped where no way is usable; and the gradients by parameter
        name.

    Raises:
        RuntimeError: the graph's gradient is not that of the factors.
        ValueError: the closure did not return the losses of ``rows``.
    """
    if comparison.overflowed:
        updated = setup.parameters.updated
        return selection, {name: torch.full_like(updated[name], torch.inf) for name in factors.reached}
    for way in _usable_ways(setup, selection, candidate_pass):
        with setup.clock.phase("combine"):
            (gradients, _), told = setup.ranks.told(
                partial(_formed, way, setup, selection, factors, candidate_pass),
                lambda found: (setup.parameters.mask(found[0]), found[1]),
            )
            # Where nothing is captured, a candidate's infinite gradient shows only now. A scaler wants to see it.
            if setup.scale > 1.0 or all(is_finite for _, is_finite in told):
                gradients = gradients if setup.ranks.alone else _of_all(setup, gradients, [mask for mask, _ in told])
                return selection.applied_by(way), gradients
    return selection.applied_by(None), {}


def _formed(
    way: str, setup: StepSetup, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> Combined:
    """The combined gradient of this process's candidates; of shards, this rank's part of that of all."""
    function = combine_shards.FUNCTIONS[way] if setup.in_shards else _FUNCTIONS[way]
    precision = nullcontext() if WAYS[way].needs_rows else full_precision(factors.candidates.losses)
    with torch.enable_grad(), precision:
        return function(setup, selection, factors, candidate_pass)


def _of_all(setup: StepSetup, gradients: Mapping[str, Tensor], reached: Sequence[int]) -> dict[str, Tensor]:
    """The sums of the gradients over all ranks, for the parameters that any of them reached."""
    names = setup.parameters.named(reached)
    updated = setup.parameters.updated
    plain = [name for name in names if not is_sharded(updated[name])]
    own = [gradients[name].detach() if name in gradients else torch.zeros_like(updated[name]) for name in plain]
    return {**gradients, **dict(zip(plain, setup.ranks.summed(own), strict=True))}


def _usable_ways(setup: StepSetup, selection: Selection, candidate_pass: CandidatePass) -> list[str]:
    """The usable ways, in order; the first that gives a finite gradient is taken. Empty where there is none.

    The graph is not usable beside a rejected candidate: a backward would multiply its NaN by zero inside the layers.
    """
    if selection.skipped:
        return []
    if not setup.way.keeps_graph:
        return [setup.way.name]
    usable = [] if len(selection.rejected) else ["graph"]
    if setup.parameters.scored.keys() == setup.parameters.updated.keys():
        usable.append("factors")
    return [*usable, "rerun"] if candidate_pass.takes_rows else usable


def _from_factors(
    setup: StepSetup, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> Combined:
    """The weighted sum of the captured factors."""
    weights, updated = factors.own(selection).row_weights(), setup.parameters.updated
    gradients = {
        name: weighted_sum(uses, weights, updated[name].shape).to(updated[name].dtype)
        for name, uses in factors.alone.items()
    }
    for bucket in factors.buckets:
        together = bucket.weighted_sum(weights, setup.buffer).to(updated[bucket.names[0]].dtype)
        gradients.update(zip(bucket.names, together, strict=True))
    # Gradients in the Gram matrix are known to be finite, unless they are too large for the parameter's dtype.
    unseen = [g for name, g in gradients.items() if name not in setup.parameters.scored or g.dtype == torch.float16]
    return gradients, not unseen or all(told([all_finite(unseen)]))


def _from_graph(
    setup: StepSetup, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> Combined:
    """A weighted backward over the same graph, checked against the factors that were captured from it."""
    weights = factors.own(selection).row_weights()
    totals = candidate_pass.weighted_losses(weights)
    gradients = _ordinary_backward(setup, totals, keep_graph=candidate_pass.keeps_target_graph)
    scored = {name: gradients[name] for name in setup.parameters.scored if name in gradients}
    flags = verify_projection(
        factors.alone,
        scored,
        weights,
        setup.generator("projection"),
        factors.candidates.computed_in,
        buckets=factors.buckets,
        buffer=setup.buffer,
        more=[all_finite(gradients.values())],
    )
    return gradients, all(flags)


def _from_rerun(
    setup: StepSetup, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> Combined:
    """A weighted backward over the kept candidates, run once more."""
    own = factors.own(selection)
    totals = candidate_pass.losses_again(own.kept, own.weights)
    gradients = _ordinary_backward(
        setup, chain(totals, candidate_pass.weighted_losses(own.target_weights, of_target=True))
    )
    return gradients, all(told([all_finite(gradients.values())]))


_FUNCTIONS: dict[str, Callable[[StepSetup, Selection, PassFactors, CandidatePass], Combined]] = {
    "factors": _from_factors,
    "graph": _from_graph,
    "rerun": _from_rerun,
}


def _ordinary_backward(setup: StepSetup, totals: Iterable[Total], *, keep_graph: bool = False) -> dict[str, Tensor]:
    """The gradients that ``(scale * total).backward()`` forms for the updated parameters, summed over the totals."""
    updated, several = setup.parameters.updated, not setup.ranks.alone
    with gradients_set_aside(setup.structure.parameters.values()):
        for total, _ in totals:
            # Named only where others would get a gradient too: a plain backward is what hooks expect, and the only one
            # that reentrant checkpointing takes.
            named = (several or setup.parameters.others_train) and not Graph(total).reentrant
            inputs = list(updated.values()) if named else None
            scaled = total * setup.scale
            if several and inputs is not None:  # past DDP, which may still wait for a backward pass of its own
                found = torch.autograd.grad(scaled, inputs, retain_graph=keep_graph, allow_unused=True)
                for parameter, gradient in zip(updated.values(), found, strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            else:
                torch.autograd.backward(scaled, inputs=inputs, retain_graph=keep_graph)
        return {name: p.grad for name, p in updated.items() if p.grad is not None}
