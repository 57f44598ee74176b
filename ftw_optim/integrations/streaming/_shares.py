"""Learned shares: sources are drawn by their share of the weight that selections gave them so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from ftw_optim._matching.selection import Selection

Shares = Mapping[str, float]


@final
@dataclass(frozen=True, kw_only=True)
class LearnedShares:
    """The option that the sources' probabilities follow the weight: ``CandidateStream(shares=LearnedShares())``.

    A source is drawn with ``(1 - floor)`` times its share of the weight, averaged over the steps so far, plus ``floor``
    times its given probability. The average forgets: each step counts ``decay`` times as much as the next one, and
    before the first step it is the given probabilities. At rest each source's share of the candidates is, but for the
    floor, its share of the weight: a source whose candidates get more than others gets more candidates.

    Attributes:
        decay: what is left of the average after a step, in [0, 1).
        floor: the part of its given probability that a source keeps, whatever its candidates are worth, in (0, 1].
    """

    decay: float = 0.98
    floor: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}.")
        if not 0.0 < self.floor <= 1.0:
            raise ValueError(f"floor must be in (0, 1], so that no source starves, got {self.floor!r}.")


@final
class SourceShares:
    """The shares of a stream's sources.

    Items that are read ahead are drawn by what was known then. So a position holds the shares for the next item, those
    for items after it that had been drawn already, and last those that hold from then on.

    Args:
        option: how the shares are learned.
        probabilities: the given probabilities, scaled to sum to one here.
    """

    def __init__(self, option: LearnedShares, probabilities: Shares) -> None:
        total = math.fsum(probabilities.values())
        self._option = option
        self._given = {name: one / total for name, one in probabilities.items()}
        self._states: list[Shares] = [self._given]

    def settings(self) -> dict[str, float]:
        """The option, as JSON values."""
        return asdict(self._option)

    def probabilities(self) -> dict[str, float]:
        """The probability of each source in the next item; they sum to one."""
        floor, learned = self._option.floor, self._states[0]
        return {name: (1.0 - floor) * learned[name] + floor * given for name, given in self._given.items()}

    def given_out(self) -> None:
        """Note that an item was drawn: the next one is drawn by the shares of its own, if these are known."""
        if len(self._states) > 1:
            self._states = self._states[1:]

    def observe(self, samples: Sequence[Mapping[str, Any]], selection: Selection) -> None:
        """Learn from a step; one in which nothing has a weight teaches nothing.

        Raises:
            ValueError: there are not as many samples as candidates, or one is of no source.
        """
        if len(samples) != len(selection.losses):
            raise ValueError(
                f"Expected a sample for each of the {len(selection.losses)} candidates of the selection, got "
                f"{len(samples)}: pass those of the whole step, in the order of the closure."
            )
        sources = [sample["source"] for sample in samples]
        if unknown := [source for source in sources if source not in self._given]:
            raise ValueError(f"Expected samples of the sources {', '.join(self._given)}, got one of {unknown[0]!r}.")
        weights = dict.fromkeys(self._given, 0.0)
        for source, weight in zip(sources, selection.spread_weights().tolist(), strict=True):
            weights[source] += weight
        total = math.fsum(weights.values())
        latest = self._states[-1]  # where others were to come, it learned most, and holds from now on
        if total > 0.0 and math.isfinite(total):
            decay = self._option.decay
            latest = {name: decay * latest[name] + (1.0 - decay) * weights[name] / total for name in self._given}
        self._states = [latest]

    def snapshot(self) -> list[Shares]:
        """The position as JSON values, which are never changed afterwards."""
        return list(self._states)

    def restore(self, position: Sequence[Shares]) -> None:
        """Go back to the position of a snapshot."""
        self._states = [dict(state) for state in position]


def shares_of(
    option: LearnedShares | str | None, probabilities: Shares, *, source_field: str | None
) -> SourceShares | None:
    """The shares that an option asks for; None: the sources keep their probabilities.

    Raises:
        TypeError, ValueError: the option is neither ``"learned"`` nor a :class:`LearnedShares`, or the records name
            sources of their own.
    """
    if option is None:
        return None
    option = LearnedShares() if option == "learned" else option
    if not isinstance(option, LearnedShares):
        raise TypeError(f"shares must be None, 'learned' or a LearnedShares, got {option!r}.")
    if source_field is not None:
        raise ValueError(
            f"Expected samples that name the source they are drawn from, but source_field={source_field!r} gives them "
            "the records' own. Leave source_field, or shares."
        )
    return SourceShares(option, probabilities)
