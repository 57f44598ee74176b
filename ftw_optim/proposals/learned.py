"""The proposal that learns from the scores of every step which records are worth a pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.drawing import best_and_uniform, salt
from ftw_optim.proposals.features import Features, keys_of, sources_of
from ftw_optim.proposals.interface import (
    Proposal,
    Sample,
    check_count,
    check_explore,
    check_state,
    observed,
)
from ftw_optim.proposals.regression import Regression

_CONSTANT = 0.01  # precision of the constant, relative to ``ridge``: the mean of the scores is learned at once
_EQUAL = 1e-8  # a column with a variance below this part of its mean square is constant


@final
class LearnedProposal(Proposal):
    """The records from which a regression on the scores of earlier candidates promises most.

    A score is the cosine of a candidate's gradient with the target gradient, ``b_i / sqrt(K_ii E)``, which every step
    knows. The regression is a ridge regression on the record's features; the records with the highest expected scores
    are taken, and a share at random, so that what is uncertain is tried as well. Precision is capped by the share of
    useful records times the number read, divided by ``count``: read at least ``count / share``.

    The prior is a guess: that a record scores the higher, the more alike it is to the target rows, by ``prior`` for
    each standard deviation among the records on offer. Observations change its size and its sign.

    Args:
        target_samples: the target rows; None: no likeness and no guess.
        dim: number of columns for the tokens, see :class:`~ftw_optim.proposals.features.Features`. A call costs about
            ``dim ** 3 / 3`` operations, and ``dim`` for each record.
        embedding: shape ``(vocabulary, width)``: features are means of embeddings; None: hashes of the tokens.
        use_source: whether the ``source`` is a feature.
        ridge: number of observations that the prior is worth.
        forgetting: what remains of the weight of earlier observations after a step, in (0, 1].
        explore: share of the candidates drawn uniformly from the rest; where it is no whole number, rounded up or down
            at random.
        explore_by: ``"source"``: every ``source`` is equally likely, where samples name theirs, so that a larger one
            starves none. ``"record"``: every record of the rest is.
        prior: the guess, in the unit of scores.
        thompson: size of the noise in the coefficients, in standard deviations of their posterior; 1: Thompson
            sampling. With the few hundred scores of a short run it hides more than it finds.
        seed: seed of the draws and of the features.

    Raises:
        ValueError: an argument is not as described above.
    """

    def __init__(
        self,
        target_samples: Sequence[Sample] | None = None,
        *,
        dim: int = 256,
        embedding: Tensor | None = None,
        use_source: bool = False,
        ridge: float = 8.0,
        forgetting: float = 0.98,
        explore: float = 0.125,
        explore_by: Literal["record", "source"] = "source",
        prior: float = 0.1,
        thompson: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_explore(explore, explore_by)
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}.")
        if not 0.0 < ridge < math.inf:
            raise ValueError(f"ridge must be positive and finite, got {ridge}: without it few scores fit anything.")
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting must be in (0, 1], got {forgetting}: what remains after a step.")
        if not 0.0 <= prior < math.inf:
            raise ValueError(f"prior must be finite and not negative, got {prior}; 0 guesses nothing.")
        if not 0.0 <= thompson < math.inf:
            raise ValueError(f"thompson must be finite and not negative, got {thompson}; 0 draws nothing.")
        self.thompson = thompson
        self.ridge, self.forgetting, self.prior, self.seed = ridge, forgetting, prior, seed
        self.explore, self.explore_by = explore, explore_by
        self._features = Features(target_samples, dim=dim, seed=seed, embedding=embedding, use_source=use_source)
        self._regression = Regression(
            self.columns(torch.empty(0, self._features.width)).shape[1], forgetting=forgetting
        )
        self._calls = 0
        self.expected: Tensor = torch.empty(0, dtype=torch.float64)
        """The expected scores of the records that the last call chose, in their order."""

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The features of samples, to keep and to pass to :meth:`propose` and :meth:`observe`.

        A row depends on its sample alone.
        """
        return self._features(samples)

    def propose(self, samples: Sequence[Sample], count: int, *, features: Tensor | None = None) -> Tensor:
        """See :class:`Proposal`; with ``features`` the samples themselves are not looked at."""
        check_count(count)
        known = self._features.given(samples, features)
        columns = self.columns(known)
        scores = columns @ self.coefficients(columns) if len(known) else torch.empty(0, dtype=torch.float64)
        chosen = best_and_uniform(
            scores,
            keys_of(known),
            sources_of(known),
            count,
            explore=self.explore,
            explore_by=self.explore_by,
            salt=salt("learned", self.seed, self._calls),
        )
        self._calls += 1
        self.expected = scores[chosen]
        return chosen

    def observe(self, samples: Sequence[Sample], selection: Selection, *, features: Tensor | None = None) -> None:
        """See :class:`Proposal`; candidates without a score, such as rejected ones, teach nothing.

        Neither do those of a selection whose guide is blind or stale, see :class:`Selection`: what was learned before
        stays.
        """
        selection = observed(samples, selection)
        if selection.blind or selection.stale:
            return
        known = self._features.given(samples, features)
        scores, valid = scores_of(selection)
        if bool(valid.any()):
            self._regression.observe(self.columns(known[valid]), scores[valid])

    @property
    def width(self) -> int:
        """The number of features of a record."""
        return self._features.width

    def given(self, samples: Sequence[Sample], features: Tensor | None) -> Tensor:
        """The features of samples: those that the caller has, else computed."""
        return self._features.given(samples, features)

    def columns(self, features: Tensor) -> Tensor:
        """The columns of the regression, float64: a constant, the likeness if there are targets, the other features."""
        first = 3 if self._features.has_targets else 4
        return torch.cat([torch.ones(len(features), 1), features[:, first:]], dim=1).double()

    def coefficients(self, columns: Tensor) -> Tensor:
        """Coefficients of the columns, expected or drawn from the posterior, for the records on offer.

        The prior is one of columns with mean 0 and standard deviation 1 among these records. Token columns are scaled
        together, and so are those of the source, so that the sum of their variances is 1.
        """
        alone = 3 + self._features.has_targets  # columns that are scaled for themselves
        variance, mean = torch.var_mean(columns, 0, correction=0)
        groups = [slice(i, i + 1) for i in range(1, alone)]
        groups += [slice(alone, alone + self._features.dim), slice(alone + self._features.dim, len(mean))]
        scale = torch.ones_like(mean)
        for group in groups:
            spread = float(variance[group].sum())
            if spread > _EQUAL * float(mean[group].square().sum()):
                scale[group] = spread**0.5
        mean[0] = 0.0
        guess = torch.zeros_like(mean)
        guess[1] = self.prior if self._features.has_targets else 0.0
        precision = torch.full_like(mean, self.ridge)
        precision[0] *= _CONSTANT
        generator = torch.Generator().manual_seed(salt("coefficients", self.seed, self._calls))
        noise = self.thompson * torch.randn(len(mean), dtype=torch.float64, generator=generator)
        return self._regression.draw(mean, scale, guess, precision, noise)

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, what was learned, and the settings that must be equal on resume."""
        settings = {
            "ridge": self.ridge,
            "forgetting": self.forgetting,
            "explore": self.explore,
            "explore_by": self.explore_by,
            "prior": self.prior,
            "thompson": self.thompson,
            "seed": self.seed,
            "features": self._features.settings(),
        }
        learned = self._regression.state_dict()
        return {"kind": type(self).__name__, "settings": settings, "calls": self._calls, "learned": learned}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :class:`Proposal`."""
        check_state(state_dict, self.state_dict())
        self._regression.load_state_dict(state_dict["learned"])
        self._calls = state_dict["calls"]


def scores_of(selection: Selection) -> tuple[Tensor, Tensor]:
    """The scores of a step's candidates, float64 ``(n,)``, and which of them have one, bool ``(n,)``."""
    energy = selection.gram.diagonal().double() * selection.target_energy
    scores = selection.cross_gram.double() / energy.sqrt()
    valid = scores.isfinite() & energy.isfinite() & (energy > 0.0)
    valid[selection.rejected] = False
    return scores.clamp(-1.0, 1.0), valid  # a sketch may estimate more than a cosine can be
