"""How far likeness to the target rows can be trusted: whether candidates score the higher, the more alike they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

from torch import Tensor

_FORGETTING = 0.95  # a step's part of the weight of the next: the model, and what it needs, change
_NOISE = 0.1  # standard deviation of scores before any was seen; scores are cosines of gradients
_NOISE_ROWS = 4.0  # observations that this is worth
_GUESS, _GUESS_ERROR = 0.2, 0.3  # of the slope: likeness, a cosine too, mostly helps
_MATTERS = 0.05  # a slope nearer to zero says neither that likeness helps nor that it harms
_SURE = 0.9  # probability from which on that is believed
_MOST = 0.5  # the largest share before likeness is trusted: stages that keep a third find enough among the half
_SUMS = ("rows", "spread", "cross", "energy", "count", "total", "squares")


@final
class LikenessTrust:
    """Whether likeness to the target rows is to be trusted, by the scores of the candidates of the steps so far.

    It is from when scores probably rise with likeness and are positive, for of records that all harm, the most alike
    harm too; until they probably fall with likeness, or are negative.

    The candidates of a step share its target rows and its parameters, so they are compared within their step alone, and
    the slopes of all steps are pooled, those of earlier ones with less weight.

    Attributes:
        trusts: whether it is.
    """

    def __init__(self) -> None:
        self.trusts = False
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def observe(self, likeness: Tensor, scores: Tensor) -> None:
        """Take in the candidates of one step: likeness and scores, both of shape ``(n,)``, of two or more."""
        if len(scores) < 2:
            return
        like, score = likeness.double(), scores.double()
        x, y = like - like.mean(), score - score.mean()
        new = (
            *(len(y) - 1.0, float(x @ x), float(x @ y), float(y @ y)),
            *(float(len(y)), float(score.sum()), float(score @ score)),
        )
        self._sums = {name: _FORGETTING * self._sums[name] + value for name, value in zip(_SUMS, new, strict=True)}
        if self.trusts:
            self.trusts = min(self.slope_above(-_MATTERS), self._positive()) >= 1.0 - _SURE
        else:
            self.trusts = min(self.slope_above(_MATTERS), self._positive()) > _SURE

    def share(self) -> float:
        """The share of the candidates that likeness should choose.

        Once it is trusted, the probability that it does no harm. Until then the probability that it helps, and at most
        a half, as candidates that are all alike tell nothing of likeness.
        """
        return self.slope_above(-_MATTERS) if self.trusts else min(self.slope_above(_MATTERS), _MOST)

    def slope_above(self, value: float) -> float:
        """The probability that scores rise with likeness by more than a value, per unit of it."""
        rows, spread, cross, energy = (self._sums[name] for name in _SUMS[:4])
        variance = _variance(energy - cross**2 / spread if spread > 0.0 else energy, rows)
        certainty = spread / variance + _GUESS_ERROR**-2
        mean = (cross / variance + _GUESS * _GUESS_ERROR**-2) / certainty
        return _normal((mean - value) * math.sqrt(certainty))

    def _positive(self) -> float:
        """The probability that the mean score is positive."""
        count, total, squares = (self._sums[name] for name in _SUMS[4:])
        return _normal(total / math.sqrt(count * _variance(squares - total**2 / count, count))) if count else 0.5

    def state_dict(self) -> dict[str, float]:
        """The sums over the candidates seen, and whether likeness is trusted."""
        return {**self._sums, "trusts": self.trusts}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go on from such a state.

        Raises:
            ValueError: it is another one, or no sums of anything; nothing is loaded.
        """
        mine = self.state_dict()
        if state_dict.keys() != mine.keys():
            raise ValueError(f"Expected the sums {', '.join(mine)}, got {', '.join(state_dict)}: begin anew.")
        sums = {name: float(state_dict[name]) for name in _SUMS}
        signed = {"cross", "total"}
        if not all(math.isfinite(value) and (value >= 0.0 or name in signed) for name, value in sums.items()):
            raise ValueError(f"Expected finite sums of squares, got {sums}: begin anew.")
        self._sums, self.trusts = sums, bool(state_dict["trusts"])


def _variance(left: float, rows: float) -> float:
    """The variance of scores, from the sum of squares that an estimate leaves over, of a number of them."""
    return (_NOISE_ROWS * _NOISE**2 + max(0.0, left)) / (_NOISE_ROWS + rows)


def _normal(value: float) -> float:
    """The probability that a standard normal number is below a value."""
    return 0.5 * math.erfc(-value / math.sqrt(2.0))
