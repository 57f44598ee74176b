"""The proposal that leaves out what the scores of the steps so far have shown to be of a worse kind."""

from __future__ import annotations

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
"""Observed records that the kinds are told from."""
LEAST = 16
"""Observed records before two kinds are told apart."""
FEW = 4
"""Scores of each kind before one is left out."""
APART = 3.0
"""Distance of the means of two kinds, in standard deviations within them. What a normal distribution shows, divided at
its best point, is 2.65."""
CERTAIN, DOUBTED = 2.0, 1.0
"""Standard errors between the kinds' mean scores at which the worse one is left out, and at which no longer."""
WORSE = 0.5
"""Mean score of the worse kind, as a share of that of the better one, from which on it is left out."""


@final
class VettedProposal(Proposal):
    """The records most alike to the target rows, but for those that the scores show to be of a worse kind.

    Likeness finds records that *look* like the target and cannot see whether they are any good: a prompt of the right
    kind may have an empty, cut-off or wrong answer. A regression of scores on the record's features, as in
    :class:`LearnedProposal`, sees that after a few steps. What it expects beyond what likeness explains may show two
    kinds of records; where it does, and the lower kind's own scores are certainly lower, records of that kind are left
    out until the scores no longer say so. Where there are no two kinds, nothing is left out and this is
    :class:`SimilarityProposal`: among good records scores are too noisy to choose by.

    Scores are only honest of a target that is not trained on meanwhile, see :class:`~ftw_optim.TargetGradient`.

    Args:
        target_samples: the target rows; None: no likeness.
        order: ``"likeness"``: the most alike first. ``"uniform"``: at random.
        dim, embedding, use_source, ridge, forgetting, prior: of the regression, see :class:`LearnedProposal`.
        explore: share of the candidates that are of the kind left out, by which it is seen whether it is still worse;
            where it is no whole number, rounded up or down at random.
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
        prior: float = 0.1,
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
            prior=prior,
            seed=seed,
        )
        self._calls = 0
        self.vetoes = False
        self._least = 0.0
        self._seen = self._regression.no_columns()
        self._lower = self._upper = torch.empty(0, dtype=torch.float64)

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The features of samples, to keep and to pass to the other calls; a row depends on its sample alone."""
        return self._regression.features(samples)

    def propose(self, samples: Sequence[Sample], count: int, *, features: Tensor | None = None) -> Tensor:
        """See :class:`Proposal`; with ``features`` the samples themselves are not looked at.

        Of the kind that is left out, those come last that exploring asks for; more only where there are no others.
        """
        check_count(count)
        known = self._regression.features.given(samples, features)
        count = min(count, len(known))
        guess = likeness_of(known) if self.order == "likeness" else torch.zeros(len(known), dtype=torch.float64)
        worse = torch.zeros(len(known), dtype=torch.bool)
        if self.vetoes and len(known):
            worse = self._beyond_likeness(self._regression.columns(known)) <= self._least
        draw = salt("vetted", self.seed, self._calls)
        self._calls += 1
        few = min(explored(count, self.explore, draw), int(worse.sum())) if bool(worse.any()) else 0
        few = max(few, count - int((~worse).sum()))
        chosen = []
        for places, number in (((~worse).nonzero()[:, 0], count - few), (worse.nonzero()[:, 0], few)):
            best = best_and_uniform(
                guess[places],
                keys_of(known)[places],
                sources_of(known)[places],
                number,
                explore=0.0,
                explore_by="record",
                salt=draw,
            )
            chosen.append(places[best])
        return torch.cat(chosen)

    def observe(self, samples: Sequence[Sample], selection: Selection, *, features: Tensor | None = None) -> None:
        """See :class:`Proposal`; as for :class:`LearnedProposal`, a guide that is blind or stale teaches nothing."""
        told = self._regression.told(samples, selection, features)
        if told is None:
            return
        columns, scores = told
        if len(self._seen) >= LEAST:
            # Said before these scores are learned: a regression would find two kinds in any noise that it has seen.
            worse = self._beyond_likeness(columns) <= self._least
            self._lower = torch.cat([self._lower, scores[worse]])[-(REMEMBERED // 2) :]
            self._upper = torch.cat([self._upper, scores[~worse]])[-(REMEMBERED // 2) :]
        self._regression.learned.observe(columns, scores)
        self._remember(columns)
        if len(self._seen) >= LEAST:
            self._judge()

    def _remember(self, columns: Tensor) -> None:
        """Keep the latest records; while a kind is left out, as many of each kind as when it was found.

        Of the kind left out few come after that, and both must stay in sight.
        """
        before = len(self._seen)
        self._seen = torch.cat([self._seen, columns])
        if len(self._seen) <= REMEMBERED:
            return
        keep = torch.arange(len(self._seen) - REMEMBERED, len(self._seen))
        if self.vetoes:
            worse = self._beyond_likeness(self._seen) <= self._least
            share = float(worse[:before].double().mean())
            room = round(min(max(share, 1 / 6), 5 / 6) * REMEMBERED)
            lower, upper = worse.nonzero()[:, 0], (~worse).nonzero()[:, 0]
            keep = torch.cat([lower[-room:], upper[room - REMEMBERED :]]).sort().values
        self._seen = self._seen[keep]

    def _judge(self) -> None:
        """Decide whether there are two kinds, of which one is to be left out."""
        self._least, apart = two_kinds(self._beyond_likeness(self._seen))
        lower, upper = self._lower, self._upper
        if min(len(lower), len(upper)) < FEW:
            return
        gap = float(upper.mean() - lower.mean())
        error = float((lower.var() / len(lower) + upper.var() / len(upper)).sqrt())
        if self.vetoes:
            self.vetoes = gap > DOUBTED * error
        else:
            worse = float(lower.mean()) < WORSE * float(upper.mean())
            self.vetoes = apart > APART and gap > CERTAIN * error and worse

    def _beyond_likeness(self, columns: Tensor) -> Tensor:
        """The expected scores of records but for what the regression takes from their likeness."""
        coefficients = self._regression.coefficients(self._seen)
        if self._regression.features.has_targets:
            coefficients[1] = 0.0
        return columns @ coefficients

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
                "least": self._least,
                "seen": self._seen,
                "lower": self._lower,
                "upper": self._upper,
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :class:`Proposal`."""
        check_state(state_dict, self.state_dict())
        kinds = state_dict["kinds"]
        seen, lower, upper = (
            torch.as_tensor(kinds[key], dtype=torch.float64, device="cpu") for key in ("seen", "lower", "upper")
        )
        if seen.ndim != 2 or seen.shape[1] != self._seen.shape[1]:
            raise ValueError(
                f"Expected {self._seen.shape[1]} columns of each remembered record, got shape {tuple(seen.shape)}."
            )
        self._regression.learned.load_state_dict(state_dict["learned"])
        self._calls, self.vetoes, self._least = state_dict["calls"], bool(kinds["vetoes"]), float(kinds["least"])
        self._seen, self._lower, self._upper = seen.clone(), lower.clone(), upper.clone()


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
    apart = (high[at] - low[at]) / within.clamp(min=torch.finfo(within.dtype).tiny).sqrt()
    return float((ordered[last] + ordered[last + 1]) / 2), float(apart)
