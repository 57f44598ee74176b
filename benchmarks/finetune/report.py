"""The results of the comparison: a table for the terminal, ``results.json`` and a picture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .arms import ARMS, Options, Run

REFERENCE = "all_n"  # the arm that the others are measured against
PICTURED = "keep_k"  # the arm whose picks are shown
_SOURCES_SHOWN = 6
_COLOURS = dict(zip(ARMS, matplotlib.color_sequences["tab10"], strict=False))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was asked, measured and found.

    Attributes:
        arguments: the command line, defaults included.
        hardware: where it ran, and with which versions.
        sizes: parameters and records.
        options: what all arms had in common.
        validation_losses: by arm and learning rate, after a whole run; what the learning rate was chosen by.
        runs: each arm at its best learning rate, for every seed.
        offered: by seed and step, how many candidates each source had in the stream.
    """

    arguments: Mapping[str, Any]
    hardware: Mapping[str, Any]
    sizes: Mapping[str, int]
    options: Options
    validation_losses: Mapping[str, Mapping[float, float]]
    runs: list[Run]
    offered: Mapping[int, list[Counter[str]]]

    def runs_of(self, arm: str) -> list[Run]:
        """The runs of one arm, in the order of the seeds."""
        return [run for run in self.runs if run.arm == arm]

    def at_edge(self, arm: str) -> bool:
        """Whether the best learning rate of an arm is the least or the greatest of the grid."""
        grid = self.validation_losses[arm]
        return self.runs_of(arm)[0].lr in (min(grid), max(grid))


def first_reached(x: list[float], losses: list[float], level: float) -> float:
    """The place where a curve first falls to ``level``, linear between evaluations; infinite if it never does."""
    for at, loss in enumerate(losses):
        if loss <= level:
            if at == 0:
                return float(x[0])
            share = (losses[at - 1] - level) / (losses[at - 1] - loss)
            return x[at - 1] + share * (x[at] - x[at - 1])
    return float("inf")


def rows_of(report: Report) -> dict[str, dict[str, float]]:
    """The figures of the table, by arm: medians over the seeds, beside the reference of the same seed."""
    rows = {}
    steps = report.arguments["steps"]
    references = report.runs_of(REFERENCE)
    for arm, (_, _, per_step) in ARMS.items():
        runs = report.runs_of(arm)
        pairs = list(zip(runs, references, strict=True))
        final = [run.losses[-1] for run in runs]
        seconds = median(run.seconds[-1] for run in runs)
        candidates, target = per_step(report.options)
        rows[arm] = {
            "lr": runs[0].lr,
            "loss": median(final),
            "least": min(final),
            "greatest": max(final),
            "candidates": steps * candidates,
            "target": steps * target,
            "seconds": seconds,
            "ms_per_step": 1000 * seconds / steps,
            "loss_at_reference_time": median(
                float(np.interp(reference.seconds[-1], run.seconds, run.losses)) for run, reference in pairs
            ),
            "steps_to_reference": median(
                first_reached([float(step) for step in run.steps], run.losses, reference.losses[-1])
                for run, reference in pairs
            ),
            "seconds_to_reference": median(
                first_reached(run.seconds, run.losses, reference.losses[-1]) for run, reference in pairs
            ),
        }
    return rows


