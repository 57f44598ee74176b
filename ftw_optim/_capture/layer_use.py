"""Records of the calls of captured layers: what is kept of each call until its factors are formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ftw_optim._capture.layouts import POSITIONS, TIME_FIRST, Grid, Layout, packed
from ftw_optim._capture.owners import Owner
from ftw_optim._capture.replay.axes import SHARED, Axis, candidate_axes
from ftw_optim._capture.replay.calls import Call
from ftw_optim._layers.registry import LayerRule
from ftw_optim._layers.special import has_no_rows


@final
@dataclass(kw_only=True, eq=False, slots=True)
class Returned:
    """One tensor that a layer returned: its edge in the graph, and its gradient once that has arrived."""

    index: int
    shape: torch.Size
    value: Tensor | None
    """The output, kept only where it will be compared: a run without capture would not hold this memory."""
    version: int | None
    edge: GradientEdge
    axis: Axis | None = None
    gradient: Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether the kept value has been changed in place since the call."""
        return self.value is not None and version_of(self.value) != self.version


class _Referable:
    """Lets weak references to a class with slots be made; the option of dataclass came with Python 3.11."""

    __slots__ = ("__weakref__",)


@final
@dataclass(kw_only=True, eq=False, slots=True)
class Use(_Referable):
    """One use of a captured layer: a call, with the gradients that arrive at its outputs."""

    owner: Owner
    call: Call
    layout: Layout
    versions: tuple[int | None, ...]
    returned: list[Returned]
    """The returned tensors that have a graph, in order."""
    several: int | None
    """How many tensors the layer returned in a structure; None if it returned a tensor."""
    computed_in: torch.dtype
    expands: bool
    """Whether an output with one row for all candidates was expanded to one row for each."""

    span: tuple[int, int] = (0, 0)
    """The numbers of the nodes that autograd made during the call, from the first to behind the last."""
    in_place: bool = False
    """Whether the module changed an input in place."""
    chooses: bool
    """Whether the layer also returned indices, as a router does: in another batch, ties may be broken differently."""
    shared: bool
    """Whether some of the returned tensors shared memory before they were replaced by copies."""

    output: Any = None
    """All that the module returned, detached; kept where it is run again and another input may hold the candidates."""
    made_by: Node | None
    """The node of the graph that made the first input; None where it has no history."""

    released: bool = False
    """Whether the tensors of this use have been dropped."""

    @property
    def reached(self) -> bool:
        """Whether a gradient has arrived at any output."""
        return self.released or any(one.gradient is not None for one in self.returned)

    def release(self) -> None:
        """Drop inputs, outputs and gradients to free their memory."""
        self.released = True
        self.call = replace(self.call, args=(), kwargs={})
        self.returned, self.made_by = [], None

    def read_again(self, grid: Grid) -> None:
        """Read the layout anew, after the losses have shown that there are other candidates than was thought."""
        self.layout, axes, self.call = _layout(self.owner, self.call, self.output, grid, self.call.tensors())
        if axes is not None:
            self.returned = [replace(one, axis=axes[one.index]) for one in self.returned]

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients that arrived, taken together."""
        norms = [
            torch.linalg.vector_norm(one.gradient.to(torch.promote_types(one.gradient.dtype, torch.float32)))
            for one in self.returned
            if one.gradient is not None
        ]
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
        return total

    def has_gradient(self) -> bool:
        """Whether a gradient that is not zero has arrived."""
        return any(bool(one.gradient.any()) for one in self.returned if one.gradient is not None)


def record(owner: Owner, call: Call, given: Sequence[Tensor], output: Any, grid: Grid) -> tuple[Use | None, Any]:
    """The record of a finished call, and the output to return in place of the layer's own; None to keep the latter.

    The output is replaced where all candidates share one row, so that each gets a row of its own from here on, and
    where its gradient edge would not last or would not belong to the layer alone.
    """
    leaves, structure = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
    passed = {id(tensor) for tensor in given}  # what comes out as it went in has nothing of the layer
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    own = [index for index, value in enumerate(tensors) if value.requires_grad and id(value) not in passed]
    if not own:
        return None, None
    layout, axes, call = _layout(owner, call, output, grid, given)
    several = None if structure is None else len(tensors)
    returned: list[Returned] = []
    dtype: torch.dtype | None = None
    replaced: dict[int, Tensor] = {}
    for index in own:
        value, axis, expand = tensors[index], None if axes is None else axes[index], layout.expand
        if id(value) in replaced:
            continue
        shared = axis == Axis(SHARED) or (axis == Axis(0) and value.shape[0] == 1)
        if shared and grid.n is not None and grid.n > 1:
            expand = grid.n
        if expand is not None:  # autograd sums over rows before a gradient arrives, unless they are made here
            value = _expanded(value, expand, front=layout.reading == POSITIONS or axis == Axis(SHARED))
        elif several is not None:
            value = value.clone()  # the layer may have gone on with it, and only what happens outside counts
        edge, value = _edge(value)
        replaced[id(tensors[index])] = value
        returned.append(
            Returned(
                index=index,
                shape=value.shape,
                value=value.detach() if owner.rule is None or several is not None else None,
                version=version_of(value),
                edge=edge,
                axis=axis,
            )
        )
        dtype = value.dtype if dtype is None else dtype
    storages = [tensors[one.index].untyped_storage().data_ptr() for one in returned] if several is not None else []
    use = Use(
        owner=owner,
        call=_with_rows(call, layout) if layout.expand is not None else call,
        layout=layout,
        versions=(),
        returned=returned,
        several=several,
        computed_in=call.autocast or dtype or torch.float32,
        expands=any(one.shape != tensors[one.index].shape for one in returned),
        chooses=any(not value.is_floating_point() for value in tensors),
        shared=len(set(storages)) < len(storages),
        output=tree_map(_detached, output) if owner.rule is None and len(grid.counts) > 1 else None,
        made_by=given[0].grad_fn if given else None,
    )
    use.versions = versions_of(use.call)
    if all(replaced.get(id(value), value) is value for value in tensors):
        return use, None
    if structure is None:
        return use, replaced[id(output)]
    return use, tree_unflatten([replaced.get(id(leaf), leaf) for leaf in leaves], structure)


def record_one(
    owner: Owner, x: Tensor, output: Tensor, grid: Grid, autocast: torch.dtype | None
) -> tuple[Use | None, Tensor | None]:
    """What :func:`record` returns of a layer with a rule that made one tensor of another: nearly all of a model's."""
    if output is x or not output.requires_grad:
        return None, None
    assert isinstance(owner.rule, LayerRule)
    call = Call(module=owner.module, args=(x.detach(),), kwargs={}, autocast=autocast)
    layout = grid.layout(x, owner.rule, owner.name)
    if layout.expand is not None:
        return record(owner, call, [x], output, grid)
    edge, value = _edge(output)
    use = Use(
        owner=owner,
        call=call,
        layout=layout,
        versions=(version_of(x),),
        returned=[Returned(index=0, shape=value.shape, value=None, version=None, edge=edge)],
        several=None,
        computed_in=autocast or value.dtype,
        expands=False,
        chooses=False,
        shared=False,
        made_by=x.grad_fn,
    )
    return use, None if value is output else value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def version_of(value: Tensor) -> int | None:
    """The version counter of a tensor: how often it was changed in place; None for an inference tensor."""
    return None if value.is_inference() else value._version


