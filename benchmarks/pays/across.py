"""The table of several settings: what each arm comes to in each of them, and beside one arm."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .arms import ARMS
from .report import paired_difference
from .runs import Run

TEST_LOSS, EXACT = "final test loss", "share of test rows whose response is decoded exactly"
LEGEND = """\
Of each arm: {measure}, the mean over seeds (in brackets: how many), and the mean paired difference to {beside},
over the seeds that both have; * where the 95 % interval of its bootstrap over rows and seeds is on one side of zero."""


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of results of pays.py")
    parser.add_argument(
        "--beside", default="adamw-n", metavar="ARM", help="that others are compared with (%(default)s)"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="in this order; default: all that were run")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="of these alone; default: all")
    parser.add_argument(
        "--exact", action="store_true", help="share of test rows whose response is decoded exactly, not their loss"
    )
    parser.add_argument("--intervals", action="store_true", help="print them, not only on which side of zero they are")
    options = parser.parse_args(arguments)
    for name in [options.beside, *(options.arms or [])]:
        if name not in ARMS:
            parser.error(f"{name!r} is not one of {', '.join(ARMS)}")
    for folder in options.folders:
        if not any(folder.glob("runs/*.json")):
            parser.error(f"{folder} has no results of pays.py in its folder runs")
    return options


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> str:
    """Prints the table."""
    options = parse_arguments(arguments, description=description)
    found = {folder.name: runs_in(folder, options.seeds) for folder in options.folders}
    wanted = options.arms or [name for name in ARMS if any(name in runs for runs in found.values())]
    text = table(found, wanted, beside=options.beside, intervals=options.intervals, exact=options.exact)
    print(text)
    return text


def runs_in(folder: Path, seeds: Sequence[int] | None = None) -> dict[str, dict[int, Run]]:
    """The runs of a folder by arm and seed, of all seeds or of some; of an arm's budgets, those with the largest."""
    runs = [Run(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("runs/*.json"))]
    largest: dict[str, int] = {}
    for run in runs:
        largest[_arm(run)] = max(run.steps, largest.get(_arm(run), 0))
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.steps == largest[_arm(run)] and (seeds is None or run.seed in seeds):
            found.setdefault(_arm(run), {})[run.seed] = run
    return found


def table(
    found: Mapping[str, Mapping[str, Mapping[int, Run]]],
    arms: Sequence[str],
    *,
    beside: str,
    intervals: bool,
    exact: bool = False,
) -> str:
    """The table, a line for each arm, and its legend; ``exact``: of what greedy decoding gives, where that was seen."""
    values = {
        name: {arm: _final(runs, exact=exact) for arm, runs in of_arms.items()} for name, of_arms in found.items()
    }
    width = max(36 if intervals else 18, *(len(name) + 2 for name in found))
    lines = [f"{'':<20}" + "".join(f"{name:>{width}}" for name in found)]
    for name in arms:
        cells = [
            _cell(runs.get(name, {}), {} if name == beside else runs.get(beside, {}), intervals=intervals)
            for runs in values.values()
        ]
        lines.append(f"{ARMS[name].label:<20}" + "".join(f"{cell:>{width}}" for cell in cells))
    measure = EXACT if exact else TEST_LOSS
    legend = LEGEND.format(beside=ARMS[beside].label, measure=measure)
    return "\n".join([*(line.rstrip() for line in lines), "", legend])


def _final(runs: Mapping[int, Run], *, exact: bool) -> dict[int, list[float]]:
    """What is compared of each test row, by seed."""
    found = {seed: run.exact if exact else run.test[-1] for seed, run in runs.items()}
    return {seed: values for seed, values in found.items() if values}


def _cell(runs: Mapping[int, list[float]], others: Mapping[int, list[float]], *, intervals: bool) -> str:
    if not runs:
        return ""
    finals = [sum(values) / len(values) for values in runs.values()]
    text = f"{sum(finals) / len(finals):.3f} ({len(finals)})"
    shared = sorted(runs.keys() & others.keys())
    if not shared:
        return f"{text}{'':7}"
    mean, low, high = paired_difference(
        torch.tensor([runs[seed] for seed in shared]), torch.tensor([others[seed] for seed in shared])
    )
    if intervals:
        return f"{text} {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{text} {mean:+.2f}{'*' if low > 0.0 or high < 0.0 else ' '}"


def _arm(run: Run) -> str:
    return run.arm.split(":")[0]
