"""Ridge regression that forgets: its data as sums, its posterior in whatever units it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

_NOISE = 0.1  # standard deviation of responses before any was seen; scores are cosines of gradients
_NOISE_ROWS = 4.0  # observations that this is worth


@final
class Regression:
    """Linear regression of one response or several on the same ``width`` columns, the first of which is constant.

    It keeps sums over the observations, each multiplied by ``forgetting`` when new ones come. The prior is added when a
    posterior is asked for, so it is never forgotten and the system stays well-conditioned.

    Args:
        width: number of columns.
        forgetting: what remains of the weight of earlier observations, in (0, 1].
        responses: how many numbers are learned of each observation, each for itself.
    """

    def __init__(self, width: int, *, forgetting: float, responses: int = 1) -> None:
        self.forgetting = forgetting
        # float64: the sums square the condition number of the columns.
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, responses, dtype=torch.float64)
        self.energy = torch.zeros(responses, dtype=torch.float64)
        self.rows = 0.0

    def observe(self, columns: Tensor, responses: Tensor) -> None:
        """Add observations, shapes ``(n, width)`` and ``(n, responses)`` float64."""
        self.gram = self.forgetting * self.gram + columns.T @ columns
        self.cross = self.forgetting * self.cross + columns.T @ responses
        self.energy = self.forgetting * self.energy + responses.square().sum(0)
        self.rows = self.forgetting * self.rows + len(responses)

    def draw(self, shift: Tensor, scale: Tensor, prior: Tensor, precision: Tensor, noise: Tensor) -> Tensor:
        """Coefficients drawn from the posterior, float64 ``(width, responses)``, for the columns as they were observed.

        The prior is one of the columns ``(x - shift) / scale``: independent normal coefficients with mean ``prior`` and
        precision ``precision``, relative to that of the response. The first column must have shift 0 and scale 1. The
        variance of a response is estimated from what prior and observations leave over.

        Args:
            shift: shape ``(width,)``, subtracted from the columns.
            scale: shape ``(width,)``, positive.
            prior: shape ``(width, responses)``, the coefficients' means.
            precision: shape ``(width,)``, positive.
            noise: shape ``(width, responses)``, standard normal numbers; zeros give the posterior mean.
        """
        shift, scale, precision = shift[:, None], scale[:, None], precision[:, None]
        # The sums of shifted columns: the first column is constant, so its products are the sums of the others.
        sums = shift * self.gram[0]
        gram = self.gram - sums - sums.T + self.gram[0, 0] * shift * shift.T
        gram, cross = gram / (scale * scale.T), (self.cross - shift * self.cross[0]) / scale
        factor = torch.linalg.cholesky(gram + precision.diagflat())
        mean = torch.cholesky_solve(cross + precision * prior, factor)
        left = self.energy - 2.0 * (mean * cross).sum(0) + (mean * (gram @ mean)).sum(0)
        moved = (precision * (mean - prior).square()).sum(0)
        variance = (_NOISE_ROWS * _NOISE**2 + left.clamp(min=0.0) + moved) / (_NOISE_ROWS + self.rows)
        error = torch.linalg.solve_triangular(factor.T, noise, upper=True)
        drawn: Tensor = (mean + variance.sqrt() * error) / scale
        drawn[0] -= (shift * drawn).sum(0)
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
        sums = {
            name: torch.as_tensor(state_dict[name], dtype=torch.float64, device="cpu").clone()
            for name in ("gram", "cross", "energy")
        }
        mine = {name: tuple(getattr(self, name).shape) for name in sums}
        given = {name: tuple(part.shape) for name, part in sums.items()}
        if given != mine:
            raise ValueError(f"Expected sums of a regression of shapes {mine}, got {given}: begin anew.")
        self.rows = float(state_dict["rows"])
        self.gram, self.cross, self.energy = sums["gram"], sums["cross"], sums["energy"]
