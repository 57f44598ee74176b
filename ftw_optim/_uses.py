"""One call of a captured layer, from the hook that saw it to the factors of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from ftw_optim._checks import WAYS_OUT, tolerance
from ftw_optim._factors import Factors, PositionMap
from ftw_optim._layers.axes import SHARED, Axis, candidate_axes
from ftw_optim._layers.calls import Call
from ftw_optim._layers.fallback import NotRepeatable, Output, per_candidate
from ftw_optim._layers.owners import Owner
from ftw_optim._layers.registry import LayerRule
from ftw_optim._layouts import TIME_FIRST, Grid, Layout


@final
@dataclass(kw_only=True, eq=False)
class Returned:
    """One tensor that a layer returned: where its gradient is found, and the gradient once it is."""

    index: int
    value: Tensor
    version: int | None
    edge: GradientEdge
    axis: Axis | None = None
    gradient: Tensor | None = None


@final
@dataclass(kw_only=True, eq=False)
class Use:
    """One call of a captured layer."""

    owner: Owner
    call: Call
    layout: Layout
    versions: tuple[int | None, ...]
    returned: list[Returned]
    """The tensors with a graph, in order."""
    several: int | None
    """How many tensors the layer returned in a structure; None if it returned a tensor."""
    computed_in: torch.dtype
    expands: bool
    """One row for all candidates was made one for each."""

    span: tuple[int, int] = (0, 0)
    """The numbers of the nodes that autograd made during the call, from the first to behind the last."""
    in_place: bool = False
    """The module changed an input in place."""
    shared: bool
    """Some of the returned tensors shared memory, which they no longer do."""

    @property
    def reached(self) -> bool:
        """Whether a gradient arrived."""
        return any(one.gradient is not None for one in self.returned)

    def has_gradient(self) -> bool:
        """Whether one arrived that is not zero."""
        return any(bool(one.gradient.any()) for one in self.returned if one.gradient is not None)


def record(owner: Owner, call: Call, given: Sequence[Tensor], output: Any, grid: Grid) -> tuple[Use | None, Any]:
    """The use that a finished call makes of a layer, and what must take the place of its output.

    The output is replaced where its candidates share a row, which are told apart only from here on, and where its
    gradient edge would not last or would not be the layer's alone.
    """
    leaves, structure = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
    passed = {id(tensor) for tensor in given}  # what comes out as it went in has nothing of the layer
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    own = [index for index, value in enumerate(tensors) if value.requires_grad and id(value) not in passed]
    if not own:
        return None, None
    layout, axes = _layout(owner, call, output, grid)
    several = None if structure is None else len(tensors)
    returned: list[Returned] = []
    replaced: dict[int, Tensor] = {}
    for index in own:
        value, axis, expand = tensors[index], None if axes is None else axes[index], layout.expand
        if id(value) in replaced:
            continue
        shared = axis == Axis(SHARED) or (axis == Axis(0) and value.shape[0] == 1)
        if shared and grid.n is not None and grid.n > 1:
            expand = grid.n
        if expand is not None:  # autograd sums over rows before a gradient arrives, unless they are made here
            value = _expanded(value, expand, front=layout.reading == "positions" or axis == Axis(SHARED))
        elif several is not None:
            value = value.clone()  # the layer may have gone on with it, and only what happens outside counts
        edge, value = _edge(value)
        replaced[id(tensors[index])] = value
        returned.append(Returned(index=index, value=value.detach(), version=version_of(value), edge=edge, axis=axis))
    storages = [tensors[one.index].untyped_storage().data_ptr() for one in returned] if several is not None else []
    use = Use(
        owner=owner,
        call=_with_rows(call, layout) if layout.expand is not None else call,
        layout=layout,
        versions=(),
        returned=returned,
        several=several,
        computed_in=call.autocast or returned[0].value.dtype,
        expands=any(one.value.shape != tensors[one.index].shape for one in returned),
        shared=len(set(storages)) < len(storages),
    )
    use.versions = _versions(use.call)
    if all(replaced.get(id(value), value) is value for value in tensors):
        return use, None
    if structure is None:
        return use, replaced[id(output)]
    return use, tree_unflatten([replaced.get(id(leaf), leaf) for leaf in leaves], structure)


def factors_of(
    use: Use, parameters: Mapping[str, nn.Parameter], count: int, sample_ids: Tensor | None
) -> list[tuple[str, Factors]]:
    """Factors of a layer's parameters, with their names in the model, from a use that a gradient reached.

    A parameter that a layer has in several places comes once for each.

    Raises:
        NotImplementedError: its candidates cannot be told apart, or the module cannot be run again.
        RuntimeError: an input was changed in place, or the rule does not keep its promises.
        ValueError: it ran on another number of rows than there are losses.
    """
    owner = use.owner
    if use.layout.trouble is not None:
        _refuse_layout(use, use.layout.trouble)
    if use.in_place:
        raise NotImplementedError(
            f"Layer {owner.name!r} changed an input in place, so it cannot be run again on what it got. Use the "
            f"out-of-place form of that operation (x = x + y, not x += y). {WAYS_OUT}"
        )
    if use.shared and any(version_of(one.value) != one.version for one in use.returned):
        raise RuntimeError(
            f"Layer {owner.name!r} returned tensors that share memory, and one of them was changed in place, which no "
            f"longer changes the others. Use the out-of-place form of that operation. {WAYS_OUT}"
        )
    if use.versions != _versions(use.call):
        raise RuntimeError(
            f"An input of layer {owner.name!r} was changed in place after the layer had read it, so its gradient can "
            "no longer be formed. Use the out-of-place form of that operation."
        )
    given = _run_again(use, parameters, count, sample_ids) if owner.rule is None else _by_rule(use)
    found = []
    for local, name in owner.parameters.items():
        value = given.get(local)
        if value is None:
            raise RuntimeError(
                f"The rule {_rule_name(use)!r} returned no gradient for {local!r} of layer {owner.name!r}; expected "
                "one for each of its trainable parameters."
            )
        factors = _as_factors(use, value, parameters[name], count, sample_ids)
        if factors.rows * factors.columns != parameters[name].numel():
            raise RuntimeError(
                f"The rule {_rule_name(use)!r} returned gradients of {factors.rows} x {factors.columns} entries for "
                f"{name}, expected its shape {tuple(parameters[name].shape)}."
            )
        if factors.count != count:
            raise ValueError(
                f"The closure returned {count} losses, but layer {owner.name!r} ran on {factors.count} rows. "
                "Expected one loss for each row of the model's input; call the model itself (not a part of it), on all "
                "candidates at once."
            )
        found.append((name, factors))
    return found


def version_of(value: Tensor) -> int | None:
    """How often a tensor was changed in place."""
    return None if value.is_inference() else value._version


# ---------------------------------------------------------------------- in the forward hook


def _layout(owner: Owner, call: Call, output: Any, grid: Grid) -> tuple[Layout, list[Axis | None] | None]:
    """How a call lays out its candidates and, where the module is to be run again, where they are in its outputs."""
    inputs = call.tensors()
    if isinstance(owner.rule, LayerRule):
        return grid.layout(inputs[0] if inputs else torch.empty(0), owner.rule), None
    if any(isinstance(value, PackedSequence) for value in (*call.args, *call.kwargs.values())):
        return Layout(reading="unknown", trouble="rows of one length, not a PackedSequence"), None
    if grid.sample_ids is not None:
        return Layout(reading="run again, sample_ids"), None
    first = next((leaf for leaf in inputs if leaf.ndim), None)
    if first is not None and (layout := grid.layout(first, None)).reading == TIME_FIRST:
        return layout, None
    n = grid.n if grid.n is not None else 1 if first is None else first.shape[0]
    axes = candidate_axes(call, n, output)
    return Layout(reading=f"run again, {[None if axis is None else axis.dim for axis in axes]}"), axes


def _expanded(value: Tensor, rows: int, *, front: bool) -> Tensor:
    wide = (value[None] if front else value).expand(rows, *value.shape[not front :])
    return wide.clone()  # of its own memory: the model may go on in place


def _with_rows(call: Call, layout: Layout) -> Call:
    """The call with its first input, and others that share a row like it, expanded as the output was."""
    leaves, structure = tree_flatten((call.args, dict(call.kwargs)))
    first, rows = call.tensors()[0], layout.expand
    assert rows is not None
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (leaf.ndim, leaf.dtype, leaf.shape[:1]) == (
            first.ndim,
            first.dtype,
            first.shape[:1],
        ):
            row = leaf[None] if layout.reading == "positions" else leaf
            leaves[number] = row.expand(rows, *row.shape[1:])
    args, kwargs = tree_unflatten(leaves, structure)
    return replace(call, args=args, kwargs=kwargs)


def _edge(output: Tensor) -> tuple[GradientEdge, Tensor]:
    """The gradient edge of a layer's output, and the output, or a copy if no edge of itself would last.

    An operation in place on a view moves the view's edge out of the graph. A Linear layer's output is one: all of the
    matrix product below it, whose own edge stays.
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


