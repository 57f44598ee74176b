"""Sums for each sample of a run: its utility, its weight, and how often it was seen."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from ftw_optim.selection_log import LoggedRun
from ftw_optim.selection_log._store import Row

EXAMPLES_SHOWN = 10
UNNAMED = "(no source)"


@final
@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample, over all the steps at which it was offered.

    Attributes:
        score: mean of the sample's utility relative to the mean size of utilities at the step. One offer with utility
            zero is added, so that samples seen once do not take all places.
        share: mean share of the weight at the sample's steps.
    """

    id: str
    source: str
    score: float
    share: float
    offered: int
    kept: int
    text: str | None


@final
class Samples:
    """Sums for each sample id, in arrays: a run may see millions of samples."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._sources: list[str] = []
        self._scores, self._shares = array("d"), array("d")
        self._scored, self._offered, self._kept = array("l"), array("l"), array("l")

    def add(self, row: Row, share: float, score: float | None) -> None:
        at = self._index.setdefault(row["id"], len(self._index))
        if at == len(self._sources):
            self._sources.append(sys.intern(row["source"] or UNNAMED))
            for sums in (self._scores, self._shares, self._scored, self._offered, self._kept):
                sums.append(0)
        self._scores[at] += score or 0.0
        self._scored[at] += score is not None
        self._shares[at] += share
        self._offered[at] += 1
        self._kept[at] += share > 0.0

    def extremes(self, run: LoggedRun) -> tuple[list[Example], list[Example], bool]:
        """The most and the least useful samples, and whether the log has texts."""
        ids = list(self._index)
        scores = list(map(self._score, range(len(ids))))
        ranked = sorted((at for at, count in enumerate(self._scored) if count), key=lambda at: (-scores[at], at))
        most = [at for at in ranked[:EXAMPLES_SHOWN] if scores[at] > 0]
        least = [at for at in reversed(ranked[-EXAMPLES_SHOWN:]) if scores[at] < 0]
        wanted = {ids[at] for at in (*most, *least)}
        texts: dict[str, str] = {}
        any_text = False
        for name, text in run.texts():
            any_text = True
            if name in wanted:
                texts[name] = text

        def example(at: int) -> Example:
            return self._example(at, ids[at], texts.get(ids[at]))

        return [example(at) for at in most], [example(at) for at in least], any_text

    def by_weight(self) -> Iterator[Example]:
        """All samples, those with the largest mean share of the weight first, without their texts."""
        ids = list(self._index)
        ranked = sorted(range(len(ids)), key=lambda at: (-self._shares[at] / self._offered[at], at))
        return (self._example(at, ids[at], None) for at in ranked)

    def _score(self, at: int) -> float:
        return self._scores[at] / (self._scored[at] + 1)

    def _example(self, at: int, name: str, text: str | None) -> Example:
        return Example(
            id=name,
            source=self._sources[at],
            score=self._score(at),
            share=self._shares[at] / self._offered[at],
            offered=self._offered[at],
            kept=self._kept[at],
            text=text,
        )
