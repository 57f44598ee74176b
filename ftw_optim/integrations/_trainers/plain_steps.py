"""The steps of a trainer that make no selection, as it would keep all candidates alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from ftw_optim._factors.finiteness import all_finite
from ftw_optim._step.optimizer import SelectiveOptimizer
from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.proposals.stages import FilterUnless, keeps_all_alike

EVERY = 4
"""Steps from one selection to the next while tested likeness is trusted: a proposal needs the scores of some steps."""


@final
@dataclass(frozen=True, kw_only=True)
class PlainSteps:
    """Which steps are the trainer's own: those between two selections that would keep all candidates alike.

    Attributes:
        every: steps from one selection to the next, where the stages keep all alike.
    """

    every: int

    @classmethod
    def of(cls, every: int | None, options: Mapping[str, Any], reasons: Mapping[str, bool]) -> PlainSteps:
        """The plain steps of a trainer.

        Args:
            every: what the trainer was given; None: :data:`EVERY` beside stages that leave the choice to a proposal
                while that is trusted, else 1.
            options: of the :class:`SelectiveOptimizer`.
            reasons: for which a plain step would be another one than that of equal weights, and whether they hold.

        Raises:
            ValueError: the number is none, or there is a reason.
        """
        against = [reason for reason, holds in reasons.items() if holds]
        if every is None:
            return cls(every=EVERY if isinstance(options.get("filter"), FilterUnless) and not against else 1)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"select_every must be a positive integer, got {every!r}.")
        if every > 1 and against:
            raise ValueError(
                f"select_every={every} leaves steps to the trainer, which would be others than those of equal weights "
                f"with {' and '.join(against)}: leave select_every out, or that."
            )
        return cls(every=every)

    def at(self, step: int, optimizer: SelectiveOptimizer | None, processes: Processes) -> bool:
        """Whether a step, counted from 0, is the trainer's own; asked once, and the first process decides for all."""
        if optimizer is None or step % self.every == 0:
            return False
        plain: bool = processes.gathered(keeps_all_alike(optimizer.filter, optimizer.weight))[0]
        if plain:
            optimizer.zero_grad()  # and forgets a selection before that was skipped, whose step this is not
        return plain

    def due(self, step: int, interval: int, optimizer: SelectiveOptimizer) -> bool:
        """Whether something is due at a step, counted from 0, that comes after every ``interval`` steps.

        Where that is a plain step, it is due at the next selection.
        """
        if not interval or step + 1 < interval:
            return False
        between = self.every if keeps_all_alike(optimizer.filter, optimizer.weight) else 1
        return (step + 1) % interval < between and step % between == 0


def usable_gradients(model: nn.Module, optimizer: SelectiveOptimizer, processes: Processes) -> bool:
    """Whether the gradients of a plain step are finite; if not they are cleared, as if it had not been.

    Gradients of parameters that are not the optimizer's are cleared in any case: a selection makes none.
    """
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in model.parameters():
        if id(parameter) not in updated:
            parameter.grad = None
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    bad = bool(gradients) and not bool(all_finite(gradients))
    if any(processes.totals(bad)):
        optimizer.zero_grad()
        return False
    return True
