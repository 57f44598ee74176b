"""What a closure may return, and what each return means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Plain:
    """A closure's request for nothing but the inner optimizer's step.

    Attributes:
        value: None, or the scalar that it returned after a backward of its own.
    """

    value: Any


@final
class CandidateClosure:
    """A user's closure: called once for the candidates' losses, and perhaps again for some rows of them.

    Args:
        function: the closure.
        parameters: those that a backward of its own would give a ``.grad``.
        may_be_plain: whether it may ask for the inner step alone.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: Mapping[str, nn.Parameter], *, may_be_plain: bool
    ) -> None:
        self._function, self._parameters, self._may_be_plain = function, parameters, may_be_plain
        self.takes_rows = _takes_rows(function)
        """Whether it can be called as ``closure(rows=kept)``."""

    def __call__(self, rows: Tensor | None = None) -> Any:
        """What it returns for all candidates or some ``rows``; :class:`Plain` where that asks for the inner step."""
        if rows is not None:
            return self._function(rows=rows)
        before = self._gradient_marks()
        with torch.enable_grad():
            value = self._function()
        if not self._may_be_plain:
            return value
        ran_backward = _is_scalar(value) and self._gradient_marks() != before
        return Plain(value=value) if value is None or ran_backward else value

    def _gradient_marks(self) -> dict[str, tuple[int, int]]:
        """Equal before and after a call only if it replaced or changed no ``.grad``."""
        return {
            name: (id(parameter.grad), parameter.grad._version)
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }


def _takes_rows(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(rows=None)
    except (TypeError, ValueError):
        return False
    return True


def _is_scalar(value: Any) -> bool:
    """Whether this is what a closure with a backward of its own returns."""
    return isinstance(value, float) or (isinstance(value, Tensor) and value.ndim == 0)


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
