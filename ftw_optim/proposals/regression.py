"""Ridge regression that forgets: its data as sums, its posterior in whatever units it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

_NOISE = 0.1  # standard deviation of scores before any was seen; scores are cosines of gradients
_NOISE_ROWS = 4.0  # observations that this is worth


@final
class Regression:
    """Linear regression of scores on ``width`` columns, the first of which is constant.

    It keeps sums over the observations, each multiplied by ``forgetting`` when new ones come. The prior is added when a
    posterior is asked for, so it is never forgotten and the system stays well-conditioned.

    Args:
        width: number of columns.
        forgetting: what remains of the weight of earlier observations, in (0, 1].
    """

    def __init__(self, width: int, *, forgetting: float) -> None:
        self.forgetting = forgetting
        # float64: the sums square the condition number of the columns.
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, dtype=torch.float64)
        self.energy = 0.0
        self.rows = 0.0

    def observe(self, columns: Tensor, scores: Tensor) -> None:
        """Add observations, shapes ``(n, width)`` and ``(n,)`` float64."""
        self.gram = self.forgetting * self.gram + columns.T @ columns
        self.cross = self.forgetting * self.cross + columns.T @ scores
        self.energy = self.forgetting * self.energy + float(scores @ scores)
        self.rows = self.forgetting * self.rows + len(scores)

    def draw(self, shift: Tensor, scale: Tensor, prior: Tensor, precision: Tensor, noise: Tensor) -> Tensor:
        """Coefficients drawn from the posterior, float64 of shape ``(width,)``, for the columns as they were observed.

        The prior is one of the columns ``(x - shift) / scale``: independent normal coefficients with mean ``prior`` and
        precision ``precision``, relative to that of the scores. The first column must have shift 0 and scale 1. The
        variance of the scores is estimated from what prior and observations leave over.

        Args:
            shift: shape ``(width,)``, subtracted from the columns.
            scale: shape ``(width,)``, positive.
            prior: shape ``(width,)``, the coefficients' means.
            precision: shape ``(width,)``, positive.
            noise: shape ``(width,)``, standard normal numbers; zeros give the posterior mean.
        """
        # The sums of shifted columns: the first column is constant, so its products are the sums of the others.
        sums = torch.outer(shift, self.gram[0])
        gram = self.gram - sums - sums.T + self.gram[0, 0] * torch.outer(shift, shift)
        gram, cross = gram / torch.outer(scale, scale), (self.cross - shift * self.cross[0]) / scale
        factor = torch.linalg.cholesky(gram + torch.diag(precision))
        mean = torch.cholesky_solve((cross + precision * prior)[:, None], factor)[:, 0]
        left = self.energy - 2.0 * float(mean @ cross) + float(mean @ gram @ mean)
        moved = float(precision @ (mean - prior).square())
        variance = (_NOISE_ROWS * _NOISE**2 + max(0.0, left) + moved) / (_NOISE_ROWS + self.rows)
        error = torch.linalg.solve_triangular(factor.T, noise[:, None], upper=True)[:, 0]
        drawn: Tensor = (mean + variance**0.5 * error) / scale
        drawn[0] -= shift @ drawn
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The sums, which later observations do not change."""
        return {"gram": self.gram, "cross": self.cross, "energy": self.energy, "rows": self.rows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from sums.

        Raises:
            ValueError: they have another shape; nothing is loaded.
        """
        if missing := self.state_dict().keys() - state_dict.keys():
            raise ValueError(
                f"Expected the sums of a regression, but {', '.join(sorted(missing))} is missing: begin anew."
            )
        gram, cross = (
            torch.as_tensor(state_dict[name], dtype=torch.float64, device="cpu") for name in ("gram", "cross")
        )
        if gram.shape != self.gram.shape or cross.shape != self.cross.shape:
            raise ValueError(
                f"Expected sums of {len(self.cross)} columns, got shapes {tuple(gram.shape)} and {tuple(cross.shape)}."
            )
        energy, rows = float(state_dict["energy"]), float(state_dict["rows"])
        self.gram, self.cross, self.energy, self.rows = gram.clone(), cross.clone(), energy, rows
