"""A watch over the guide: whether the rows that tell a step what to match are still like others of their kind.

Rows that are trained on many times over are memorised. Their loss falls below that of rows that nothing has seen, and
what is left of their gradients says nothing of these: the guide is blind. How much the rows agree with each other does
not show it, as memorised rows still do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._capture.structure import Structure
from ftw_optim._layers.randomness import own_randomness
from ftw_optim._ranks.ranks import Ranks
from ftw_optim._step.target import TargetGradient, losses_of_rows

CERTAIN = 2.0
"""The number of standard errors by which the guide's loss must lie below that of the held-out rows."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """What the last look at held-out rows found; never changed.

    Attributes:
        found: the mean loss of the guide and of the held-out rows at the last look, and the standard error of the
            difference; NaN before the first look.
        due: whether a look waits for a step that forms the guide's losses.
    """

    found: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    due: bool = False

    @property
    def new(self) -> bool:
        """Whether nothing has been watched yet."""
        return not self.due and math.isnan(self.found[1])

    @property
    def blind(self) -> bool:
        """Whether the guide's loss is certainly below that of the held-out rows."""
        guide, held_out, error = self.found
        return held_out - guide > CERTAIN * error  # False for NaN

    def after(
        self,
        losses: Tensor | None,
        target: TargetGradient,
        structure: Structure,
        *,
        ranks: Ranks,
        backwards: int,
        seed: int,
    ) -> Watch:
        """The watch after a step, at which it looks where a look is due.

        Both losses are of the same parameters: those of earlier steps would make any rise look like memory.

        Args:
            losses: of the guide's rows, detached; None where they were not formed anew.
            target: has the closure of the held-out rows.
            structure: the model.
            ranks: the processes whose held-out rows are looked at together.
            backwards: number of selections before this one.
            seed: of the random state that the closure runs under.

        Raises:
            TypeError, ValueError: the closure did not return losses, one for each row.
        """
        if target.held_out is None:
            return Watch()
        if not (self.due or backwards % target.held_out_every == 0):
            return self
        if losses is None:
            return replace(self, due=True)
        closure = target.held_out
        held_out = ranks.joined(lambda: _held_out_losses(closure, structure, seed))
        guide = losses.double().cpu()
        error = math.sqrt(_square_error(guide) + _square_error(held_out))
        return Watch(found=(float(guide.mean()), float(held_out.mean()), error))

    def state_dict(self) -> dict[str, Tensor]:
        """What was found, and whether a look is due, as tensors."""
        return {"found": torch.tensor(self.found, dtype=torch.float64), "due": torch.tensor(self.due)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Watch:
        """The watch of a :meth:`state_dict`; a new one for None."""
        if state is None:
            return cls()
        guide, held_out, error = state["found"].tolist()
        return cls(found=(guide, held_out, error), due=bool(state["due"]))


def _held_out_losses(closure: Callable[[], Tensor], structure: Structure, seed: int) -> Tensor:
    """The losses of this process's held-out rows, float64 on the CPU; modules are left in their mode."""
    modes = [(module, module.training) for module in structure.modules.values()]
    try:
        with own_randomness(structure.parameters.values(), seed), torch.no_grad():
            return losses_of_rows(closure, name="held_out", row="row").double().cpu()
    finally:
        for module, training in modes:
            module.training = training


def _square_error(losses: Tensor) -> float:
    """The squared standard error of a mean over rows; infinite for one row, which tells nothing of its kind."""
    return float(losses.var()) / len(losses) if len(losses) > 1 else math.inf
