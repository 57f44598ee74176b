"""The numbers of a report, from one pass over a selection log; memory grows only with the bins and the ids."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import final

from ftw_optim.report._samples import UNNAMED, Example, Samples
from ftw_optim.selection_log import Cost, LoggedRun, cost_of
from ftw_optim.selection_log._store import Row

MOST_BINS = 120
SOURCES_SHOWN = 8
_REALISED = re.compile(r"(^|[/._ ])reali[sz]ed_decrease$")
_PHASE = re.compile(r"(^|[/._ ])ms(?=[/._ ]|$)")

Series = list[float | None]  # one value for each bin; None where there was nothing to average


@final
class _Mean:
    """A mean for each bin over the values that are not None."""

    def __init__(self, bins: int) -> None:
        self._sums, self._counts = [0.0] * bins, [0] * bins

    def add(self, at: int, value: float | None) -> None:
        if value is not None:
            self._sums[at] += value
            self._counts[at] += 1

    def series(self) -> Series:
        return [total / count if count else None for total, count in zip(self._sums, self._counts, strict=True)]


@final
@dataclass(kw_only=True)
class SourceTotals:
    """The totals of one source over the whole run."""

    offered: int = 0
    kept: int = 0
    weight: float = 0.0
    utility: float = 0.0
    utilities: int = 0


@final
@dataclass(kw_only=True)
class Digest:
    """The numbers that a page shows.

    Attributes:
        steps, candidates: their numbers over the whole run.
        edges: first and last step of each bin.
        offered, weight: for each source, its share of the candidates and of the weight in each bin; shares sum to one.
        utility: for each source, the mean utility in each bin.
        curves: for each named quantity of a selection, the mean over the steps of each bin.
        metrics: for each of the user's metrics, the mean over the steps of each bin.
        phases: for each phase, the mean milliseconds of a step in each bin.
        skipped, rejected: counts in each bin.
        shares: for each kept candidate, its share of the weight of its step.
        totals: the totals of every source, without joining small ones to "other sources".
        most, least: the most and the least useful samples.
        has_texts: whether the log has texts of samples.
        samples: sums for each sample.
        cost: what the selections cost, in seconds.
    """

    steps: int
    candidates: int
    edges: list[tuple[int, int]]
    offered: dict[str, Series] = field(default_factory=dict)
    weight: dict[str, Series] = field(default_factory=dict)
    utility: dict[str, Series] = field(default_factory=dict)
    curves: dict[str, Series] = field(default_factory=dict)
    metrics: dict[str, Series] = field(default_factory=dict)
    phases: dict[str, Series] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    shares: array[float] = field(default_factory=lambda: array("d"))
    totals: dict[str, SourceTotals] = field(default_factory=dict)
    most: list[Example] = field(default_factory=list)
    least: list[Example] = field(default_factory=list)
    has_texts: bool = False
    samples: Samples = field(default_factory=Samples)
    cost: Cost = field(default_factory=Cost)


def digest(run: LoggedRun, *, progress: Callable[[float], None] = lambda share: None) -> Digest:
    """The numbers that a page shows about a run.

    Args:
        run: the run, as :func:`read_log` returns it.
        progress: called with the share that is done, every thousand steps.
    """
    steps = run.steps
    bins = min(MOST_BINS, len(steps))
    of_step = {row["step"]: index * bins // len(steps) for index, row in enumerate(steps)}
    edges: list[tuple[int, int]] = []
    for _, binned in groupby(steps, key=lambda row: of_step[row["step"]]):
        several = [row["step"] for row in binned]
        edges.append((several[0], several[-1]))
    found = Digest(steps=len(steps), candidates=sum(row["offered"] for row in steps), edges=edges, cost=cost_of(run))
    _step_curves(found, steps, of_step)
    samples = found.samples
    offered: dict[str, list[int]] = defaultdict(lambda: [0] * bins)
    weight: dict[str, list[float]] = defaultdict(lambda: [0.0] * bins)
    utility: dict[str, _Mean] = defaultdict(lambda: _Mean(bins))
    losses = {name: _Mean(bins) for name in ("loss, offered", "loss, by weight")}
    for done, (step, rows) in enumerate(_by_step(run)):
        if step not in of_step:
            continue
        if done % 1000 == 0:
            progress(done / len(steps))
        at = of_step[step]
        total = sum(row["weight"] or 0.0 for row in rows)
        sizes = [abs(row["utility"]) for row in rows if row["utility"] is not None]
        size = sum(sizes) / len(sizes) if sizes else 0.0
        finite = [row for row in rows if row["loss"] is not None]
        if finite:
            losses["loss, offered"].add(at, sum(row["loss"] for row in finite) / len(finite))
        if total and all(row["loss"] is not None for row in rows if row["weight"]):
            losses["loss, by weight"].add(at, sum(row["loss"] * row["weight"] for row in rows if row["weight"]) / total)
        for row in rows:
            source = row["source"] or UNNAMED
            share = (row["weight"] or 0.0) / total if total else 0.0
            offered[source][at] += 1
            weight[source][at] += share
            utility[source].add(at, row["utility"])
            of_source = found.totals.setdefault(source, SourceTotals())
            of_source.offered += 1
            of_source.weight += share
            if row["utility"] is not None:
                of_source.utility += row["utility"]
                of_source.utilities += 1
            if share:
                of_source.kept += 1
                found.shares.append(share)
            samples.add(row, share, row["utility"] / size if size and row["utility"] is not None else None)
    found.curves |= {name: mean.series() for name, mean in losses.items()}
    found.totals = dict(sorted(found.totals.items(), key=lambda item: -item[1].offered))
    _share_out(found, offered, weight, utility)
    found.most, found.least, found.has_texts = samples.extremes(run)
    return found


def _by_step(run: LoggedRun) -> Iterator[tuple[int, list[Row]]]:
    return ((step, list(rows)) for step, rows in groupby(run.candidates(), key=lambda row: row["step"]))


def _step_curves(found: Digest, steps: Sequence[Row], of_step: dict[int, int]) -> None:
    bins = len(found.edges)
    curves: dict[str, _Mean] = defaultdict(lambda: _Mean(bins))
    metrics: dict[str, _Mean] = defaultdict(lambda: _Mean(bins))
    phases: dict[str, _Mean] = defaultdict(lambda: _Mean(bins))
    found.skipped, found.rejected = [0] * bins, [0] * bins
    for row in steps:
        at = of_step[row["step"]]
        for name in ("kept", "offered", "effective_size", "residual", "cosine", "predicted_decrease"):
            curves[name].add(at, row[name])
        for name, value in row["metrics"].items():
            (curves["realised_decrease"] if _REALISED.search(name) else metrics[name]).add(at, value)
        for name, value in row["ms"].items():
            phases[_PHASE.sub("", name).strip("/._ ") or name].add(at, value)
        found.skipped[at] += row["skipped"]
        found.rejected[at] += len(row["rejected"])
    found.curves = {name: mean.series() for name, mean in curves.items()}
    found.metrics = {name: mean.series() for name, mean in metrics.items()}
    found.phases = {name: mean.series() for name, mean in phases.items()}


def _share_out(
    found: Digest, offered: dict[str, list[int]], weight: dict[str, list[float]], utility: dict[str, _Mean]
) -> None:
    """Fill in the shares of the largest sources in each bin, and those of all others together."""
    totals = found.totals
    everything = max(1.0, sum(one.weight for one in totals.values()))
    ranked = sorted(
        totals, key=lambda name: -(totals[name].offered / found.candidates + totals[name].weight / everything)
    )
    shown = ranked if len(ranked) <= SOURCES_SHOWN else ranked[: SOURCES_SHOWN - 1]
    others = [name for name in ranked if name not in shown]
    groups = {name: [name] for name in shown}
    if others:
        groups[f"{len(others)} other sources"] = others
    counts: list[float] = [sum(bins) for bins in zip(*offered.values(), strict=True)]
    weights = [sum(bins) for bins in zip(*weight.values(), strict=True)]
    for label, names in groups.items():
        found.offered[label] = _shares([offered[name] for name in names], counts)
        found.weight[label] = _shares([weight[name] for name in names], weights)
        if len(names) == 1:
            found.utility[label] = utility[names[0]].series()


def _shares(parts: Sequence[Sequence[float]], totals: Sequence[float]) -> Series:
    return [
        sum(values) / total if total else None for values, total in zip(zip(*parts, strict=True), totals, strict=True)
    ]


def histogram(values: array[float], *, bins: int = 24) -> tuple[list[float], Counter[int]]:
    """The ``bins + 1`` edges from zero to the largest value, and the number of values in each bin."""
    top = max(values, default=0.0) or 1.0
    counts = Counter(min(bins - 1, int(value / top * bins)) for value in values)
    return [top * i / bins for i in range(bins + 1)], counts


def only_numbers(series: Series) -> list[float]:
    """The values of a series that are not None."""
    return [value for value in series if value is not None]
