"""What a closure may return, and what each return means."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn


def takes_rows(closure: Callable[..., Any]) -> bool:
    """Whether the closure can be called as ``closure(rows=kept)``."""
    try:
        inspect.signature(closure).bind(rows=None)
    except (TypeError, ValueError):
        return False
    return True


def checked_losses(losses: Any, count: int | None = None) -> Tensor:
    """The closure's losses, shape ``(n,)``, one for each of the ``count`` rows that the model saw, if that is known.

    Raises:
        TypeError: it returned no tensor.
        ValueError: the losses are reduced, detached, empty, or another number.
    """
    wanted = "one loss for each candidate, shape (n,), such as token_losses(model, batch)"
    if not isinstance(losses, Tensor):
        raise TypeError(f"The closure must return {wanted}; got {type(losses).__name__}.")
    if losses.ndim != 1:
        hint = ' (reduction="none" and a mean over positions keep the candidates apart)' if losses.ndim == 0 else ""
        raise ValueError(f"The closure must return {wanted}{hint}; got shape {tuple(losses.shape)}.")
    if losses.numel() == 0:
        raise ValueError(f"The closure must return {wanted}; got an empty batch.")
    if not losses.requires_grad:
        raise ValueError(f"The closure must return {wanted}, with their graph; got losses that are detached.")
    if count is not None and count != len(losses):
        raise ValueError(
            f"The closure returned {len(losses)} losses, but the model ran on {count} rows; expected {wanted}."
        )
    return losses


def is_scalar(value: Any) -> bool:
    """Whether a closure returned what one with a backward of its own returns."""
    return isinstance(value, float) or (isinstance(value, Tensor) and value.ndim == 0)


def gradient_marks(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, int]]:
    """Equal before and after a closure only if it replaced or changed no ``.grad``."""
    return {
        name: (id(parameter.grad), parameter.grad._version)
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }


def released_first(closure: Callable[..., Any], captured: ExitStack) -> Callable[..., Any]:
    """The closure, to be called once more when nothing is captured any longer."""

    @functools.wraps(closure)
    def again(*args: Any, **kwargs: Any) -> Any:
        captured.close()
        return closure(*args, **kwargs)

    return again
