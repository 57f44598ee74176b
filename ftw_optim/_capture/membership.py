"""Proof, at every step, of which candidate each row of a layer belongs to, where a model may have chosen its rows.

A model that drops padding, or runs a head on some positions only, gives a layer rows whose number alone says nothing
about whose they are. Such a reading is free where the graph shows that the rows come from layers with known ones by
operations that move none. Otherwise the losses are weighted at random in a further backward pass, which ends at these
layers: the output gradient of each row must come back multiplied by the weight of its candidate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ftw_optim._capture.backward import BUILT_IN
from ftw_optim._capture.layer_use import Returned, Use
from ftw_optim._capture.replay.axes import SHARED, Axis
from ftw_optim._capture.self_check import noise, tolerance
from ftw_optim._factors.finiteness import told
from ftw_optim._factors.row_groups import RowGroups

_MOVES = re.compile(
    r"Index|Masked(Select|Scatter)|Gather|Scatter|Put|Take|Sort|Topk|Nested|Segment|Embedding|Repeat|Roll|Flip|Unique"
)
_CUTS = re.compile(r"Slice|Select|Split|Unbind|Cat|Stack|Narrow|Chunk")


def unproven(uses: Iterable[Use], holds: Callable[[Tensor], bool]) -> list[Use]:
    """The uses whose rows may have been chosen inside the model, as far as the graph does not exclude it.

    Args:
        uses: in the order of the calls.
        holds: whether a tensor is an input of the model.
    """
    uses = list(uses)
    if not any(use.layout.loose for use in uses):
        return []
    made_by = {one.edge.node: use for use in uses for one in use.returned}
    open_: list[Use] = []
    unknown: set[int] = set()
    clean: dict[Node, bool] = {}
    for use in uses:
        if use.layout.loose and not _is_input(use, holds) and not _from_known(use.made_by, made_by, unknown, clean):
            open_.append(use)
            unknown.add(id(use))
    return open_


def _is_input(use: Use, holds: Callable[[Tensor], bool]) -> bool:
    """Whether the layer runs on an input of the model as it is, so that nobody has chosen among its rows."""
    first = next(iter(use.call.tensors()), None)
    return use.made_by is None and first is not None and holds(first)


def _from_known(start: Node | None, made_by: Mapping[Node, Use], unknown: set[int], clean: dict[Node, bool]) -> bool:
    """Whether all that a tensor was made of comes from layers whose rows are known, by operations that move no row."""
    if start is None:
        return False
    sources, seen, waiting = 0, {start}, [start]
    while waiting:
        node = waiting.pop()
        use = made_by.get(node)
        if use is not None:
            if id(use) in unknown:
                return False
            sources += 1
            continue
        if clean.get(node):
            sources += 1
            continue
        if getattr(node, "variable", None) is not None:
            continue
        if not _moves_nothing(node):
            return False
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    if sources:
        clean[start] = True
    return sources > 0


def _moves_nothing(node: Node) -> bool:
    """Whether an operation keeps the rows in their order: one of PyTorch's own that cannot pick rows by an index."""
    name = type(node).__name__
    if not BUILT_IN.fullmatch(name) or _MOVES.match(name):
        return False
    return not _CUTS.match(name) or getattr(node, "_saved_dim", 0) not in (0, None)


@final
class Membership:
    """The proof for some uses of layers.

    Args:
        uses: the uses whose rows may have been chosen inside the model.
        losses: the losses, shape ``(n,)``; those that are not finite count as zero.
        weights: the random weights, shape ``(n,)`` float64.
        scale: multiplies the losses, as in the pass that is proved.
        groups: the candidates of the rows of the model's input; None where these are the candidates.
    """

    def __init__(
        self, uses: Sequence[Use], losses: Tensor, weights: Tensor, scale: float, *, groups: RowGroups | None = None
    ) -> None:
        self._weights = weights if groups is None else groups.spread(weights)
        self._errors: list[tuple[Use, Tensor, Tensor]] = []
        returned = [one for use in uses for one in use.returned]
        finite = losses.isfinite()
        total = (weights.to(losses) * torch.where(finite, losses, torch.zeros_like(losses)) * scale).sum()
        edges = [one.edge for one in returned]
        found = torch.autograd.grad(total, edges, allow_unused=True, retain_graph=True) if edges else ()
        self._weighted = {
            id(one): gradient.reshape(one.shape)
            for one, gradient in zip(returned, found, strict=True)
            if gradient is not None
        }

    def compare(self, use: Use) -> None:
        """Compare the gradients that arrived at a use with the weighted ones, before they are dropped."""
        for one in use.returned:
            weighted = self._weighted.pop(id(one), None)
            if weighted is None or one.gradient is None:
                continue
            rows = _by_candidate(use, one, one.gradient, len(self._weights))
            other = _by_candidate(use, one, weighted, len(self._weights))
            if rows is None or other is None:
                continue  # which attribution refuses by name
            rows = rows * self._weights.to(rows)[:, None]
            known = rows.isfinite() & other.isfinite()
            zero = rows.new_zeros(())
            rows, other = torch.where(known, rows, zero), torch.where(known, other, zero)
            size = torch.maximum(torch.linalg.vector_norm(rows), torch.linalg.vector_norm(other))
            self._errors.append((use, torch.linalg.vector_norm(rows - other), size))

    def finish(self, computed_in: Iterable[torch.dtype]) -> None:
        """Refuse rows that are not those of the candidates in order and in equal parts.

        Raises:
            NotImplementedError: the gradients of some rows did not come back with their candidate's weight.
        """
        if not self._errors:
            return
        least, bound = noise([size for _, _, size in self._errors]), tolerance(computed_in)
        misses = told([~(error <= bound * size + least.to(size)) for _, error, size in self._errors])
        wrong = [use for (use, _, _), miss in zip(self._errors, misses, strict=True) if miss]
        if wrong:
            first = next(iter(wrong[0].call.tensors()), None)
            shape = "rows" if first is None else f"inputs of shape {tuple(first.shape)}"
            raise NotImplementedError(
                f"Expected layer {wrong[0].owner.name!r} to take the {len(self._weights)} candidates in order and in "
                f"equal parts, got {shape} whose loss gradients belong to the candidates in another way: the rows were "
                "chosen inside the model (padding that is dropped, positions with labels), or losses mix candidates. "
                "Tell whose they are: sample_ids=ids of the token grid, -1 where a position is dropped, or "
                f"sample_ids={{{wrong[0].owner.name!r}: ids}} with one for each row of this layer (a tensor, or a "
                "function that returns it once the layer has run)."
            )


def _by_candidate(use: Use, one: Returned, values: Tensor, n: int) -> Tensor | None:
    """The values of each candidate as it was read, ``(n, ...)`` flattened; None where they are not divided so."""
    axis = one.axis if use.owner.rule is None else Axis(0)
    if axis is None:
        return None
    if axis.dim == SHARED:
        return values.flatten(1) if len(values) == n else None
    if not values.shape[axis.dim] or values.shape[axis.dim] % n:
        return None
    return axis.split(values.to(torch.promote_types(values.dtype, torch.float32)), n).flatten(1)
