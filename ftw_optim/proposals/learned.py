"""The proposal that learns from the scores of every step which records are worth a pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.drawing import apart, best_and_uniform, salt
from ftw_optim.proposals.features import keys_of, sources_of
from ftw_optim.proposals.interface import Proposal, Sample, check_count, check_explore, check_state
from ftw_optim.proposals.scoring import ScoreRegression


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
        if not 0.0 <= thompson < math.inf:
            raise ValueError(f"thompson must be finite and not negative, got {thompson}; 0 draws nothing.")
        self.thompson, self.seed = thompson, seed
        self.explore, self.explore_by = explore, explore_by
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
        self.expected: Tensor = torch.empty(0, dtype=torch.float64)
        """The expected scores of the records that the last call chose, in their order."""

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The features of samples, to keep and to pass to :meth:`propose` and :meth:`observe`.

        A row depends on its sample alone.
        """
        return self._regression.features(samples)

    def propose(self, samples: Sequence[Sample], count: int, *, features: Tensor | None = None) -> Tensor:
        """See :class:`Proposal`; with ``features`` the samples themselves are not looked at."""
        check_count(count)
        known = self._regression.features.given(samples, features)
        scores = torch.empty(0, dtype=torch.float64)
        if len(known):
            scores = self._regression.expected(known, self._coefficients(known))[:, 0]
        chosen = best_and_uniform(
            scores,
            apart(keys_of(known)),
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
        told = self._regression.told(samples, selection, features)
        if told is not None:
            self._regression.learned.observe(self._regression.columns(told.features), told.scores[:, None])

    def _coefficients(self, features: Tensor) -> Tensor:
        """Coefficients for the records on offer, with as much noise as was asked for."""
        generator = torch.Generator().manual_seed(salt("coefficients", self.seed, self._calls))
        noise = self.thompson * torch.randn(self._regression.width, 1, dtype=torch.float64, generator=generator)
        return self._regression.coefficients(self._regression.parts(features), noise)

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, what was learned, and the settings that must be equal on resume."""
        settings = {
            **self._regression.settings(),
            "explore": self.explore,
            "explore_by": self.explore_by,
            "thompson": self.thompson,
            "seed": self.seed,
        }
        learned = self._regression.learned.state_dict()
        return {"kind": type(self).__name__, "settings": settings, "calls": self._calls, "learned": learned}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :class:`Proposal`."""
        check_state(state_dict, self.state_dict())
        self._regression.learned.load_state_dict(state_dict["learned"])
        self._calls = state_dict["calls"]
