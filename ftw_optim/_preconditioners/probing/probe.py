"""The preconditioner of any element-wise optimizer, found by trying two steps on a copy of it.

With its second moment held fixed, an update is affine in the gradient, so two steps give its slope, entry by entry.
Without a reference the slope is taken at zero gradient, where the second moment does not change to first order. With a
reference ``r``, steps with ``r`` and ``-r`` are compared: where the second moment is even in the gradient, it is the
same in both, and half the difference of the two updates is ``-P(r) r``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._preconditioners.look_ahead import expected_gradient, moment_dtype
from ftw_optim._preconditioners.maps import Diagonal, Elementwise
from ftw_optim._preconditioners.probing.trial import trial, widened

SMALL = (1e-16, 1e-13, 1e-10, 1e-8, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9)
"""Sizes of gradients to try, of which some do not change the second moment: tiny without history, larger with it."""

TURNED = 0.3
"""Largest share of a slope that may be negative; those entries count as zero."""

ALIKE = 1e-6
"""Largest relative difference between a rule and a trial for the rule to be used; Yogi differs by a thousandth."""

EXACT = 1e-9
"""Relative change of a slope below which the search for a better size of gradient stops."""

SEPARABLE = 1e-3
"""Largest change of an entry's update through gradients of other entries, relative to the largest update."""


SILENT = 8
"""The most first steps that may move nothing, as those of schedule-free RAdam."""


class NotElementwise(ValueError):
    """Raised where the update of an entry depends on the gradients of others, or not smoothly on its own gradient."""


def probed(
    optimizer: Optimizer,
    param: Tensor,
    group: dict[str, Any],
    reference: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
) -> Diagonal:
    """``P`` of the coming step on one parameter, from two steps on a copy of the optimizer.

    Args:
        optimizer: the optimizer; it is not changed.
        param: one of its parameters.
        group: the parameter's group.
        reference: the gradient that the step is expected to see; None: zero. See :func:`preconditioner_of`.
        dtype: dtype of the result; None: the parameter's, float32 at least.

    Raises:
        NotElementwise: the update is not element-wise, or two steps cannot tell its slope.
    """
    dtype = moment_dtype(param) if dtype is None else dtype
    with torch.no_grad():
        if reference is not None:
            # Coupled decay and the sign are switched off in the trial, and put in here.
            gradient = expected_gradient(param, group, reference.to(dtype)).double()
            if not bool(gradient.any()):
                return _of_nothing(optimizer, param, group, dtype)
            slope = _slope_at(gradient, optimizer, param, group)
            if param not in optimizer.state and not bool(slope.any()):
                # A first step that only fills the state: with a map of zero every step would be skipped.
                slope = _slope_at(gradient, optimizer, param, group, after=1)
        # Where the second moment is not even in the gradient, the momentum does not cancel and may turn the sign.
        if reference is None or not _is_positive(slope):
            try:
                slope = _slope_at_zero(trial(optimizer, param, group, at_zero=True), param)
            except NotElementwise:
                if reference is None or bool(slope.any()):
                    raise
                slope = _slope_after_silent_steps(gradient, optimizer, param, group)
        if not _is_positive(slope):
            raise NotElementwise("its update is not a positive multiple of the gradient, entry by entry")
    return Diagonal(slope.clamp(min=0.0).to(dtype))


def _slope_at(
    gradient: Tensor, optimizer: Optimizer, param: Tensor, group: dict[str, Any], *, after: int = 0
) -> Tensor:
    """The slope of the update between a gradient and its negative, ``after`` as many steps with that gradient."""
    update = trial(optimizer, param, group, after=[gradient] * after)
    return (update(-gradient) - update(gradient)) / (2 * gradient)


