"""The steps of a trainer that make no selection, as it would keep all candidates alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ftw_optim._step.optimizer import SelectiveOptimizer
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
    def of(cls, every: int | None, options: Mapping[str, Any], *, weighting: str, trains_on_target: bool) -> PlainSteps:
        """The plain steps of a trainer.

        Args:
            every: what the trainer was given; None: :data:`EVERY` beside stages that leave the choice to a proposal
                while that is trusted, else 1.
            options: of the :class:`SelectiveOptimizer`.
            weighting: how a candidate's loss is formed.
            trains_on_target: whether target examples take part in steps.

        Raises:
            ValueError: the number is none, or a plain step would be another one than that of equal weights.
        """
        if every is None:
            asked = isinstance(options.get("filter"), FilterUnless)
            return cls(every=EVERY if asked and weighting == "token_sum" and not trains_on_target else 1)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"select_every must be a positive integer, got {every!r}.")
        if every > 1 and (weighting != "token_sum" or trains_on_target):
            raise ValueError(
                f"select_every={every} leaves steps to the trainer, whose mean is over all tokens of the candidates: "
                f'expected sample_weighting="token_sum" and target examples that only guide, got {weighting!r} and '
                f"target examples that {'take part' if trains_on_target else 'guide'}. Leave select_every out."
            )
        return cls(every=every)

    def at(self, step: int, optimizer: SelectiveOptimizer) -> bool:
        """Whether a step, counted from 0, is the trainer's own."""
        return step % self.every > 0 and keeps_all_alike(optimizer.filter, optimizer.weight)
