"""Exact gradients of any module's own parameters, candidate by candidate, by running the module again.

The gradients are formed from the recorded inputs and output gradients of one call, in the cheapest of three ways that
works:

- all candidates at once under ``torch.func.vmap``;
- row by row, where vmap cannot (control flow that depends on data, recurrent kernels);
- the whole batch once more under the same random state, and a backward for each candidate with the output gradients
  of the others set to zero: where the call drew random numbers, or depends on the size of its batch.

A way works if the module returns the same output as in the call, up to rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from ftw_optim._capture.replay.axes import SHARED, Axis, candidate_dims, candidate_inputs, tensors_in
from ftw_optim._capture.replay.calls import Call

_ways: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], str]] = WeakKeyDictionary()


def ways_taken(module: nn.Module, *, alone: bool | None = None) -> set[str]:
    """The ways in which a module has been run again.

    Args:
        module: a module without a rule.
        alone: whether to look at calls with one candidate, or with several; None: at all.
    """
    return {way for key, way in _ways.get(module, {}).items() if alone is None or key[2] == alone}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """One tensor that the call returned and that a gradient reached."""

    index: int
    value: Tensor
    changed: bool
    """Whether the value was changed in place after the call, so that it cannot be compared."""
    grad: Tensor
    axis: Axis | None


class NotRepeatable(RuntimeError):
    """Raised where running a module again did not give the same output."""


def per_candidate(
    call: Call,
    parameters: Mapping[str, Tensor],
    outputs: Sequence[Output],
    n: int,
    *,
    tolerance: float,
    sample_ids: Tensor | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """Every candidate's gradient of a module's own parameters.

    Args:
        call: the recorded call of the module.
        parameters: the module's own parameters, by their local dotted names.
        outputs: the tensors that the call returned, with the gradients that arrived.
        n: number of candidates.
        tolerance: largest relative difference of outputs that counts as rounding.
        sample_ids: the candidate of each position, where rows are packed.
        whole: run the whole batch at once, because the output of a part of it may differ.

    Returns:
        The gradients by parameter name, shape ``(n, *parameter.shape)`` each, float32 at least.

    Raises:
        NotRepeatable: no way works; the cause is the error of the last one.
    """
    names = list(parameters)
    leaves = [parameters[name].detach() for name in names]
    known = _ways.setdefault(call.module, {})
    whole = whole or n == 1 or call.drew or sample_ids is not None
    key = (call.module.training, whole, n == 1, tuple(candidate_dims(call, n)), sample_ids is None, tuple(names))
    ways = ["together"] if whole else list(_WAYS)
    if key in known:
        ways.sort(key=lambda way: way != known[key])  # what worked before comes first
    trouble: Exception | None = None
    for way in ways:
        try:
            with call.replayed(), torch.set_grad_enabled(way != "vectorised"):
                gradients, seen = _WAYS[way](call, names, leaves, outputs, n, sample_ids)
            _compare(seen, outputs, tolerance)
        except Exception as error:  # whatever a module that is not meant for it may raise
            trouble = error
            continue
        known[key] = way
        return {
            name: gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            for name, gradient in zip(names, gradients, strict=True)
        }
    raise NotRepeatable(f"{type(trouble).__name__}: {trouble}") from trouble


_Result = tuple[list[Tensor], list[Tensor]]
"""The gradients (n, *shape) of each parameter, and the outputs of the new run, for all candidates."""


def _vectorised(
    call: Call, names: list[str], leaves: list[Tensor], outputs: Sequence[Output], n: int, sample_ids: Tensor | None
) -> _Result:
    flat, rebuild = candidate_inputs(call, n)
    grads = [_split(output, n) for output in outputs]

    def one(rows: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        def forward(values: list[Tensor]) -> list[Tensor]:
            found = tensors_in(call.run(dict(zip(names, values, strict=True)), *rebuild(rows)))
            return [found[output.index] for output in outputs]

        seen, back = vjp(forward, leaves)[:2]
        return back(grads)[0], seen

    with warnings.catch_warnings():
        # A kernel without a batching rule runs row by row inside: slower, and still right.
        warnings.filterwarnings("ignore", "There is a performance drop")
        gradients, seen = vmap(one, randomness="error")(flat, grads)
    return gradients, [_join(values, output) for values, output in zip(seen, outputs, strict=True)]


def _row_by_row(
    call: Call, names: list[str], leaves: list[Tensor], outputs: Sequence[Output], n: int, sample_ids: Tensor | None
) -> _Result:
    flat, rebuild = candidate_inputs(call, n)
    grads = [_split(output, n) for output in outputs]
    own = [leaf.requires_grad_() for leaf in leaves]
    rows, seen = [], []
    for row in range(n):
        found = tensors_in(call.run(dict(zip(names, own, strict=True)), *rebuild([values[row] for values in flat])))
        reached = [found[output.index] for output in outputs]
        rows.append(_backward(reached, own, [values[row] for values in grads], keep=False))
        seen.append([value.detach() for value in reached])
    together = [torch.stack(values) for values in zip(*seen, strict=True)]
    return (
        [torch.stack(values) for values in zip(*rows, strict=True)],
        [_join(values, output) for values, output in zip(together, outputs, strict=True)],
    )


def _together(
    call: Call, names: list[str], leaves: list[Tensor], outputs: Sequence[Output], n: int, sample_ids: Tensor | None
) -> _Result:
    own = [leaf.requires_grad_() for leaf in leaves]
    broken = _not_finite(outputs, n) if n > 1 and sample_ids is None else torch.zeros(n, dtype=torch.bool)
    args = kwargs = None
    if bool(broken.any()):
        # Even a gradient of zero would come back as NaN from such a row, and reach the parameters of all.
        flat, rebuild = candidate_inputs(call, n)
        args, kwargs = rebuild([_zeroed(values, broken).flatten(0, 1) for values in flat])
    found = tensors_in(call.run(dict(zip(names, own, strict=True)), args, kwargs))
    reached = [found[output.index] for output in outputs]
    rows = []
    for row in range(n):
        if broken[row]:
            rows.append([torch.full_like(leaf, torch.nan) for leaf in own])
            continue
        grads = [_only(output, row, n, value, sample_ids) for output, value in zip(outputs, reached, strict=True)]
        rows.append(_backward(reached, own, grads, keep=row < n - 1))
    seen = []
    for output, value in zip(outputs, reached, strict=True):
        if bool(broken.any()) and value.shape == output.value.shape:  # what the rows put to zero give is of no interest
            parts = _axis_of(output).split(value.detach(), n).clone()
            parts[broken] = _axis_of(output).split(output.value, n)[broken]
            value = _join(parts, output)
        seen.append(value.detach())
    return [torch.stack(values) for values in zip(*rows, strict=True)], seen


def _not_finite(outputs: Sequence[Output], n: int) -> Tensor:
    """Mask of the candidates with an output or an output gradient that is not finite: bool ``(n,)``."""
    broken = torch.zeros(n, dtype=torch.bool)
    for output in outputs:
        if output.axis is not None and output.axis.dim != SHARED and output.grad.shape[output.axis.dim] % n == 0:
            for values in (output.value, output.grad):
                if values.shape == output.grad.shape:
                    broken |= ~output.axis.split(values, n).flatten(1).isfinite().all(1).cpu()
    return broken


def _zeroed(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` with zeros in the rows that the mask ``rows``, bool (n,), selects."""
    shape = (-1, *[1] * (values.ndim - 1))
    return values.masked_fill(rows.to(values.device).view(shape), 0)


