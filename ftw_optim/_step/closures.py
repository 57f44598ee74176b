"""Closures: what a closure may return, and the meaning of each return value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Plain:
    """A closure's request for the inner optimizer's step alone, without a selection.

    Attributes:
        value: the closure's return value: None, or a scalar after a backward of its own.
    """

    value: Any


@final
class CandidateClosure:
    """A user's closure, called once for the candidates' losses and perhaps again for some of the candidates.

    Args:
        function: the closure.
        parameters: the parameters whose ``.grad`` shows whether the closure ran a backward of its own.
        may_be_plain: whether the closure may ask for the inner step alone.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: Mapping[str, nn.Parameter], *, may_be_plain: bool
    ) -> None:
        self._function, self._parameters, self._may_be_plain = function, parameters, may_be_plain
        self.takes_rows = _takes_rows(function)
        """Whether the closure can be called as ``closure(rows=kept)``."""

    def __call__(self, rows: Tensor | None = None) -> Any:
        """Call the closure for all candidates or some ``rows``; :class:`Plain` where it asks for the inner step."""
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
        """Marks of every ``.grad``, which are equal before and after a call only if it replaced or changed none."""
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
    """Whether the value is a scalar, as a closure with a backward of its own returns."""
    return isinstance(value, float) or (isinstance(value, Tensor) and value.ndim == 0)


def checked_losses(losses: Any, counts: Collection[int] = ()) -> Tensor:
    """The closure's losses, shape ``(n,)``, after checks; ``counts`` are the numbers of rows the model saw, if known.

    Raises:
        TypeError: the closure returned no tensor.
        ValueError: the losses are reduced, detached or empty, or their number is none of ``counts``.
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
    if counts and len(losses) not in counts:
        rows = " or ".join(map(str, counts))
        raise ValueError(
            f"The closure returned {len(losses)} losses, but the model ran on {rows} rows; expected {wanted}."
        )
    return losses
