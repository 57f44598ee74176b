"""The table: losses of every arm, paired differences to the baseline of its family, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .arms import ARMS, BASELINES
from .damage import MARK
from .runs import Run

DRAWS = 4000


def paired_difference(losses: Tensor, baseline: Tensor, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, ...]:
    """Mean of ``losses - baseline``, and the 2.5 and 97.5 % quantiles of its bootstrap.

    A draw takes as many seeds and as many rows as there are, each with replacement, and the same rows for all seeds:
    what is claimed is claimed of other rows and other seeds. With one seed the interval is that of rows alone.

    Args:
        losses: shape ``(seeds, rows)``, loss of each test row.
        baseline: of the same seeds and rows.
        draws: number of draws.
        seed: of the draws.
    """
    difference = (losses - baseline).double()
    seeds, rows = difference.shape
    generator = torch.Generator().manual_seed(seed)
    # How often each is drawn, so that the means of all draws are two products.
    drawn_seeds = torch.randint(seeds, (draws, seeds), generator=generator)
    drawn_rows = torch.randint(rows, (draws, rows), generator=generator)
    of_seeds = torch.zeros(draws, seeds, dtype=torch.float64).scatter_add_(
        1, drawn_seeds, torch.ones(draws, seeds, dtype=torch.float64)
    )
    of_rows = torch.zeros(draws, rows, dtype=torch.float64).scatter_add_(
        1, drawn_rows, torch.ones(draws, rows, dtype=torch.float64)
    )
    means = ((of_seeds @ difference) * of_rows).sum(dim=1) / (seeds * rows)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(difference.mean()), low, high


def first_reached(x: Sequence[float], losses: Sequence[float], level: float) -> float:
    """The place where a curve first falls to ``level``, linear between evaluations; infinite if it never does."""
    for at, loss in enumerate(losses):
        if loss <= level:
            if at == 0:
                return float(x[0])
            share = (losses[at - 1] - level) / (losses[at - 1] - loss)
            return x[at - 1] + share * (x[at] - x[at - 1])
    return math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Figures:
    """The figures of one arm: means over seeds.

    Attributes:
        curve: test loss at the start and at each evaluation.
        seconds: seconds until then, trunk included, at the pace of the calibration.
        difference: of the final test loss to the baseline of the family, with its interval; empty for the baseline.
        stopped: test loss where the validation loss was least, and the steps until then.
        pool: loss of the held-out pool rows at the end.
        to_baseline: steps and seconds until the baseline's final loss; infinite where it is not reached.
        rows: candidates and target rows that took part.
        own: share of the candidates from the target's own source, and their share of the weight.
        damaged: the same of candidates that are damaged.
    """

    arm: str
    lr: float
    steps: int
    seeds: int
    at: list[int]
    curve: list[float]
    seconds: list[float]
    difference: tuple[float, ...]
    stopped: tuple[float, float]
    pool: float
    to_baseline: tuple[float, float]
    rows: tuple[int, int]
    own: tuple[float, float]
    damaged: tuple[float, float]

    def at_share(self, share: float) -> float:
        """The test loss at the first evaluation after a share of the budget."""
        return next(loss for step, loss in zip(self.at, self.curve, strict=True) if step >= share * self.steps)


def figures_of(
    runs: Mapping[str, Sequence[Run]],
    zero_shot: Mapping[str, Sequence[float]],
    calibration: Mapping[str, float],
    *,
    own_source: str = "",
    baselines: Mapping[str, str] = BASELINES,
) -> list[Figures]:
    """The figures of every arm; ``runs`` are those of each arm by seed, ``own_source`` a prefix of sources.

    Differences are to the arm's family's baseline, over the seeds that both have.
    """
    start = _mean(zero_shot["test"])
    found = []
    for name, of_arm in runs.items():
        family = ARMS[name.split(":")[0]].family
        baseline = runs.get(baselines[family], ())
        final = {run.seed: run.test[-1] for run in baseline}
        shared = [run for run in of_arm if run.seed in final]
        difference: tuple[float, ...] = ()
        to_baseline = (math.inf, math.inf)
        at = [0, *of_arm[0].at]
        curve, seconds = curve_of(of_arm, start, calibration)
        if shared:
            others = [final[run.seed] for run in shared]
            level = _mean(list(map(_mean, others)))
            to_baseline = first_reached(at, curve, level), first_reached(seconds, curve, level)
            if name != baselines[family]:
                difference = paired_difference(torch.tensor([run.test[-1] for run in shared]), torch.tensor(others))
        stopped = [_stopped(run, zero_shot) for run in of_arm]
        found.append(
            Figures(
                arm=name,
                lr=of_arm[0].lr,
                steps=of_arm[0].steps,
                seeds=len(of_arm),
                at=at,
                curve=curve,
                seconds=seconds,
                difference=difference,
                stopped=(_mean([loss for loss, _ in stopped]), _mean([step for _, step in stopped])),
                pool=_mean([_mean(run.pool) for run in of_arm]),
                to_baseline=to_baseline,
                rows=tuple(of_arm[0].rows[-1]),
                own=_share(of_arm, lambda source: source.startswith(own_source)),
                damaged=_share(of_arm, lambda source: source.endswith(MARK)),
            )
        )
    return found


def curve_of(runs: Sequence[Run], start: float, calibration: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """Test loss and seconds, means over some seeds of an arm: at the start, and at each evaluation."""
    losses = [_mean([_mean(run.test[place]) for run in runs]) for place in range(len(runs[0].at))]
    seconds = map(_mean, zip(*(charged_seconds(run, calibration) for run in runs), strict=True))
    return [start, *losses], [0.0, *seconds]


def charged_seconds(run: Run, calibration: Mapping[str, float]) -> list[float]:
    """The seconds of a run at its evaluations: those of its steps at the calibration's pace, and the trunk's.

    A machine that is slower for a while, because others use its caches, is slower at the fixed small step as well.
    """
    scale = calibration["pace"] / median(run.paces)
    trunk = calibration["trunk_seconds_per_token"]
    return [own * scale + tokens * trunk for own, tokens in zip(run.seconds, run.run_tokens, strict=True)]


def _share(runs: Sequence[Run], counts: Callable[[str], bool]) -> tuple[float, float]:
    """Share of the candidates whose source counts, and their share of the weight."""
    found = []
    for place in (0, 1):
        total = sum(values[place] for run in runs for values in run.sources.values())
        own = sum(values[place] for run in runs for source, values in run.sources.items() if counts(source))
        found.append(own / total if total else 0.0)
    return found[0], found[1]


def _stopped(run: Run, zero_shot: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Test loss and step at the least validation loss, the start included."""
    points = [(_mean(zero_shot["validation"]), _mean(zero_shot["test"]), 0)]
    points += [(value, _mean(rows), at) for value, rows, at in zip(run.validation, run.test, run.at, strict=True)]
    _, loss, step = min(points, key=lambda point: point[0])
    return loss, step


