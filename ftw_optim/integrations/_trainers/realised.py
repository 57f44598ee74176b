"""The realised decrease: how much a step's gradient really lowered the target loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._capture.armed_hooks import passing_without_trace
from ftw_optim._layers.randomness import own_randomness
from ftw_optim._preconditioners.probing.trial import step_without_hooks
from ftw_optim._step.optimizer import SelectiveOptimizer
from ftw_optim.integrations._trainers.processes import Processes


@final
class RealisedDecrease:
    """The target loss after the inner optimizer's step at zero gradient, minus the loss after the real step.

    Both steps start from the same parameters and state, and both losses are of the same examples under the same random
    state, so the effects of old momentum and weight decay cancel. A measurement takes two evaluations of the target
    and, for the step at zero gradient, a copy of parameters and state; everything is restored.

    Args:
        optimizer: the optimizer whose steps are measured from now on.
        losses: returns the target losses, shape ``(m,)``.
        due: returns whether to measure the coming step.
        note: called with the decrease of a measured step, a scalar on the device.
        processes: those that each have some of the target losses.
    """

    def __init__(
        self,
        optimizer: SelectiveOptimizer,
        losses: Callable[[], Tensor],
        *,
        due: Callable[[], bool],
        note: Callable[[Tensor], None],
        processes: Processes,
    ) -> None:
        self._optimizer, self._losses, self._due, self._note = optimizer, losses, due, note
        self._processes = processes
        self._idle: Tensor | None = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._idle = None
        selection = self._optimizer.selection
        if selection is not None and not selection.skipped and self._due():
            with after_idle_step(self._optimizer.optimizer):
                self._idle = self._mean_loss()

    def _after(self, *_: Any) -> None:
        if self._idle is not None:
            self._note(self._idle - self._mean_loss())
            self._idle = None

    def _mean_loss(self) -> Tensor:
        model = self._optimizer.model
        with passing_without_trace(model), own_randomness(model.parameters(), self._optimizer.seed):
            losses = self._losses()
        total = self._processes.total(torch.stack([losses.sum(), losses.new_tensor(len(losses))]))
        return total[0] / total[1]


@contextmanager
def after_idle_step(optimizer: Optimizer) -> Iterator[None]:
    """A block in which the optimizer has made a step at zero gradient; afterwards all is restored, bit by bit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    state = dict(optimizer.state)
    groups = [dict(group) for group in optimizer.param_groups]
    step = step_without_hooks(type(optimizer))
    try:
        # The step changes copies, so that what is put back are the very objects that others may hold.
        for key, value in state.items():
            optimizer.state[key] = copy.deepcopy(value)
        for group in optimizer.param_groups:
            group.update({key: copy.deepcopy(value) for key, value in group.items() if key != "params"})
        for parameter in parameters:
            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
        with own_randomness(parameters, 0):
            step(optimizer)
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, held in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(held)
        with torch.no_grad():
            for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
