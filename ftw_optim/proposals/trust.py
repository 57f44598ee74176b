"""How far likeness to the target rows can be trusted: whether candidates score the higher, the more alike they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

from torch import Tensor

_FORGETTING = 0.9  # a step's part of the weight of the next: the model, and what it needs, change
_NOISE = 0.1  # standard deviation of scores before any was seen; scores are cosines of gradients
_NOISE_ROWS = 4.0  # observations that this is worth
_SUMS = ("rows", "spread", "cross", "energy")


@final
class LikenessTrust:
    """The probability that scores rise with likeness, from the candidates of the steps so far.

    The candidates of a step share its target rows and its parameters, so they are compared within their step alone, and
    the slopes of all steps are pooled, those of earlier ones with less weight.
    """

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def observe(self, likeness: Tensor, scores: Tensor) -> None:
        """Take in the candidates of one step: likeness and scores, both of shape ``(n,)``."""
        if len(scores) < 2:
            return
        x, y = likeness.double() - likeness.double().mean(), scores.double() - scores.double().mean()
        new = len(y) - 1.0, float(x @ x), float(x @ y), float(y @ y)
        self._sums = {name: _FORGETTING * self._sums[name] + value for name, value in zip(_SUMS, new, strict=True)}

    def probability(self) -> float:
        """The probability that the slope of scores on likeness is positive; one half where nothing is known of it."""
        rows, spread, cross, energy = (self._sums[name] for name in _SUMS)
        if spread <= 0.0:
            return 0.5
        left = max(0.0, energy - cross**2 / spread)
        variance = (_NOISE_ROWS * _NOISE**2 + left) / (_NOISE_ROWS + rows)
        return 0.5 * math.erfc(-cross / math.sqrt(2.0 * spread * variance))

    def state_dict(self) -> dict[str, float]:
        """The sums over the candidates seen."""
        return dict(self._sums)

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go on from such sums.

        Raises:
            ValueError: they are others.
        """
        if state_dict.keys() != self._sums.keys():
            raise ValueError(f"Expected the sums {', '.join(_SUMS)}, got {', '.join(state_dict)}.")
        self._sums = {name: float(state_dict[name]) for name in _SUMS}
