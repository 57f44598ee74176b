"""The proposal that leaves out what the scores of the steps so far have shown to be of a worse kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.drawing import best_and_uniform, explored, salt
from ftw_optim.proposals.features import keys_of, likeness_of, sources_of
from ftw_optim.proposals.interface import Proposal, Sample, check_count, check_explore, check_state
from ftw_optim.proposals.scoring import ScoreRegression

REMEMBERED = 96
"""Observed records that the kinds are told from, half of them of each where there are two."""
LEAST, FEW = 12, 6
"""Observed records before two kinds are looked for, and scores of each kind before anything is made of them."""
APART = 2.75
"""How far apart and how unequal two kinds must be: the distance of their mean expected scores in standard deviations
within them (see :func:`two_kinds`), times the worse kind's shortfall as a share of the better one's mean."""
CERTAIN = 2.5
"""Standard errors between the kinds' mean scores, of records that were told apart before their scores were learned: a
regression finds two kinds in any noise that it has seen."""
NEARER = 0.35
"""Place of the border on the way from the worse kind's mean to the better one's: what is in doubt is proposed."""
RECENT = 48
"""Latest scores of each kind that say whether it is worse."""


@final
class VettedProposal(Proposal):
    """The records most alike to the target rows, but for those that the scores show to be of a worse kind.

    Likeness finds records that *look* like the target and cannot see whether they are any good: a prompt of the right
    kind may have an empty, cut-off or wrong answer. A regression of scores on the record's features, as in
    :class:`LearnedProposal` but without likeness, sees that within a few steps. Where what it expects shows two kinds
    of records, far apart, and the scores that come then bear it out, records of the worse kind are left out, until
    those of it that are tried all the same score no lower than the others. Where there are no two kinds, nothing is
    left out and this is :class:`SimilarityProposal`: among good records scores are too noisy to choose by.

    Scores are only honest of a target that is not trained on meanwhile, see :class:`~ftw_optim.TargetGradient`.

    Args:
        target_samples: the target rows; None: no likeness.
        order: ``"likeness"``: the most alike first. ``"uniform"``: at random.
        dim, embedding, use_source, ridge, forgetting: of the regression, see :class:`LearnedProposal`.
        explore: share of the candidates that are of the kind left out, by which it is seen whether it is still worse:
            all of it while that is barely known, and less the surer it is, as these records are trained on too. No
            more than the kind has of the records read; where it is no whole number, rounded up or down at random. With
            0 nothing that was left out comes back.
        seed: seed of the draws and of the features.

    Attributes:
        vetoes: whether a kind of records is left out now.

    Raises:
        ValueError: an argument is not as described above.
    """

    def __init__(
        self,
        target_samples: Sequence[Sample] | None = None,
        *,
        order: Literal["likeness", "uniform"] = "likeness",
        dim: int = 256,
        embedding: Tensor | None = None,
        use_source: bool = False,
        ridge: float = 8.0,
        forgetting: float = 0.98,
        explore: float = 0.125,
        seed: int = 0,
    ) -> None:
        check_explore(explore, "record")
        if order not in ("likeness", "uniform"):
            raise ValueError(f"order must be 'likeness' or 'uniform', got {order!r}.")
        if order == "likeness" and target_samples is None:
            raise ValueError("order='likeness' needs target_samples to be alike to; or pass order='uniform'.")
        self.order, self.explore, self.seed = order, explore, seed
        self._regression = ScoreRegression(
            target_samples,
            dim=dim,
            embedding=embedding,
            use_source=use_source,
            ridge=ridge,
            forgetting=forgetting,
            prior=0.0,
            seed=seed,
            by_likeness=False,  # else it would find the kind of the target, which likeness has found
        )
        self._calls = 0
        self._forget_kinds()

    def _forget_kinds(self) -> None:
        self.vetoes = False
        self._border = 0.0
        # Records of one kind, or of the better one and the worse one; and the latest scores of these two.
        self._better, self._worse = self._regression.no_columns(), self._regression.no_columns()
        self._better_scores = self._worse_scores = torch.empty(0, dtype=torch.float64)

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The features of samples, to keep and to pass to the other calls; a row depends on its sample alone."""
        return self._regression.features(samples)

    def propose(self, samples: Sequence[Sample], count: int, *, features: Tensor | None = None) -> Tensor:
        """See :class:`Proposal`; with ``features`` the samples themselves are not looked at.

        Of the kind that is left out, those come last that exploring asks for. Where there are too few others, those
        with the highest expected scores are taken as well.
        """
        check_count(count)
        known = self._regression.features.given(samples, features)
        count = min(count, len(known))
        guess = likeness_of(known) if self.order == "likeness" else torch.zeros(len(known), dtype=torch.float64)
        expected = torch.zeros(len(known), dtype=torch.float64)
        worse = torch.zeros(len(known), dtype=torch.bool)
        if self.vetoes and len(known):
            expected = self._expected(self._regression.columns(known))
            worse = expected <= self._border
        draw = salt("vetted", self.seed, self._calls)
        self._calls += 1

        def best(places: Tensor, values: Tensor, number: int) -> Tensor:
            found = best_and_uniform(
                values[places],
                keys_of(known)[places],
                sources_of(known)[places],
                number,
                explore=0.0,
                explore_by="record",
                salt=draw,
            )
            return places[found]

        share = min(self._explored_now(), float(worse.double().mean())) if len(known) else 0.0
        tried = best(worse.nonzero()[:, 0], guess, min(explored(count, share, draw), int(worse.sum())))
        chosen = best((~worse).nonzero()[:, 0], guess, count - len(tried))
        left = worse.clone()
        left[tried] = False
        more = best(left.nonzero()[:, 0], expected, count - len(chosen) - len(tried))
        return torch.cat([chosen, more, tried])

    def observe(self, samples: Sequence[Sample], selection: Selection, *, features: Tensor | None = None) -> None:
        """See :class:`Proposal`; as for :class:`LearnedProposal`, a guide that is blind or stale teaches nothing."""
        told = self._regression.told(samples, selection, features)
        if told is None:
            return
        columns, scores = told
        if self.vetoes or len(self._better) >= LEAST:
            # Before these scores are learned.
            worse = self._expected(columns) <= self._border
            self._worse_scores = torch.cat([self._worse_scores, scores[worse]])[-RECENT:]
            self._better_scores = torch.cat([self._better_scores, scores[~worse]])[-RECENT:]
        self._regression.learned.observe(columns, scores)
        if self.vetoes:
            self._keep_apart(columns)
        else:
            self._better = torch.cat([self._better, columns])[-REMEMBERED:]
            if len(self._better) >= LEAST:
                self._look_for_kinds()

    def _look_for_kinds(self) -> None:
        """Decide whether there are two kinds, of which one is to be left out."""
        expected = self._expected(self._better)
        self._border, apart = two_kinds(expected)
        worse = expected <= self._border
        if not bool(worse.any()) or bool(worse.all()):
            return
        lower, upper = float(expected[worse].mean()), float(expected[~worse].mean())
        shortfall = min(1.0, 1.0 - lower / upper) if upper > 0.0 else 0.0
        if apart * shortfall > APART and self._gap() > CERTAIN:
            self.vetoes = True
            self._better, self._worse = self._better[~worse], self._better[worse]
            self._draw_border()

    def _keep_apart(self, columns: Tensor) -> None:
        """Take in new records of each kind, and decide whether the worse one is to be left out any longer.

        Of the kind left out few come, so both are remembered apart, and once told apart they are not told apart anew:
        among the records that come then, the widest gap is another one.
        """
        worse = self._expected(columns) <= self._border
        self._better = torch.cat([self._better, columns[~worse]])[-REMEMBERED // 2 :]
        self._worse = torch.cat([self._worse, columns[worse]])[-REMEMBERED // 2 :]
        lower, upper = self._draw_border()
        if lower >= upper or self._gap() <= 0.0:
            self._forget_kinds()

    def _gap(self) -> float:
        """The distance of the kinds' mean scores in standard errors; NaN where too few are known."""
        lower, upper = self._worse_scores, self._better_scores
        if min(len(lower), len(upper)) < FEW:
            return math.nan
        error = (lower.var() / len(lower) + upper.var() / len(upper)).sqrt()
        return float((upper.mean() - lower.mean()) / error.clamp(min=torch.finfo(error.dtype).tiny))

    def _explored_now(self) -> float:
        """The share to explore: in inverse proportion to the gap beyond what a veto needs."""
        gap = self._gap()
        return self.explore * CERTAIN / gap if gap > CERTAIN else self.explore

    def _draw_border(self) -> tuple[float, float]:
        """Place the border between the kinds' mean expected scores, which are returned."""
        expected = self._expected(torch.cat([self._worse, self._better]))
        lower, upper = float(expected[: len(self._worse)].mean()), float(expected[len(self._worse) :].mean())
        self._border = lower + NEARER * (upper - lower)
        return lower, upper

    def _expected(self, columns: Tensor) -> Tensor:
        """The expected scores of records."""
        return columns @ self._regression.coefficients(torch.cat([self._better, self._worse]))

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, what was learned, and the settings that must be equal on resume."""
        return {
            "kind": type(self).__name__,
            "settings": {
                **self._regression.settings(),
                "order": self.order,
                "explore": self.explore,
                "seed": self.seed,
            },
            "calls": self._calls,
            "learned": self._regression.learned.state_dict(),
            "kinds": {
                "vetoes": self.vetoes,
                "border": self._border,
                **{name: getattr(self, f"_{name}") for name in _REMEMBERED_PARTS},
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :class:`Proposal`."""
        mine = self.state_dict()
        check_state(state_dict, mine)
        kinds = state_dict["kinds"]
        if kinds.keys() != mine["kinds"].keys():
            raise ValueError(
                f"Expected what is known of kinds as {', '.join(mine['kinds'])}, got {', '.join(kinds)}: the state of "
                "another release. Begin anew."
            )
        parts = {
            name: torch.as_tensor(kinds[name], dtype=torch.float64, device="cpu").clone() for name in _REMEMBERED_PARTS
        }
        width = self._better.shape[1]
        for name in ("better", "worse"):
            if not parts[name].numel():
                parts[name] = self._regression.no_columns()  # JSON has no shape of an empty table
            if parts[name].ndim != 2 or parts[name].shape[1] != width:
                raise ValueError(
                    f"Expected {width} columns of each remembered record, got shape {tuple(parts[name].shape)}."
                )
        calls, vetoes, border = int(state_dict["calls"]), bool(kinds["vetoes"]), float(kinds["border"])
        self._regression.learned.load_state_dict(state_dict["learned"])
        self._calls, self.vetoes, self._border = calls, vetoes, border
        for name, part in parts.items():
            setattr(self, f"_{name}", part)


_REMEMBERED_PARTS = ("better", "worse", "better_scores", "worse_scores")


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
