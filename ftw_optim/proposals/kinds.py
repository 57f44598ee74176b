"""Two kinds of records, of which one is worth less: when they are told apart, and until when.

A record is worth what it takes off the target's loss, to first order: the product of its gradient and the target's, in
the optimizer's metric. That is learned as the product of its score, which is noisy, and of the length of its gradient,
which is not: a regression of the products themselves has the noise of one and the spread of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim.proposals.scoring import WIDEST, ScoreRegression

REMEMBERED = 96
"""Observed records that the kinds are told from, half of them of each where there are two."""
LEAST, FEW = 12, 6
"""Observed records before two kinds are looked for, and some of each kind before anything is made of what they show."""
APART = 2.75
"""How far apart and how unequal two kinds must be: the distance of their mean expected worth in standard deviations
within them (see :func:`two_kinds`), times the worse kind's shortfall as a share of the better one's mean."""
CERTAIN = 2.5
"""Standard errors between the kinds' mean worth, of records that were told apart before theirs was learned: a
regression finds two kinds in any noise that it has seen."""
NEARER = 0.35
"""Place of the border on the way from the worse kind's mean to the better one's: what is in doubt is proposed."""
RECENT = 48
"""Latest records of each kind whose worth says whether it is worse."""


_REMEMBERED_PARTS = ("better", "worse", "better_worth", "worse_worth")


@final
class Kinds:
    """What is known of two kinds of records; nothing is left out until they are far apart.

    Args:
        regression: of scores and lengths on the columns of records, which it teaches.

    Attributes:
        veto: whether the worse kind is left out now.
    """

    def __init__(self, regression: ScoreRegression) -> None:
        self._regression = regression
        self._forget()

    def _forget(self) -> None:
        self.veto = False
        self._border = 0.0
        # Records of one kind, or of the better one and the worse one; and what the latest of these two were worth.
        self._better, self._worse = self._regression.no_columns(), self._regression.no_columns()
        self._better_worth = self._worse_worth = torch.empty(0, dtype=torch.float64)

    def expected(self, columns: Tensor) -> Tensor:
        """What records are expected to be worth, in lengths of the target's gradient and of those of a step."""
        return _worth(columns @ self._coefficients())

    def _coefficients(self) -> Tensor:
        return self._regression.coefficients([torch.cat([self._better, self._worse])])

    def judged(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The expected worth of records, and whether each is of the kind that is left out; zeros without a veto."""
        if not (self.veto and len(features)):
            nothing = torch.zeros(len(features), dtype=torch.float64)
            return nothing, nothing.bool()
        expected = _worth(self._regression.expected(features, self._coefficients()))
        return expected, expected <= self._border

    def observe(self, columns: Tensor, scores: Tensor, sizes: Tensor) -> None:
        """Learn from the records of a step, of shape ``(n, width)``: their scores, and how long their gradients are.

        Args:
            columns: of the records.
            scores: shape ``(n,)``, see :class:`~ftw_optim.proposals.scoring.Told`.
            sizes: shape ``(n,)``, see there.
        """
        if self.veto or len(self._better) >= LEAST:
            # Before any of this is learned.
            worse, worth = self.expected(columns) <= self._border, scores * sizes.exp()
            self._worse_worth = torch.cat([self._worse_worth, worth[worse]])[-RECENT:]
            self._better_worth = torch.cat([self._better_worth, worth[~worse]])[-RECENT:]
        self._regression.learned.observe(columns, torch.stack([scores, sizes], dim=1))
        if self.veto:
            self._keep_apart(columns)
        else:
            self._better = torch.cat([self._better, columns])[-REMEMBERED:]
            if len(self._better) >= LEAST:
                self._look()

    def doubt(self) -> float:
        """Between 0 and 1: in inverse proportion to the gap between the kinds beyond what a veto needs."""
        gap = self._gap()
        return CERTAIN / gap if gap > CERTAIN else 1.0

    def _look(self) -> None:
        """Decide whether there are two kinds, of which one is to be left out."""
        expected = self.expected(self._better)
        self._border, apart = two_kinds(expected)
        worse = expected <= self._border
        if not bool(worse.any()) or bool(worse.all()):
            return
        lower, upper = float(expected[worse].mean()), float(expected[~worse].mean())
        shortfall = min(1.0, 1.0 - lower / upper) if upper > 0.0 else 0.0
        if apart * shortfall > APART and self._gap() > CERTAIN:
            self.veto = True
            self._better, self._worse = self._better[~worse], self._better[worse]
            self._draw_border()

    def _keep_apart(self, columns: Tensor) -> None:
        """Take in new records of each kind, and decide whether the worse one is to be left out any longer.

        Of the kind left out few come, so both are remembered apart, and once told apart they are not told apart anew:
        among the records that come then, the widest gap is another one.
        """
        worse = self.expected(columns) <= self._border
        self._better = torch.cat([self._better, columns[~worse]])[-REMEMBERED // 2 :]
        self._worse = torch.cat([self._worse, columns[worse]])[-REMEMBERED // 2 :]
        lower, upper = self._draw_border()
        if lower >= upper or self._gap() <= 0.0:
            self._forget()

    def _gap(self) -> float:
        """The distance of the kinds' mean worth in standard errors; NaN where too few are known."""
        lower, upper = self._worse_worth, self._better_worth
        if min(len(lower), len(upper)) < FEW:
            return math.nan
        error = (lower.var() / len(lower) + upper.var() / len(upper)).sqrt()
        return float((upper.mean() - lower.mean()) / error.clamp(min=torch.finfo(error.dtype).tiny))

    def _draw_border(self) -> tuple[float, float]:
        """Place the border between the kinds' mean expected worth, which is returned."""
        expected = self.expected(torch.cat([self._worse, self._better]))
        lower, upper = float(expected[: len(self._worse)].mean()), float(expected[len(self._worse) :].mean())
        self._border = lower + NEARER * (upper - lower)
        return lower, upper

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, without the regression."""
        return {
            "vetoes": self.veto,
            "border": self._border,
            **{name: getattr(self, f"_{name}") for name in _REMEMBERED_PARTS},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from that.

        Raises:
            ValueError: it is of another form; nothing is loaded.
        """
        mine = self.state_dict()
        if state_dict.keys() != mine.keys():
            raise ValueError(
                f"Expected what is known of kinds as {', '.join(mine)}, got {', '.join(state_dict)}: the state of "
                "another release. Begin anew."
            )
        parts = {
            name: torch.as_tensor(state_dict[name], dtype=torch.float64, device="cpu").clone()
            for name in _REMEMBERED_PARTS
        }
        width = self._better.shape[1]
        for name in ("better", "worse"):
            if not parts[name].numel():
                parts[name] = self._regression.no_columns()  # JSON has no shape of an empty table
            if parts[name].ndim != 2 or parts[name].shape[1] != width:
                raise ValueError(
                    f"Expected {width} columns of each remembered record, got shape {tuple(parts[name].shape)}."
                )
        self.veto, self._border = bool(state_dict["vetoes"]), float(state_dict["border"])
        for name, part in parts.items():
            setattr(self, f"_{name}", part)


def _worth(expected: Tensor) -> Tensor:
    """What records are worth, of their scores and the logarithms of their lengths, shape ``(n, 2)``."""
    scores, sizes = expected.unbind(1)
    return scores * sizes.clamp(-WIDEST, WIDEST).exp()


def two_kinds(values: Tensor) -> tuple[float, float]:
    """The point that divides some numbers into two kinds best, and how far apart these are.

    The best point leaves the least variance within the two (Otsu's method); each has a tenth of the numbers or more.

    Args:
        values: shape ``(n,)`` float64, two or more.

    Returns:
        A number below the higher kind and not below the lower one; and the distance of their means, in standard
        deviations within them.
    """
    ordered = values.sort().values
    n = len(ordered)
    least = max(1, n // 10)
    below = torch.arange(least, n - least + 1, dtype=torch.float64)
    sums = ordered.cumsum(0)[least - 1 : n - least]
    low, high = sums / below, (ordered.sum() - sums) / (n - below)
    between = below * (n - below) / n * (high - low).square()
    at = int(between.argmax())
    within = ((ordered - ordered.mean()).square().sum() - between[at]) / n
    last = least - 1 + at
    gap = high[at] - low[at]
    if float(gap) <= 1e-9 * float(ordered.abs().max()):  # rounding
        return float(ordered[last]), 0.0
    apart = gap / within.clamp(min=(1e-9 * gap) ** 2).sqrt()
    return float((ordered[last] + ordered[last + 1]) / 2), float(apart)