_Way = Callable[[Call, list[str], list[Tensor], Sequence[Output], int, Tensor | None], _Result]
_WAYS: dict[str, _Way] = {"vectorised": _vectorised, "row by row": _row_by_row, "together": _together}


def _backward(reached: list[Tensor], own: list[Tensor], grads: list[Tensor], *, keep: bool) -> list[Tensor]:
    pairs = [(value, grad) for value, grad in zip(reached, grads, strict=True) if value.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in own]
    values, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(values, own, given, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(own, found, strict=True)]


def _axis_of(output: Output) -> Axis:
    if output.axis is None:
        raise ValueError(f"output {output.index} of shape {tuple(output.grad.shape)} has no axis of candidates")
    return output.axis


def _split(output: Output, n: int) -> Tensor:
    """The output gradients with a first axis for the candidates, as :meth:`Axis.split` gives them."""
    return _axis_of(output).split(output.grad, n)


def _join(values: Tensor, output: Output) -> Tensor:
    """The inverse of :func:`_split`, for outputs."""
    axis = _axis_of(output)
    if axis.dim == SHARED:
        return values[0]
    return values.movedim(0, axis.dim).flatten(axis.dim, axis.dim + 1)


def _only(output: Output, row: int, n: int, value: Tensor, sample_ids: Tensor | None) -> Tensor:
    """The output gradients of one candidate, zero for all others, in the shape that the module returned."""
    if sample_ids is not None:
        grid = math.prod(sample_ids.shape)
        lead = output.grad.shape[: sample_ids.ndim] == sample_ids.shape
        if not lead and output.grad.shape[0] != grid:
            raise ValueError(f"output of shape {tuple(output.grad.shape)} has no positions that sample_ids knows")
        mask = (sample_ids if lead else sample_ids.flatten()).to(output.grad.device) == row
        mask = mask.reshape(*mask.shape, *[1] * (output.grad.ndim - mask.ndim))
        return torch.where(mask, output.grad, torch.zeros((), dtype=output.grad.dtype, device=output.grad.device))
    if n == 1 and value.shape == output.grad.shape:
        return output.grad
    axis = _axis_of(output)
    if axis.dim == SHARED:
        return output.grad[row]
    size = output.grad.shape[axis.dim] // n
    if value.shape[axis.dim] != output.grad.shape[axis.dim]:  # one row for all, expanded in the call
        return output.grad.narrow(axis.dim, row * size, size)
    only = torch.zeros_like(output.grad)
    only.narrow(axis.dim, row * size, size).copy_(output.grad.narrow(axis.dim, row * size, size))
    return only


def _compare(seen: Sequence[Tensor], outputs: Sequence[Output], tolerance: float) -> None:
    for value, output in zip(seen, outputs, strict=True):
        if output.changed:
            continue
        expected = output.value
        if expected.shape[-value.ndim or expected.ndim :] != value.shape and value.shape[:1] != (1,):
            raise NotRepeatable(f"it returned the shape {tuple(value.shape)}, and {tuple(expected.shape)} before")
        error = (value - expected).abs().nan_to_num(0.0)  # what is not finite says nothing
        size = expected.abs().nan_to_num(0.0, 0.0, 0.0)
        if error.numel() and not error.max() <= tolerance * size.max().clamp(min=torch.finfo(size.dtype).tiny):
            raise NotRepeatable(
                f"its output differed by up to {float(error.max()):.1e}, of {float(size.max()):.1e} at most"
            )
