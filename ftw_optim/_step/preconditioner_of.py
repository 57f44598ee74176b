"""The preconditioner of one parameter of a live optimizer, wrapped or bare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._preconditioners.registry import ACCELERATED
from ftw_optim._step.wrapper import OptimizerWrapper


def preconditioner_of(optimizer: Optimizer, param: Tensor, reference: Tensor | None = None) -> Preconditioner:
    """The map ``P`` of the optimizer's coming step on one parameter: ``update = update_at_zero - P gradient``.

    Args:
        optimizer: a supported optimizer, or a :class:`SelectiveOptimizer` around one.
        param: one of its parameters.
        reference: the gradient the step is expected to see, shaped like ``param``; None: the step at zero gradient. It
            enters the second moment as it does in the step, but entries smaller than 0.03 times the root mean square of
            the non-zero ones are raised to that size, so that no entry without history outweighs all others.

    Returns:
        ``P``; call ``.apply(gradient)``.

    Raises:
        NotImplementedError: the optimizer has no rule and cannot be probed, for example as its update is not
            element-wise.
        ValueError: ``param`` is not one of the optimizer's, or ``reference`` has another shape.
    """
    inner = optimizer
    while isinstance(inner, OptimizerWrapper) or torch.typename(type(inner)) == ACCELERATED:
        inner = inner.optimizer  # type: ignore[attr-defined]
        optimizer = inner if isinstance(inner, OptimizerWrapper) else optimizer
    if reference is not None and reference.shape != param.shape:
        raise ValueError(f"Expected a reference of shape {tuple(param.shape)}, got {tuple(reference.shape)}.")
    for group, other in _parameters(inner):
        if other is param:
            unknown_as_identity = getattr(optimizer, "metric", None) == "euclidean"
            return Preconditioners(inner, unknown_as_identity=unknown_as_identity)(param, group, reference)
    raise ValueError(
        f"The parameter of shape {tuple(param.shape)} is in none of the optimizer's groups; expected one of its own."
    )


def _parameters(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield group, param
