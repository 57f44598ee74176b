"""Halves of a selective step, which Lightning's automatic optimisation calls apart, with hooks between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._matching.selection import Selection
from ftw_optim._step.optimizer import SelectiveOptimizer


@final
class Halves:
    """A :class:`SelectiveOptimizer` whose selections, backwards and steps are separate calls.

    Lightning calls ``training_step``, clears the gradients, calls ``backward`` and then the optimizer's step, with a
    closure that does all of the former. The loss must be known after the first of these, so the selection is made
    there; its gradients are withheld until the backward.

    Args:
        selective: the optimizer. Until :meth:`detach` its ``step`` runs a closure without selecting among its values.
    """

    def __init__(self, selective: SelectiveOptimizer) -> None:
        self.selective = selective
        self._withheld: list[tuple[Tensor, Tensor | None]] = []
        self._skipped = False
        self._applies: bool | None = None  # since the last step: None no backward, False all skipped, True one applied
        self._patch: Any = selective.__dict__.get("step")  # a scheduler's
        inner_step: Callable[[], Any] = selective.step

        @wraps(inner_step)  # with the mark of a scheduler that has patched it
        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            value = None
            if closure is not None:
                with torch.enable_grad():
                    value = closure()
            applies, self._applies = self._applies, None
            if applies is not False:
                inner_step()
            return value

        # Lightning passes no options of ours, and a scheduler takes the function of this method to patch it.
        selective.step = MethodType(step, selective)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give the optimizer its own ``step`` back."""
        self.selective.__dict__.pop("step", None)
        if self._patch is not None:
            self.selective.__dict__["step"] = self._patch

    def select(self, closure: Callable[..., Any], *, grad_scale: float, forget: bool) -> tuple[Tensor, Selection]:
        """Select, and withhold the combined gradient until :meth:`backward`.

        Args:
            closure: returns the candidates' losses, or an iterator of them.
            grad_scale: multiplies the losses for the pass.
            forget: present gradients are about to be cleared, unseen: they need not be held meanwhile.

        Returns:
            The weighted loss, and the selection.
        """
        parameters = [parameter for group in self.selective.param_groups for parameter in group["params"]]
        present = [None if forget else parameter.grad for parameter in parameters]
        _set(parameters, [None] * len(parameters))
        try:
            loss = self.selective.backward(closure, grad_scale=grad_scale)
            self._withheld = [(parameter, parameter.grad) for parameter in parameters]
        finally:
            _set(parameters, [None] * len(parameters))
            self.selective.zero_grad()  # it forgets the backward: when to step is decided here
            _set(parameters, present)
        selection = self.selective.selection
        assert selection is not None
        self._skipped = selection.skipped
        return loss, selection

    @torch.no_grad()
    def backward(self) -> None:
        """Add the withheld gradients to ``.grad``, if there are any."""
        withheld, self._withheld = self._withheld, []
        if not withheld:
            return
        if all(parameter.grad is None for parameter, _ in withheld):
            self._applies = False  # earlier ones have been cleared
        for parameter, gradient in withheld:
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._applies = bool(self._applies) or not self._skipped


def _set(parameters: list[Tensor], gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
