"""A watch over the guide: whether the rows that tell a step what to match are still like others of their kind.

Rows that are trained on many times over are memorised. Their loss falls below that of rows that nothing has seen, and
what is left of their gradients says nothing of these: the guide is blind. How much the rows agree with each other does
not show it, as memorised rows still do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._capture.structure import Structure
from ftw_optim._layers.randomness import own_randomness
from ftw_optim._step.target import TargetGradient

CERTAIN = 2.0
"""The number of standard errors by which the guide's loss must lie below that of the held-out rows."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """The guide's losses since the last look at held-out rows, and what that look found; never changed.

    Attributes:
        losses: of the guide's rows, a tensor for each time they were formed.
        found: the mean loss of the guide and of the held-out rows at the last look, and the standard error of the
            difference; NaN before the first look.
    """

    losses: Sequence[Tensor] = ()
    found: tuple[float, float, float] = field(default=(math.nan, math.nan, math.nan))

    @property
    def new(self) -> bool:
        """Whether nothing has been watched yet."""
        return not self.losses and math.isnan(self.found[0])

    @property
    def blind(self) -> bool:
        """Whether the guide's loss is certainly below that of the held-out rows."""
        guide, held_out, error = self.found
        return held_out - guide > CERTAIN * error  # False for NaN

    def after(
        self, losses: Tensor | None, target: TargetGradient, structure: Structure, *, backwards: int, seed: int
    ) -> Watch:
        """The watch after a step, at which it looks where a look is due.

        Args:
            losses: of the guide's rows, detached; None where they were not formed anew.
            target: has the closure of the held-out rows.
            structure: the model.
            backwards: number of selections before this one.
            seed: of the random state that the closure runs under.

        Raises:
            TypeError, ValueError: the closure returned no finite losses, one for each row.
        """
        if target.held_out is None:
            return self
        since = self.losses if losses is None else [*self.losses, losses]
        if backwards % target.held_out_every or not since:
            return replace(self, losses=since)
        with own_randomness(structure.parameters.values(), seed), torch.no_grad():
            held_out = _checked(target.held_out())
        guide = torch.cat([one.detach().double().cpu() for one in since])
        # The rows come again from step to step, so all losses together are worth no more than those of one.
        error = math.sqrt(_square_error(guide, len(guide) / len(since)) + _square_error(held_out, len(held_out)))
        return Watch(found=(float(guide.mean()), float(held_out.mean()), error))

    def state_dict(self) -> dict[str, Tensor]:
        """The losses and what was found, as tensors."""
        losses = [one.detach().double().cpu() for one in self.losses]
        return {
            "losses": torch.cat(losses) if losses else torch.empty(0, dtype=torch.float64),
            "sizes": torch.tensor([len(one) for one in losses], dtype=torch.int64),
            "found": torch.tensor(self.found, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Watch:
        """The watch of a :meth:`state_dict`; a new one for None."""
        if state is None:
            return cls()
        guide, held_out, error = state["found"].tolist()
        return cls(losses=state["losses"].split(state["sizes"].tolist()), found=(guide, held_out, error))


def _square_error(losses: Tensor, rows: float) -> float:
    """The squared standard error of a mean over rows; infinite for one row, which tells nothing of its kind."""
    return float(losses.var()) / rows if rows > 1 else math.inf


def _checked(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor):
        raise TypeError(f"The held_out closure must return a tensor of losses (m,), got {type(losses).__name__}.")
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(
            "The held_out closure must return one loss per row, shape (m,) with m > 0, got shape "
            f"{tuple(losses.shape)}."
        )
    found = losses.detach().double().cpu()
    if not bool(found.isfinite().all()):
        raise ValueError("Expected finite losses of the held-out rows, got NaN or infinity. Nothing was changed.")
    return found
