"""The preconditioner of any element-wise optimizer, found by trying two steps on a copy of it.

With its second moment held fixed an update is affine in the gradient, so two steps tell its slope, entry by entry. At
zero gradient the second moment does not change to first order: that is the map without a look-ahead. With a reference
``r`` the second moments of the steps with ``r`` and ``-r`` are equal where they are even in the gradient, and half the
difference of the two updates is ``-P(r) r``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim._preconditioners.look_ahead import expected_gradient, moment_dtype
from ftw_optim._preconditioners.maps import Diagonal

SMALL = (1e-16, 1e-13, 1e-10, 1e-8, 1e-6, 1e-3)
"""Gradients that change no second moment, down to those far below the eps of an optimizer without history."""

TURNED = 0.3
"""Largest share of a slope that may be negative; those entries count as zero."""

SEPARABLE = 1e-3
"""Largest change of an entry's update, relative to the largest of all, that gradients of other entries may make."""


class NotElementwise(ValueError):
    """An entry's update depends on the gradients of other entries, or not smoothly on its own."""


def probed(optimizer: Optimizer, param: Tensor, group: dict[str, Any], reference: Tensor | None) -> Diagonal:
    """``P`` of the coming step on one parameter, from two steps on a copy of the optimizer.

    Raises:
        NotElementwise: the update is not element-wise, or of a kind that two steps do not tell.
    """
    dtype = moment_dtype(param)
    with torch.no_grad():
        if reference is not None:
            # Coupled decay and the sign are switched off in the trial, and put in here.
            gradient = expected_gradient(param, group, reference.to(dtype)).double()
            update = _trial(optimizer, param, group)
            slope = (update(-gradient) - update(gradient)) / (2 * gradient)
        # Where the second moment is not even in the gradient, the momentum does not cancel and may turn the sign.
        if reference is None or not _is_positive(slope):
            slope = _slope_at_zero(_trial(optimizer, param, group, at_zero=True), param)
        if not _is_positive(slope):
            raise NotElementwise("its update is not a positive multiple of the gradient, entry by entry")
    return Diagonal(slope.clamp(min=0.0).to(dtype))


def _is_positive(slope: Tensor) -> bool:
    """Whether it is finite and not negative, but for a few entries: DiffGrad's friction turns some of them."""
    if not bool(slope.isfinite().all()):
        return False
    return bool(-slope.clamp(max=0.0).sum() <= TURNED * slope.abs().sum())


def _slope_at_zero(update: Callable[[Tensor], Tensor], param: Tensor) -> Tensor:
    """The slope that agrees best with the one at twice the gradient: smaller ones lose digits, larger ones bend."""
    ones = torch.ones_like(param, dtype=torch.float64)
    still, best, least = update(torch.zeros_like(ones)), None, SEPARABLE
    for size in SMALL:
        slope, other = ((still - update(share * size * ones)) / (share * size) for share in (1.0, 2.0))
        change = float((slope - other).abs().max() / slope.abs().max())  # NaN where nothing moved
        if change <= least:
            best, least = slope, change
    if best is None:
        raise NotElementwise("its update at a small gradient is no multiple of it")
    return best


def check_separable(optimizer: Optimizer, param: Tensor, group: dict[str, Any], reference: Tensor) -> None:
    """Raise if the update of an entry follows the gradients of others.

    Raises:
        NotElementwise: it does.
    """
    with torch.no_grad():
        update = _trial(optimizer, param, group)
        gradient = expected_gradient(param, group, reference.to(moment_dtype(param)))
        half = torch.arange(param.numel(), device=param.device).view(param.shape) % 2 == 0
        if param.numel() < 2:
            return
        one, other = update(gradient), update(torch.where(half, gradient, 3 * gradient))
        if bool(((one - other).abs()[half] > SEPARABLE * one.abs().max()).any()):
            raise NotElementwise("the update of an entry depends on the gradients of other entries")
        twice, still = update(1.001 * gradient), update(torch.zeros_like(gradient))
        moved, slower = (one - still).abs().max(), (twice - one).abs().max()
        if bool(slower > 0.1 * moved):
            raise NotElementwise("its update jumps where the gradient hardly changes")


def _trial(
    optimizer: Optimizer, param: Tensor, group: dict[str, Any], *, at_zero: bool = False
) -> Callable[[Tensor], Tensor]:
    """``gradient -> update`` of the parameter, each tried on a copy of the optimizer that holds it alone.

    The copy computes in float64, and may start at zero, so that no digits of the parameter swamp the update.
    """
    start = torch.zeros_like(param, dtype=torch.float64) if at_zero else param.detach().double()
    # As it would be in the coming step, without what is put in or cancels elsewhere.
    settings = {name: value for name, value in group.items() if name != "params"}
    settings |= {name: value for name, value in (("weight_decay", 0.0), ("maximize", False)) if name in settings}

    def update(gradient: Tensor) -> Tensor:
        own = nn.Parameter(start.clone())
        twin = object.__new__(type(optimizer))  # not copy.copy: it leaves out what pickling would
        twin.__dict__.update(optimizer.__dict__)
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        if param in optimizer.state:
            state[own] = {name: _wide(value) for name, value in optimizer.state[param].items()}
        twin.__dict__.update(param_groups=[{**copy.deepcopy(settings), "params": [own]}], state=state)
        twin.__dict__.update({name: OrderedDict() for name in _HOOKS})
        own.grad = gradient.to(torch.float64)
        type(optimizer).step(twin)
        return own.detach() - start

    return update


_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def _wide(value: Any) -> Any:
    """A copy, in float64 where it has a fraction."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(torch.float64 if value.is_floating_point() else value.dtype)
    return copy.deepcopy(value)
