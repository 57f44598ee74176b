"""What records' features let expect of their scores: the regression that proposals learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.features import AT_ONCE, Features
from ftw_optim.proposals.interface import Sample, observed
from ftw_optim.proposals.regression import Regression

_CONSTANT = 0.01  # precision of the constant, relative to ``ridge``: the mean of the scores is learned at once
_EQUAL = 1e-8  # a column with a variance below this part of its mean square is constant
WIDEST = 3.0
"""A gradient counts as no more than ``e ** 3`` times as long, or as short, as those of its step."""


class Told(NamedTuple):
    """What a step told of its candidates, each of shape ``(n,)`` but the first.

    Attributes:
        features: those of the candidates that have a score.
        scores: cosines of their gradients and the target's, float64.
        sizes: logarithms of the lengths of their gradients, relative to the step's root mean square, float64.
    """

    features: Tensor
    scores: Tensor
    sizes: Tensor


@final
class ScoreRegression:
    """A ridge regression of candidates' scores on the features of their records.

    Args:
        target_samples, dim, embedding, use_source, ridge, forgetting, prior: see
            :class:`~ftw_optim.proposals.LearnedProposal`.
        seed: seed of the features.
        by_likeness: whether the likeness to the target rows is a column of the regression.
        plain: see :class:`~ftw_optim.proposals.features.Features`.
        with_sizes: whether the lengths of the gradients are learned as well, of which nothing is guessed.

    Attributes:
        features: describes records.
        learned: what the scores, and the lengths, have taught.

    Raises:
        ValueError: an argument is not as described there.
    """

    def __init__(
        self,
        target_samples: Sequence[Sample] | None,
        *,
        dim: int,
        embedding: Tensor | None,
        use_source: bool,
        ridge: float,
        forgetting: float,
        prior: float,
        seed: int,
        by_likeness: bool = True,
        plain: int = 0,
        with_sizes: bool = False,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}.")
        if not 0.0 < ridge < math.inf:
            raise ValueError(f"ridge must be positive and finite, got {ridge}: without it few scores fit anything.")
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting must be in (0, 1], got {forgetting}: what remains after a step.")
        if not 0.0 <= prior < math.inf:
            raise ValueError(f"prior must be finite and not negative, got {prior}; 0 guesses nothing.")
        self.ridge, self.forgetting, self.prior = ridge, forgetting, prior
        self._by_likeness = by_likeness and target_samples is not None
        self.features = Features(
            target_samples, dim=dim, plain=plain, seed=seed, embedding=embedding, use_source=use_source
        )
        self.learned = Regression(self.width, forgetting=forgetting, responses=1 + with_sizes)

    def columns(self, features: Tensor) -> Tensor:
        """The columns of the regression, float64: a constant, the likeness where it is one, the other features."""
        found = self.features.learned_from(features)
        found = found if self._by_likeness else found[:, 1:]
        return torch.cat([torch.ones(len(features), 1), found], dim=1).double()

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.no_columns().shape[1]

    def no_columns(self) -> Tensor:
        """The columns of no records."""
        return self.columns(torch.empty(0, self.features.width))

    def parts(self, features: Tensor) -> Iterator[Tensor]:
        """The columns of many records, of a few at a time: together they take twice the memory of the features."""
        return (self.columns(part) for part in torch.split(features, AT_ONCE))

    def expected(self, features: Tensor, coefficients: Tensor) -> Tensor:
        """Records' scores, and lengths, by some coefficients of their columns, shape ``(n, responses)`` float64."""
        return torch.cat([columns @ coefficients for columns in self.parts(features)])

    def coefficients(self, parts: Iterable[Tensor], noise: Tensor | None = None) -> Tensor:
        """Coefficients of the columns, expected or drawn from the posterior, for the records on offer.

        Their shape is ``(width, responses)``: of the score, and of the length where that is learned.

        The prior is one of columns with mean 0 and standard deviation 1 among these records. Token columns are scaled
        together, and so are those of the source, so that the sum of their variances is 1.

        Args:
            parts: columns of the records on offer, of some at a time.
            noise: standard normal numbers for the draw, shape ``(width, responses)`` float64; None: the expected ones.
        """
        alone = 3 + self._by_likeness  # columns that are scaled for themselves
        variance, mean = _moments(parts)
        groups = [slice(i, i + 1) for i in range(1, alone)]
        groups += [slice(alone, alone + self.features.dim), slice(alone + self.features.dim, len(mean))]
        scale = torch.ones_like(mean)
        for group in groups:
            spread = float(variance[group].sum())
            if spread > _EQUAL * float(mean[group].square().sum()):
                scale[group] = spread**0.5
        mean[0] = 0.0
        guess = torch.zeros_like(self.learned.cross)
        guess[1, 0] = self.prior if self._by_likeness else 0.0
        precision = torch.full_like(mean, self.ridge)
        precision[0] *= _CONSTANT
        noise = torch.zeros_like(guess) if noise is None else noise
        return self.learned.draw(mean, scale, guess, precision, noise)

    def settings(self) -> dict[str, Any]:
        """The settings that must be equal on resume."""
        return {
            "ridge": self.ridge,
            "forgetting": self.forgetting,
            "prior": self.prior,
            "features": self.features.settings(),
        }

    def told(self, samples: Sequence[Sample], selection: Selection, features: Tensor | None) -> Told | None:
        """What a step told of those of its candidates that have a score; None where there is none.

        Candidates without a score, such as rejected ones, tell nothing; neither do those of a selection whose guide is
        blind or stale, see :class:`Selection`.

        Args:
            samples: the candidates.
            selection: the selection among them.
            features: of the samples, where the caller has them.
        """
        of_all = selection.squares.double()  # of which this process may have few
        selection = observed(samples, selection)
        if selection.blind or selection.stale:
            return None
        squares = selection.squares.double()
        energy = squares * selection.target_energy
        scores = selection.cross_gram.double() / energy.sqrt()
        valid = scores.isfinite() & energy.isfinite() & (energy > 0.0)
        valid[selection.rejected] = False
        known = self.features.given(samples, features)
        if not bool(valid.any()):
            return None
        usual = of_all[of_all.isfinite() & (of_all > 0.0)].mean()
        sizes = (squares[valid] / usual).log() / 2
        # A sketch may estimate more than a cosine can be.
        return Told(known[valid], scores[valid].clamp(-1.0, 1.0), sizes.clamp(-WIDEST, WIDEST))


def _moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The variance and the mean of columns, of which some rows are given at a time."""
    count, spread, mean = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        its_mean = part.mean(0)
        its_spread = (part - its_mean).square_().sum(0)
        before, count = count, count + len(part)
        apart = its_mean - mean
        mean = mean + apart * (len(part) / count)
        spread = spread + its_spread + apart.square() * (before * len(part) / count)
    return spread / count, mean
