"""Checks of the options of a :class:`SelectiveOptimizer`, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import Sketch
from ftw_optim._step.choice import NORMALIZATIONS
from ftw_optim._step.target import TargetGradient
from ftw_optim._step.way import COMBINES

METRICS = tuple(metric.value for metric in Metric)


def check_options(
    optimizer: Any,
    model: Any,
    stages: Sequence[Any],
    metric: str,
    combine: str,
    gram: str | Sketch,
    memory_limit: int | None,
    self_check: bool | int | str,
    among: int | None,
) -> None:
    """Refuse options with which no step can be made.

    Args:
        optimizer: the inner optimizer.
        model: the module that the closures call.
        stages: the filter and the weight stage.
        metric: the metric of the matching problem.
        combine: where the combined gradient comes from.
        gram: ``"exact"`` or a sketch.
        memory_limit: bytes of multiplied-out gradients, or None.
        self_check: when captured gradients are compared with autograd's.
        among: ranks of one selection, or None.

    Raises:
        TypeError: the inner optimizer is no optimizer, or the model is no module.
        ValueError: another option has a value that is not known or out of range.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected the model as an nn.Module, got {type(model).__name__}.")
    for name, value, known in (("metric", metric, METRICS), ("combine", combine, COMBINES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
    if gram != "exact" and not isinstance(gram, Sketch):
        raise ValueError(f'gram must be "exact" or a Sketch(dim=...), got {gram!r}.')
    if memory_limit is not None and memory_limit < 1:
        raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit!r}.")
    if self_check != "first" and not (isinstance(self_check, int) and self_check >= 0):
        raise ValueError(f'self_check must be "first", a number of selections, True or False, got {self_check!r}.')
    if among is not None and (isinstance(among, bool) or not isinstance(among, int) or among < 1):
        raise ValueError(f"among must be a positive number of ranks, or None, got {among!r}.")
    if (normalize := getattr(stages[1], "normalize", "sum")) not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}.")
    for stage in stages:
        if not callable(stage) or not set(getattr(stage, "metrics", ())) <= set(METRICS):
            raise ValueError(
                f"Expected a callable stage whose metrics are some of {METRICS}, got {stage!r} with metrics "
                f"{getattr(stage, 'metrics', ())!r}."
            )


def check_target(target: TargetGradient, train_on_target: Any) -> None:
    """Refuse a target that cannot take part in the step as it is asked to.

    Raises:
        TypeError: ``train_on_target`` is neither a flag nor a closure.
        RuntimeError: it was a closure, which a copy or pickle does not hold.
        ValueError: the target is to take part, but its gradient is not formed at every step.
    """
    if train_on_target is None:
        raise RuntimeError(
            "The rows to train on are not part of a pickle or copy: set optimizer.train_on_target to their closure "
            "before the next step."
        )
    if not isinstance(train_on_target, bool) and not callable(train_on_target):
        raise TypeError(
            "train_on_target must be True, False or a closure that returns the losses (m,) of rows to train on, got "
            f"{type(train_on_target).__name__}."
        )
    if train_on_target is True and target.refresh_every > 1 and target.until is None:
        raise ValueError(
            "train_on_target=True runs the target rows at every step: expected refresh_every=1, got "
            f"{target.refresh_every}. To remember gradients over steps use decay=."
        )