def _versions(call: Call) -> tuple[int | None, ...]:
    return tuple(map(version_of, call.tensors()))


# ---------------------------------------------------------------------- after the backward pass


def _by_rule(use: Use) -> Mapping[str, Factors | Tensor]:
    rule, call = use.owner.rule, use.call
    assert isinstance(rule, LayerRule)
    grads: Any
    if use.several is None:
        grads = use.returned[0].gradient
    else:
        by_index = {one.index: one.gradient for one in use.returned}
        grads = tuple(by_index.get(index) for index in range(use.several))
    with torch.no_grad(), call.replayed() if rule.replays else nullcontext():
        return rule.function(call.module, call.inputs(), grads)


def _run_again(
    use: Use, parameters: Mapping[str, nn.Parameter], count: int, sample_ids: Tensor | None
) -> Mapping[str, Tensor]:
    outputs = [
        Output(
            index=one.index,
            value=one.value,
            changed=version_of(one.value) != one.version,
            grad=one.gradient,
            axis=one.axis,
        )
        for one in use.returned
        if one.gradient is not None
    ]
    own = {local: parameters[name] for local, name in use.owner.parameters.items()}
    dtypes = [use.computed_in, *(parameter.dtype for parameter in own.values())]
    try:
        return per_candidate(use.call, own, outputs, count, tolerance=tolerance(dtypes), sample_ids=sample_ids)
    except NotRepeatable as error:
        raise NotImplementedError(
            f"Expected to run {type(use.call.module).__name__} (layer {use.owner.name!r}) again, candidate by "
            f"candidate, for the gradients of {', '.join(use.owner.parameters.values())}, but that failed: {error}. "
            f"{WAYS_OUT}"
        ) from error


