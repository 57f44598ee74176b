"""Where the candidates are in the inputs and outputs of a module that no rule knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ftw_optim._layers.calls import Call

SHARED = -1
"""The axis of an output that all candidates share, until it is expanded in front."""


@final
@dataclass(frozen=True)
class Axis:
    """Where the candidates are in a tensor: along ``dim``, or in no axis of its own (:data:`SHARED`)."""

    dim: int

    def split(self, values: Tensor, n: int) -> Tensor:
        """``values`` with the candidates in front of the shape that one candidate alone has."""
        if self.dim == SHARED:
            return values
        shape = list(values.shape)
        shape[self.dim : self.dim + 1] = [n, values.shape[self.dim] // n]
        return values.reshape(shape).movedim(self.dim, 0)


_known: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], list[Axis | None]]] = WeakKeyDictionary()


def candidate_axes(call: Call, n: int, output: Any) -> list[Axis | None]:
    """Where the candidates are in each tensor of a call's output; None where that cannot be seen.

    Found by running the module on the first candidate alone: the axis that is then ``n`` times shorter.
    """
    leaves = tensors_in(output)
    if n == 1:  # there is nothing to tell apart
        return [Axis(0) if leaf.ndim else None for leaf in leaves]
    known = _known.setdefault(call.module, {})
    key = (call.module.training, tuple(candidate_dims(call, n)), *(leaf.ndim for leaf in leaves))
    if key not in known:
        known[key] = _probe(call, n, leaves)
    return known[key]


def _probe(call: Call, n: int, leaves: Sequence[Tensor]) -> list[Axis | None]:
    rows = _rows(call)
    guess: list[Axis | None] = [Axis(0) if leaf.ndim and leaf.shape[0] in (n, rows) else None for leaf in leaves]
    flat, rebuild = candidate_inputs(call, n)
    try:
        with call.replayed(), torch.no_grad():
            alone = tensors_in(call.run({}, *rebuild([rows[0] for rows in flat])))
    except Exception:  # it cannot be run on a part of its batch
        return guess
    if len(alone) != len(leaves):
        return guess
    return [
        _axis(whole.shape, one.shape, n) or default for whole, one, default in zip(leaves, alone, guess, strict=True)
    ]


def _axis(whole: torch.Size, one: torch.Size, n: int) -> Axis | None:
    if whole == one:
        return Axis(SHARED)
    differing = [dim for dim, (a, b) in enumerate(zip(whole, one, strict=False)) if a != b]
    if len(whole) != len(one) or len(differing) != 1 or whole[differing[0]] != n * one[differing[0]]:
        return None
    return Axis(differing[0])


def candidate_dims(call: Call, n: int) -> dict[int, int]:
    """The axis of the candidates in each input leaf that has one."""
    rows = _rows(call)
    dims = {}
    for number, leaf in enumerate(tree_leaves((call.args, dict(call.kwargs)))):
        # The hidden state of a recurrent layer comes second and has its layers first.
        dim = 1 if isinstance(call.module, nn.RNNBase) and number > 0 else 0
        if isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] in (n, rows):
            dims[number] = dim
    return dims


def candidate_inputs(call: Call, n: int) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], tuple[Any, Any]]]:
    """The inputs that have a candidate axis, split along it, and how to put one candidate's back in their places."""
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


def _rows(call: Call) -> int:
    """Length of the first axis of the first input tensor."""
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
