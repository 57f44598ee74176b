"""The combined gradient of a sharded model: whole for a few parameters at a time, summed and divided as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ftw_optim._capture.backward import gradients_set_aside
from ftw_optim._capture.projections import PassingGradients
from ftw_optim._capture.stand_ins import is_sharded, leaves, whole_zeros
from ftw_optim._factors.factors import weighted_sum
from ftw_optim._factors.finiteness import all_finite, told
from ftw_optim._matching.selection import Selection
from ftw_optim._ranks.scattering import Scattered
from ftw_optim._step.candidates import CandidatePass
from ftw_optim._step.gathering import PassFactors
from ftw_optim._step.kept_graphs import Total
from ftw_optim._step.setup import StepSetup

Gradients = dict[str, Tensor]


def _from_factors(
    setup: StepSetup, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> tuple[Gradients, bool]:
    """The weighted sums of the captured factors."""
    weights, updated = factors.own(selection).row_weights(), setup.parameters.updated
    few: Gradients = {}
    for bucket in factors.buckets:
        few.update(zip(bucket.names, bucket.weighted_sum(weights, setup.buffer), strict=True))
    sums = Scattered(setup.ranks, updated)
    plain: Gradients = {}
    for name in factors.reached:
        if name in few:
            whole = few.pop(name)
        elif name in factors.found:
            whole = weighted_sum(factors.found[name], weights, updated[name].shape)
        else:
            whole = whole_zeros(updated[name])
        if sums.takes(name):
            sums.add(name, whole)
        else:
            plain[name] = whole.to(updated[name].dtype)
    return _with_sums(plain, sums)


def _from_graph(
    setup: StepSetup, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> tuple[Gradients, bool]:
    """A weighted backward over the same graph, checked against the factors that were captured from it."""
    weights = factors.own(selection).row_weights()
    generator = setup.generator("projection")
    check = PassingGradients(factors.found, weights, generator, factors.candidates.computed_in)

    def see(name: str, gradient: Tensor) -> None:
        if name in setup.parameters.scored:
            check.see(name, gradient)

    totals = candidate_pass.weighted_losses(weights)
    found = _backward(setup, totals, keep_graph=candidate_pass.keeps_target_graph, see=see)
    check.finish()
    return found


def _from_rerun(
    setup: StepSetup, selection: Selection, factors: PassFactors, candidate_pass: CandidatePass
) -> tuple[Gradients, bool]:
    """A weighted backward over the kept candidates, run once more, on all ranks as often as on that with the most."""
    own = factors.own(selection)
    totals = candidate_pass.losses_again(own.kept, own.weights)
    return _backward(setup, chain(totals, candidate_pass.weighted_losses(own.target_weights, of_target=True)))


FUNCTIONS: Mapping[str, Callable[[StepSetup, Selection, PassFactors, CandidatePass], tuple[Gradients, bool]]] = {
    "factors": _from_factors,
    "graph": _from_graph,
    "rerun": _from_rerun,
}
"""Ways of combining by name, as in ``combine.py``: gradients (a shard as this rank holds it), and are they finite."""


def _backward(
    setup: StepSetup,
    totals: Iterable[Total],
    *,
    keep_graph: bool = False,
    see: Callable[[str, Tensor], None] = lambda name, gradient: None,
) -> tuple[Gradients, bool]:
    """The gradients that ``(scale * total).backward()`` forms, summed over the totals, those of shards over all ranks.

    Each is taken when it is whole, before FSDP2 would sum it in its own way.

    Args:
        setup: the inputs and options of the step.
        totals: the losses.
        keep_graph: leave the graph for another pass.
        see: called with each gradient as it comes.
    """
    updated = setup.parameters.updated
    read = {name: leaf for name, leaf in leaves(setup.structure, updated).items() if not is_sharded(leaf)}
    sums = Scattered(setup.ranks, updated)
    plain: Gradients = {}
    counts = True

    def take(name: str, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if counts:
            see(name, gradient)
        else:
            gradient = torch.zeros_like(gradient)
        if sums.takes(name):
            sums.add(name, gradient)
        else:
            plain[name] = plain[name] + gradient if name in plain else gradient

    with ExitStack() as stack:
        stack.enter_context(gradients_set_aside([*setup.structure.parameters.values(), *read.values()]))
        for name, leaf in read.items():
            hooked: Any = leaf
            stack.callback(hooked.register_post_accumulate_grad_hook(partial(take, name)).remove)
        for loss, counts in totals:  # noqa: B007  (read in take)
            setup.meet()
            torch.autograd.backward(loss * setup.scale, inputs=list(read.values()), retain_graph=keep_graph)
    return _with_sums(plain, sums)


def _with_sums(plain: Mapping[str, Tensor], sums: Scattered) -> tuple[Gradients, bool]:
    found = sums.finish()
    return {**plain, **found}, all(told([all_finite([*plain.values(), *sums.parts.values()])]))