def _slope_after_silent_steps(gradient: Tensor, optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> Tensor:
    """The slope of the first step to come that moves anything.

    Raises:
        NotElementwise: none of the next steps does.
    """
    for after in range(1, SILENT + 1):
        slope = _slope_at(gradient, optimizer, param, group, after=after)
        if bool(slope.any()):
            return slope
    raise NotElementwise(f"none of its next {SILENT + 1} updates moves anything")


def _of_nothing(optimizer: Optimizer, param: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Diagonal:
    """The map where the expected gradient is zero, as for LoRA's A at the first step; zero if probing at zero fails."""
    try:
        return probed(optimizer, param, group, None, dtype=dtype)
    except NotElementwise:
        return Diagonal(torch.zeros_like(param, dtype=dtype))


def _is_positive(slope: Tensor) -> bool:
    """Whether a slope is finite, not all zero, and mostly positive: DiffGrad's friction makes some entries negative."""
    if not bool(slope.isfinite().all()):
        return False
    return bool(-slope.clamp(max=0.0).sum() <= TURNED * slope.abs().sum()) and bool(slope.any())


def agrees_with_trial(
    rule: Callable[[Tensor, dict[str, Any], dict[str, Any], Tensor | None], Elementwise],
    optimizer: Optimizer,
    param: Tensor,
    group: dict[str, Any],
    reference: Tensor | None,
) -> bool:
    """Whether a rule agrees with trial steps on a copy, in float64, both without a reference and with one.

    Raises:
        NotElementwise: the trial steps show that the update is not element-wise.
    """
    wide = param.detach().double()
    state = {name: widened(value) for name, value in optimizer.state[param].items()}
    expected = torch.ones_like(wide) if reference is None else reference.double()
    for given in (None, expected):
        told = probed(optimizer, param, group, given, dtype=torch.float64).values
        said = torch.as_tensor(rule(wide, group, state, given).factor, dtype=told.dtype)
        if not torch.allclose(told, said.expand_as(told), rtol=ALIKE, atol=0.0):
            return False
    return True


def _slope_at_zero(update: Callable[[Tensor], Tensor], param: Tensor) -> Tensor:
    """The slope of the update at zero gradient, at the size of gradient where it is measured best.

    That is where it agrees best with the slope at twice the gradient; smaller gradients lose digits to rounding.
    """
    ones = torch.ones_like(param, dtype=torch.float64)
    still, best, least = update(torch.zeros_like(ones)), None, SEPARABLE
    rounding = torch.finfo(torch.float64).eps * float(still.abs().max())
    for size in SMALL:
        slope, other = ((still - update(share * size * ones)) / (share * size) for share in (1.0, 2.0))
        change = float(((slope - other).abs().max() + rounding / size) / slope.abs().max())  # NaN: nothing moved
        if change <= least:
            best, least = slope, change
        if least < EXACT:
            break
    if best is None:
        raise NotElementwise("its update at a small gradient is no multiple of it")
    return best


def check_separable(optimizer: Optimizer, param: Tensor, group: dict[str, Any], reference: Tensor) -> None:
    """Check that the update of each entry depends only on the gradient of that entry, and smoothly.

    Raises:
        NotElementwise: it depends on other entries or other parameters, or jumps.
    """
    with torch.no_grad():
        update = trial(optimizer, param, group)
        gradient = expected_gradient(param, group, reference.to(moment_dtype(param)))
        half = torch.arange(param.numel(), device=param.device).view(param.shape) % 2 == 0
        if not bool(gradient.any()):
            gradient = torch.ones_like(gradient)
        alone = update(gradient)
        if _stands_for_all(optimizer, param):
            try:
                placed = trial(optimizer, param, group, among_others=True)(gradient)
            except Exception:  # it may not take parameters without a gradient
                placed = alone
            if bool(((placed - alone).abs() > SEPARABLE * alone.abs().max()).any()):
                raise NotElementwise("the update of a parameter depends on the others that the optimizer holds")
        if param.numel() < 2:
            return
        one, other = alone, update(torch.where(half, gradient, 3 * gradient))
        if bool(((one - other).abs()[half] > SEPARABLE * one.abs().max()).any()):
            raise NotElementwise("the update of an entry depends on the gradients of other entries")
        twice, still = update(1.001 * gradient), update(torch.zeros_like(gradient))
        moved, slower = (one - still).abs().max(), (twice - one).abs().max()
        if bool(slower > 0.1 * moved):
            raise NotElementwise("its update jumps where the gradient hardly changes")


def _stands_for_all(optimizer: Optimizer, param: Tensor) -> bool:
    """Whether to try this parameter among the others, too: done only for the optimizer's second and last parameter."""
    parameters = [other for group in optimizer.param_groups for other in group["params"]]
    return any(param is other for other in (*parameters[1:2], parameters[-1]))


def couples_decay(optimizer: Optimizer, param: Tensor, group: dict[str, Any], reference: Tensor) -> bool:
    """Whether weight decay is coupled, that is part of the gradient as for Adam, and not decoupled as for AdamW."""
    decay = group["weight_decay"]
    gradient = reference.double()
    shifted = gradient + decay * param.detach().double()
    coupled = trial(optimizer, param, group)(shifted)
    told = trial(optimizer, param, group, decay=decay)(gradient)
    return torch.allclose(told, coupled, rtol=0.0, atol=ALIKE * float(coupled.abs().max()))


def follows_signs(optimizer: Optimizer, param: Tensor, group: dict[str, Any], reference: Tensor) -> bool:
    """Whether opposite gradients give the very same update in many entries, where old momentum decides the sign."""
    update = trial(optimizer, param, group, at_zero=True)
    gradient = expected_gradient(param, group, reference.to(moment_dtype(param)))
    decided = update(gradient) == update(-gradient)
    return bool(decided.double().mean() > 0.1) and not bool(decided.all())
