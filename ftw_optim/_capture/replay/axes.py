"""The candidate axis of each input and output of a module that no rule knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ftw_optim._capture.replay.calls import Call
from ftw_optim._layers.special import candidate_axis_of_input, candidate_axis_of_output

SHARED = -1
"""The axis of an output that all candidates share, until it is expanded in front."""


@final
@dataclass(frozen=True)
class Axis:
    """The candidate axis of a tensor: ``dim``, or :data:`SHARED` where it has no such axis."""

    dim: int

    def split(self, values: Tensor, n: int) -> Tensor:
        """``values`` with a first axis for the candidates, in front of the shape that a single candidate has."""
        if self.dim == SHARED:
            return values
        shape = list(values.shape)
        shape[self.dim : self.dim + 1] = [n, values.shape[self.dim] // n]
        return values.reshape(shape).movedim(self.dim, 0)


def candidate_axes(call: Call, n: int, output: Any, *, positions: int | None = None) -> list[Axis | None]:
    """The candidate axis of each tensor in a call's output, told from its shape; None where it cannot be told.

    A wrong guess is found by the self-check. ``positions`` is the number of positions of a row, if that is known.
    """
    inputs = call.tensors()
    leaves = tensors_in(output)
    if call.for_all:
        return [_axis_for_all(leaf, inputs[0].shape[0]) for leaf in leaves]
    return [_axis(leaf, number, call, n, inputs, positions) for number, leaf in enumerate(leaves)]


def _axis_for_all(value: Tensor, positions: int) -> Axis | None:
    if value.ndim == 0 or value.shape[0] not in (1, positions):
        return None
    return Axis(SHARED if value.shape[0] == positions else 0)


def _axis(
    value: Tensor, number: int, call: Call, n: int, inputs: Sequence[Tensor], grid_positions: int | None
) -> Axis | None:
    if value.ndim == 0:
        return None
    if (fixed := candidate_axis_of_output(call.module, number)) is not None:
        return Axis(fixed)
    rows = value.shape[0]
    first = next((leaf for leaf in inputs if leaf.ndim), None)
    positions = first.shape[1] if first is not None and first.ndim > 1 else None
    if rows == n == positions and n > 1 and _is_the_same_for_one(value, number, call, n):
        return Axis(SHARED)
    if first is None and value.ndim == 2 and rows == n == grid_positions:
        return Axis(SHARED)  # a table of positions, and not one row for each candidate
    if rows in (n, 1):
        return Axis(0)
    if first is None:  # a table of positions, asked for their number
        return Axis(SHARED)
    if rows % n == 0 and (rows == first.shape[0] or (positions is not None and rows == n * positions)):
        return Axis(0)  # folded
    if rows == positions:
        return Axis(SHARED)
    return Axis(0) if rows % n == 0 else None


def _is_the_same_for_one(value: Tensor, number: int, call: Call, n: int) -> bool:
    """Whether the first candidate alone gets exactly the same output; asked only where the shape is ambiguous."""
    flat, rebuild = candidate_inputs(call, n)
    try:
        with call.replayed(), torch.no_grad():
            alone = tensors_in(call.run({}, *rebuild([rows[0].clone() for rows in flat])))[number]
    except Exception:  # it cannot be run on a part of its batch
        return False
    return torch.equal(alone, value)


def candidate_dims(call: Call, n: int) -> dict[int, int]:
    """The candidate axis of each input leaf that has one, by the number of the leaf."""
    if call.for_all:
        return {}
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)
    dims = {}
    for number, leaf in enumerate(leaves):
        dim = candidate_axis_of_input(call.module, number)
        if isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] in (n, rows) and not leaf.shape[dim] % n:
            dims[number] = dim
    return dims


def candidate_inputs(call: Call, n: int) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], tuple[Any, Any]]]:
    """The inputs split along their candidate axis, and a function that puts one candidate's back in their places."""
    leaves, structure = tree_flatten((call.args, dict(call.kwargs)))
    dims = candidate_dims(call, n)
    flat = [Axis(dim).split(leaves[number], n) for number, dim in dims.items()]

    def rebuild(rows: Sequence[Tensor]) -> tuple[Any, Any]:
        filled = list(leaves)
        for number, row in zip(dims, rows, strict=True):
            filled[number] = row
        args, kwargs = tree_unflatten(filled, structure)
        return args, kwargs

    return flat, rebuild


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
