"""Where the combined gradient comes from: the factors, the common graph, or the kept candidates once more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftw_optim._capture.backward import Graph, finite, gradients_set_aside
from ftw_optim._capture.self_check import told, verify_projection
from ftw_optim._factors.factors import Factors, weighted_sum
from ftw_optim._matching.problem import Selection
from ftw_optim._step.closures import checked_losses, takes_rows
from ftw_optim._step.parameters import Members

UPDATES = ("auto", "factors", "graph", "rerun")


def usable_updates(update: str, selection: Selection, members: Members, closure: Callable[..., Any]) -> list[str]:
    """The ways that can serve, the first one that gives a finite gradient to be taken; empty where none can.

    A backward through the common graph would multiply a rejected candidate's NaN by zero inside the layers.
    """
    if update != "graph":
        return [update]
    usable = [] if len(selection.rejected) else ["graph"]
    if members.scored.keys() == members.parameters.keys():
        usable.append("factors")
    return [*usable, "rerun"] if takes_rows(closure) else usable


def combined_gradients(
    update: str,
    selection: Selection,
    found: Mapping[str, list[Factors]],
    losses: Tensor,
    members: Members,
    model: nn.Module,
    closure: Callable[..., Any],
    *,
    scale: float,
    generator: torch.Generator,
    computed_in: Iterable[torch.dtype] = (),
) -> tuple[dict[str, Tensor], bool]:
    """``scale * sum_i weights[i] g_i`` of every updated parameter that was reached, and whether all of it is finite.

    ``.grad`` is left alone.

    Args:
        update: ``"factors"``, ``"graph"`` or ``"rerun"``.
        selection: whom to combine, with which weights.
        found: factors, multiplied by ``scale``.
        losses: shape ``(n,)``, with their graph if ``update`` is ``"graph"``.
        members: which parameters.
        model: whose ``.grad`` is set aside during a backward.
        closure: called as ``closure(rows=kept)`` if ``update`` is ``"rerun"``; may return an iterator of micro-batches.
        scale: of the losses.
        generator: of the projections that compare graph and factors.
        computed_in: the dtypes the captured layers computed in.

    Raises:
        RuntimeError: the graph's gradient is not that of the factors.
        ValueError: the closure did not return the losses of ``rows``.
    """
    if update == "rerun":
        gradients = _ordinary_backward(_run_again(closure, selection, scale), members, model)
        return gradients, all(told([finite(gradients.values())]))
    weights = torch.zeros(len(losses), dtype=torch.float64)
    weights[selection.kept] = selection.weights
    if update == "factors":
        gradients = {
            name: weighted_sum(uses, weights, members.parameters[name].shape).to(members.parameters[name].dtype)
            for name, uses in found.items()
        }
        # What the Gram matrix has seen is finite, unless it is too large for the parameter.
        unseen = [g for name, g in gradients.items() if name not in members.scored or g.dtype == torch.float16]
        return gradients, not unseen or all(told([finite(unseen)]))
    gradients = _ordinary_backward([(weights.to(losses) * losses).sum() * scale], members, model)
    scored = {name: gradients[name] for name in members.scored if name in gradients}
    more = [finite(gradients.values())]
    return gradients, all(verify_projection(found, scored, weights, generator, computed_in, more=more))


def _run_again(closure: Callable[..., Any], selection: Selection, scale: float) -> Iterator[Tensor]:
    """The weighted losses of the kept candidates, a micro-batch at a time."""
    kept, weights = selection.kept, selection.weights
    value, done = closure(rows=kept), 0
    for batch in value if isinstance(value, Iterator) else [value]:
        losses = checked_losses(batch)
        share = weights[done : done + len(losses)]
        done += len(losses)
        if done > len(kept):
            break
        yield (share.to(losses) * losses).sum() * scale
    if done != len(kept):
        raise ValueError(f"closure(rows=kept) must return the losses of these {len(kept)} rows, got {done}.")


def _ordinary_backward(totals: Iterable[Tensor], members: Members, model: nn.Module) -> dict[str, Tensor]:
    """What ``total.backward()`` forms for the updated parameters, one after another."""
    with gradients_set_aside(model.parameters()):
        for total in totals:
            # Named only where others would get a gradient too: a plain backward is what hooks and DDP expect, and the
            # only one that reentrant checkpointing takes.
            named = members.others_train and not Graph(total).reentrant
            torch.autograd.backward(total, inputs=list(members.parameters.values()) if named else None)
        return {name: p.grad for name, p in members.parameters.items() if p.grad is not None}