def _as_factors(use: Use, value: Factors | Tensor, parameter: Tensor, count: int, sample_ids: Tensor | None) -> Factors:
    """What a rule returned, with the candidates in front."""
    if isinstance(value, Tensor):
        if use.owner.rule is not None and sample_ids is not None:
            _refuse_layout(use, "positions that sample_ids can tell apart")
        if use.layout.reading == "folded":
            value = value.reshape(count, -1, *value.shape[1:]).sum(1)
        return Factors.explicit(value, parameter)
    if value.positions is not None:
        return value
    if sample_ids is None:
        return value.folded(count) if use.layout.reading == "folded" else value
    if use.layout.reading == "sample_ids, folded":
        value = value.folded(len(sample_ids))
    times, rest = divmod(value.left.shape[1], max(1, sample_ids.shape[1]))
    if rest or len(value.left) != len(sample_ids):
        _refuse_layout(use, "as many positions as sample_ids has")
    grid = PositionMap(candidates=sample_ids.to(value.left.device), count=count)
    return replace(value, positions=grid.repeated(times))


def _refuse_layout(use: Use, expected: str) -> NoReturn:
    first = next(iter(use.call.tensors()), None)
    raise NotImplementedError(
        f"Expected layer {use.owner.name!r} to take inputs with {expected}, got shape "
        f"{None if first is None else tuple(first.shape)}: which candidate a position belongs to is not known. "
        f"{WAYS_OUT}"
    )


def _rule_name(use: Use) -> str:
    return use.owner.rule.name if isinstance(use.owner.rule, LayerRule) else "fallback"
