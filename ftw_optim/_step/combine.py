"""The combined gradient: from the factors, from the graph, or from running the kept candidates once more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ftw_optim._capture.backward import Graph, gradients_set_aside
from ftw_optim._capture.owners import Owner
from ftw_optim._capture.plan import uncovered
from ftw_optim._capture.self_check import verify_projection
from ftw_optim._factors.factors import weighted_sum
from ftw_optim._factors.finiteness import all_finite, told
from ftw_optim._matching.selection import Selection
from ftw_optim._step.candidates import CandidatePass
from ftw_optim._step.closures import checked_losses
from ftw_optim._step.comparison import Comparison
from ftw_optim._step.gathering import PassFactors
from ftw_optim._step.parameters import StepParameters
from ftw_optim._step.run import Run, full_precision

Combined = tuple[dict[str, Tensor], bool]
"""The gradients by parameter name, and whether all of them are finite."""


def cheapest_way(model: nn.Module, parameters: StepParameters, layers: Sequence[Owner]) -> str:
    """The way that ``combine="auto"`` stands for: ``"factors"`` or ``"graph"``.

    Where every updated parameter has a rule, the factors cost less than a second backward, however few parameters are
    scored. Running modules again for parameters that are not scored costs more than a second backward.
    """
    again = {name for owner in layers if owner.rule is None for name in owner.parameters.values()}
    costly = again & (parameters.updated.keys() - parameters.scored.keys())
    return "graph" if costly or uncovered(layers, parameters.updated, model) else "factors"


def combine(
    run: Run, comparison: Comparison, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> tuple[Selection, Mapping[str, Tensor]]:
    """Form ``scale * sum_i weights[i] g_i`` for every updated parameter that was reached, in the first usable way.

    No ``.grad`` is changed.

    Args:
        run: the inputs and options of the step.
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
        updated = run.parameters.updated
        return selection, {name: torch.full_like(updated[name], torch.inf) for name in factors.candidates.footprints}
    for way in _usable_ways(run, selection, candidate_pass):
        precision = nullcontext() if way == "rerun" else full_precision(factors.candidates.losses)
        with torch.enable_grad(), precision, run.clock.phase("combine"):
            gradients, is_finite = _WAYS[way](run, selection, factors, candidate_pass)
        # Where nothing is captured, a candidate's infinite gradient shows only now. A scaler wants to see it.
        if run.scale > 1.0 or is_finite:
            return selection.applied_by(way), gradients
    return selection.applied_by(None), {}


def _usable_ways(run: Run, selection: Selection, candidate_pass: CandidatePass) -> list[str]:
    """The usable ways, in order; the first that gives a finite gradient is taken. Empty where there is none.

    The graph is not usable beside a rejected candidate: a backward would multiply its NaN by zero inside the layers.
    """
    if selection.skipped:
        return []
    if run.combine != "graph":
        return [run.combine]
    usable = [] if len(selection.rejected) else ["graph"]
    if run.parameters.scored.keys() == run.parameters.updated.keys():
        usable.append("factors")
    return [*usable, "rerun"] if candidate_pass.closure.takes_rows else usable


def _from_factors(run: Run, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass) -> Combined:
    """The weighted sum of the captured factors."""
    weights, updated = selection.spread_weights(), run.parameters.updated
    gradients = {
        name: weighted_sum(uses, weights, updated[name].shape).to(updated[name].dtype)
        for name, uses in factors.found.items()
    }
    # Gradients in the Gram matrix are known to be finite, unless they are too large for the parameter's dtype.
    unseen = [g for name, g in gradients.items() if name not in run.parameters.scored or g.dtype == torch.float16]
    return gradients, not unseen or all(told([all_finite(unseen)]))


def _from_graph(run: Run, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass) -> Combined:
    """A weighted backward over the same graph, checked against the factors that were captured from it."""
    weights, losses = selection.spread_weights(), factors.candidates.losses
    gradients = _ordinary_backward(run, [(weights.to(losses) * losses).sum() * run.scale])
    scored = {name: gradients[name] for name in run.parameters.scored if name in gradients}
    flags = verify_projection(
        factors.found,
        scored,
        weights,
        run.generator("projection"),
        factors.candidates.computed_in,
        more=[all_finite(gradients.values())],
    )
    return gradients, all(flags)


def _from_rerun(run: Run, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass) -> Combined:
    """A weighted backward over the kept candidates, run once more."""
    gradients = _ordinary_backward(run, _losses_again(run, selection, candidate_pass))
    return gradients, all(told([all_finite(gradients.values())]))


_WAYS: dict[str, Callable[[Run, Selection, PassFactors, CandidatePass], Combined]] = {
    "factors": _from_factors,
    "graph": _from_graph,
    "rerun": _from_rerun,
}
COMBINES = ("auto", *_WAYS)
"""The values of the option ``combine``."""


def _losses_again(run: Run, selection: Selection, candidate_pass: CandidatePass) -> Iterator[Tensor]:
    """The weighted losses of the kept candidates, a micro-batch at a time."""
    kept, weights = selection.kept, selection.weights
    value, done = candidate_pass.again(kept), 0
    for batch in value if isinstance(value, Iterator) else [value]:
        losses = checked_losses(batch)
        share = weights[done : done + len(losses)]
        done += len(losses)
        if done > len(kept):
            break
        yield (share.to(losses) * losses).sum() * run.scale
    if done != len(kept):
        raise ValueError(f"closure(rows=kept) must return the losses of these {len(kept)} rows, got {done}.")


def _ordinary_backward(run: Run, totals: Iterable[Tensor]) -> dict[str, Tensor]:
    """The gradients of the updated parameters from ``total.backward()`` for each total, added up."""
    updated = run.parameters.updated
    with gradients_set_aside(run.model.parameters()):
        for total in totals:
            # Named only where others would get a gradient too: a plain backward is what hooks and DDP expect, and the
            # only one that reentrant checkpointing takes.
            named = run.parameters.others_train and not Graph(total).reentrant
            torch.autograd.backward(total, inputs=list(updated.values()) if named else None)
        return {name: p.grad for name, p in updated.items() if p.grad is not None}