def table(
    figures: Sequence[Figures],
    zero_shot: Mapping[str, Sequence[float]],
    *,
    own_source: str = "",
    baselines: Mapping[str, str] = BASELINES,
) -> str:
    """The table and its legend, in lines of at most 120 characters."""
    spoiled = any(one.damaged[0] for one in figures)
    lines = [
        _line(
            *("", "", "", "test loss after", "", "", "", "best", "", "s per", "rows", "baseline in", "", "own"),
            "dam." if spoiled else "",
        ),
        _line(
            *("arm", "lr", "steps", "1/4", "1/2", "end", "beside baseline", "valid.", "pool", "step", "used"),
            *("steps", "s", "src"),
        ),
        _line("zero-shot", end=f"{_mean(zero_shot['test']):.3f}", pool=f"{_mean(zero_shot['pool_test']):.3f}"),
    ]
    for family in BASELINES:
        of_family = [one for one in figures if ARMS[one.arm.split(":")[0]].family == family]
        title = f"{_FAMILIES[family]} (baseline: {ARMS[baselines[family]].label}):"
        lines += ["", title] * bool(of_family)
        for one in of_family:
            mean, low, high = one.difference or (math.nan,) * 3
            lines.append(
                _line(
                    ARMS[one.arm.split(":")[0]].label,
                    f"{one.lr:g}",
                    str(one.steps),
                    *(f"{loss:.3f}" for loss in (one.at_share(0.25), one.at_share(0.5), one.curve[-1])),
                    f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if one.difference else "",
                    f"{one.stopped[0]:.3f}",
                    f"{one.pool:.3f}",
                    f"{one.seconds[-1] / one.steps:.2f}",
                    str(sum(one.rows)),
                    *(f"{value:.0f}" if math.isfinite(value) else "-" for value in one.to_baseline),
                    f"{100 * one.own[0]:.0f}%" if own_source else "",
                    f"{100 * one.damaged[1]:.0f}%" if spoiled else "",
                )
            )
    return "\n".join([*lines, "", LEGEND])


def _line(
    arm: str,
    lr: str = "",
    steps: str = "",
    quarter: str = "",
    half: str = "",
    end: str = "",
    difference: str = "",
    stopped: str = "",
    pool: str = "",
    per_step: str = "",
    rows: str = "",
    steps_to: str = "",
    seconds_to: str = "",
    own: str = "",
    damaged: str = "",
) -> str:
    # The two headings that span columns start at the first of them.
    if quarter == "test loss after":
        losses, to = f"{quarter:>18}", f" {steps_to:>11}"
    else:
        losses, to = f"{quarter:>6}{half:>6}{end:>6}", f"{steps_to:>6}{seconds_to:>6}"
    whole = f"{arm:19}{lr:>6}{steps:>6}{losses} {difference:^24}{stopped:>7}{pool:>6}{per_step:>6}{rows:>5}{to}{own:>5}"
    return f"{whole}{damaged:>5}".rstrip()


def as_json(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """The figures as JSON can hold them."""
    return [
        {**vars(one), "to_baseline": [value if math.isfinite(value) else None for value in one.to_baseline]}
        for one in figures
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_FAMILIES = {
    "guide": "target rows guide only",
    "target": "target rows in the step",
}

LEGEND = """\
Test loss: mean over test rows of their mean token loss, and over seeds. Beside baseline: paired difference of the final
loss, and the 95 % interval of its bootstrap over rows and seeds. Best valid.: test loss where the validation rows' loss
was least. Pool: loss of held-out pool rows at the end. s: of the steps alone, the trunk at its calibrated cost.
Rows used: candidates and target rows that took part. Baseline in: until the baseline's final loss (-: not reached).
Own src: share of the candidates from the target's own source. Dam.: the damaged candidates' share of the weight."""