def print_table(report: Report) -> None:
    """The table, with what was run above it and what is counted below it."""
    options, sizes, machine = report.options, report.sizes, report.hardware
    steps, seeds, start = report.arguments["steps"], len(report.offered), report.runs[0].losses[0]
    grid = ", ".join(f"{lr:g}" for lr in report.arguments["lrs"])
    print(
        f"\n{machine['device']}, {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"commit {machine['commit']}\n"
        f"{sizes['trained']:,} of {sizes['parameters']:,} parameters trained, float32, no dropout; "
        f"{steps} steps, n = {options.candidates}, k = {options.keep}\n"
        f"Records: target {sizes['target']}, validation {sizes['validation']}, test {sizes['test']}; "
        f"{sizes['skipped']} skipped. Seeds: {seeds}. Test loss at the start {start:.3f}\n"
    )
    print(f"{'':21}{'best':>8}{'test loss':^23}{'gradients of':^14}{'':7}{'ms per':>7}{'beside AdamW, all n':>20}")
    print(
        f"{'arm':21}{'lr':>8}{'median  [range]':^23}{'cand.':>7}{'target':>7}{'s':>7}{'step':>7}"
        f"{'loss':>7}{'steps':>6}{'s':>7}"
    )
    for arm, row in rows_of(report).items():
        print(
            f"{ARMS[arm].label:21}{row['lr']:>8g}{'*' if report.at_edge(arm) else ' '}"
            f"{row['loss']:7.3f} [{row['least']:.3f}-{row['greatest']:.3f}]"
            f"{row['candidates']:>6.0f}{row['target']:>7.0f}{row['seconds']:>7.1f}{row['ms_per_step']:>7.0f}"
            f"{row['loss_at_reference_time']:>7.3f}{_or_dash(row['steps_to_reference'], 0):>6}"
            f"{_or_dash(row['seconds_to_reference'], 1):>7}"
        )
    print(
        f"\nlr: best of {grid} on the validation part of the target, first seed; * at the edge of the grid.\n"
        "Loss: mean over the test records of their mean token loss, responses only. Gradients: how many\n"
        "examples had theirs formed. s: training steps alone, without evaluation. Beside AdamW, all n: the\n"
        "loss when that arm had ended, and steps and seconds until its final loss (-: not reached)."
    )


def _or_dash(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def write_results(report: Report, directory: Path) -> None:
    """``results.json``: everything in the report, and the figures of the table."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "arguments": report.arguments,
        "hardware": report.hardware,
        "sizes": report.sizes,
        "table": rows_of(report),
        "validation_losses": report.validation_losses,
        "runs": [asdict(run) | {"picks": [pick._asdict() for pick in run.picks]} for run in report.runs],
        "offered": report.offered,
    }
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False)
    (directory / "results.json").write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """The content with None in place of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_picture(report: Report, directory: Path) -> None:
    """``finetune.png``: test loss against steps and against seconds, and the sources picked over time."""
    directory.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    by_steps, by_seconds, by_source = figure.subplots(1, 3)
    for arm in ARMS:
        runs = report.runs_of(arm)
        losses = np.array([run.losses for run in runs])
        seconds = np.median([run.seconds for run in runs], axis=0)
        for axes, x in ((by_steps, runs[0].steps), (by_seconds, seconds)):
            axes.plot(x, np.median(losses, axis=0), color=_COLOURS[arm], label=ARMS[arm].label)
            axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=_COLOURS[arm], alpha=0.15)
    by_steps.set(xlabel="steps", ylabel="test loss on the target (median and range of the seeds)")
    by_seconds.set(xlabel="seconds of training")
    by_steps.legend(fontsize="small")
    _draw_sources(by_source, report)
    figure.savefig(directory / "finetune.png", dpi=120)


def _draw_sources(axes: Axes, report: Report) -> None:
    """Means over the seeds of the weight that each source got, and of its share of what was offered."""
    runs = report.runs_of(PICTURED)
    steps = report.arguments["steps"]
    total: Counter[str] = Counter()
    for run in runs:
        for pick in run.picks:
            total.update(pick.shares)
    shown = [source for source, _ in total.most_common(_SOURCES_SHOWN)]
    taken = np.array([[[pick.shares.get(source, 0.0) for source in shown] for pick in run.picks] for run in runs]).mean(
        axis=0
    )
    offered = (
        np.array([[[counts[source] for source in shown] for counts in report.offered[run.seed]] for run in runs]).mean(
            axis=0
        )
        / report.options.candidates
    )
    window = max(1, steps // 6)
    x = np.arange(steps - window + 1) + (window + 1) / 2
    averaged = np.ones(window) / window
    for at, source in enumerate([*shown, "all others"]):
        took = taken[:, at] if at < len(shown) else 1 - taken.sum(axis=1)
        had = offered[:, at] if at < len(shown) else 1 - offered.sum(axis=1)
        colour = "grey" if at == len(shown) else f"C{at}"
        axes.plot(x, np.convolve(took, averaged, mode="valid"), color=colour, label=source)
        axes.plot(x, np.convolve(had, averaged, mode="valid"), color=colour, linestyle=":")
    axes.set(
        xlabel=f"steps (running mean of {window})",
        ylabel="share of the weight (dotted: of what was offered)",
        title=f"sources picked by: {ARMS[PICTURED].label}",
        ylim=(0, None),
    )
    axes.legend(fontsize="small")