def _layout(
    owner: Owner, call: Call, output: Any, grid: Grid, given: Sequence[Tensor]
) -> tuple[Layout, list[Axis | None] | None, Call]:
    """The layout of a call's candidates; for a module that is run again, their axis in each output, and the call.

    ``given`` are the inputs with their history, as far as that is known.
    """
    inputs = given or call.tensors()
    if isinstance(owner.rule, LayerRule):
        return grid.layout(inputs[0] if inputs else torch.empty(0), owner.rule, owner.name), None, call
    if any(map(has_no_rows, (*call.args, *call.kwargs.values()))):
        return Layout(reading="unknown", trouble="rows of one length, not a PackedSequence"), None, call
    first = next((leaf for leaf in inputs if leaf.ndim), None)
    ids = grid.ids(owner.name)
    if ids is not None:
        read = None if first is None else packed(first, ids).sample_ids
        return Layout(reading="run again, sample_ids", sample_ids=ids if read is None else read), None, call
    layout = None if first is None else grid.layout(first, None, owner.name)
    if layout is not None and layout.reading == TIME_FIRST:
        return layout, None, call
    n = grid.n if grid.n is not None else 1 if first is None else first.shape[0]
    call = replace(call, for_all=layout is not None and layout.reading == POSITIONS)
    axes = candidate_axes(call, n, output, positions=grid.positions)
    reading = f"run again, {[None if axis is None else axis.dim for axis in axes]}"
    return Layout(reading=reading, loose=layout is not None and layout.loose), axes, call


def _expanded(value: Tensor, rows: int, *, front: bool) -> Tensor:
    wide = (value[None] if front else value).expand(rows, *value.shape[not front :])
    return wide.clone()  # memory of its own: the model may change it in place


def _with_rows(call: Call, layout: Layout) -> Call:
    """The call, with the first input and all inputs of its kind and length expanded as the output was."""
    leaves, structure = tree_flatten((call.args, dict(call.kwargs)))
    first, rows = call.tensors()[0], layout.expand
    assert rows is not None
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (leaf.ndim, leaf.dtype, leaf.shape[:1]) == (
            first.ndim,
            first.dtype,
            first.shape[:1],
        ):
            row = leaf[None] if layout.reading == POSITIONS else leaf
            leaves[number] = row.expand(rows, *row.shape[1:])
    args, kwargs = tree_unflatten(leaves, structure)
    return replace(call, args=args, kwargs=kwargs)


def _edge(output: Tensor) -> tuple[GradientEdge, Tensor]:
    """The gradient edge of a layer's output, and the output itself, or a copy where its own edge would not last.

    An in-place operation on a view moves the view's edge out of the graph. A Linear layer's output is a view of the
    whole matrix product below it; the edge of that product stays, and is used.
    """
    base = output._base
    if base is None:
        return get_gradient_edge(output), output
    whole = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    below = None if output.grad_fn is None else output.grad_fn.next_functions
    if whole and below and base.grad_fn is not None and below[0][0] is base.grad_fn:
        return get_gradient_edge(base), output
    copied = output.clone()
    return get_gradient_edge(copied), copied


def versions_of(call: Call) -> tuple[int | None, ...]:
    """The version counter of each input of a call: how often it was changed in place."""
    return tuple(map(version_of, call.tensors()))
