"""The table of several settings: what each arm comes to in each of them, and beside one arm."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .arms import ARMS
from .report import curve_of, first_reached, paired_difference
from .runs import Run

TEST_LOSS, EXACT = "final test loss", "share of test rows whose response is decoded exactly"
LEGEND = """\
Of each arm: {measure}, the mean over seeds (in brackets: how many), and the mean paired difference to {beside},
over the seeds that both have; * where the 95 % interval of its bootstrap over rows and seeds is on one side of zero."""

SECONDS_LEGEND = """\
Of each arm: its steps and seconds until the final test loss of {beside}, the latter in per cent of the seconds of that
arm, and the seconds of all of its steps; means over the seeds that both have (in brackets: how many)."""


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
    parser.add_argument(
        "--seconds", action="store_true", help="until the final test loss of the arm that others are compared with"
    )
    parser.add_argument("--intervals", action="store_true", help="print them, not only on which side of zero they are")
    parser.add_argument(
        "--others",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="one for each, of results with another --read-ahead: arms that a folder has not are taken from there",
    )
    options = parser.parse_args(arguments)
    for name in [options.beside, *(options.arms or [])]:
        if name not in ARMS:
            parser.error(f"{name!r} is not one of {', '.join(ARMS)}")
    if options.seconds and (options.exact or options.intervals):
        parser.error("--seconds has a table of its own: leave --exact and --intervals out")
    options.others = options.others or options.folders
    for folder in {*options.folders, *options.others}:
        if not any(folder.glob("runs/*.json")):
            parser.error(f"{folder} has no results of pays.py in its folder runs")
    if len(options.others) != len(options.folders):
        parser.error(f"--others needs as many folders, {len(options.folders)}, got {len(options.others)}")
    for folder, other in zip(options.folders, options.others, strict=True):
        if _but_for_read_ahead(folder) != _but_for_read_ahead(other):
            parser.error(f"{other} differs from {folder} in more than --read-ahead, see their setting.json")
    return options


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> str:
    """Prints the table."""
    options = parse_arguments(arguments, description=description)
    found = {
        folder.name: runs_in(other, options.seeds) | runs_in(folder, options.seeds)
        for folder, other in zip(options.folders, options.others, strict=True)
    }
    wanted = options.arms or [name for name in ARMS if any(name in runs for runs in found.values())]
    if options.seconds:
        cells = {
            folder.name: _seconds_in(folder, found[folder.name], wanted, options.beside) for folder in options.folders
        }
        text = laid_out(cells, wanted, SECONDS_LEGEND.format(beside=ARMS[options.beside].label), least=28)
    else:
        text = table(found, wanted, beside=options.beside, intervals=options.intervals, exact=options.exact)
    print(text)
    return text


def _but_for_read_ahead(folder: Path) -> dict[str, object]:
    """The setting of a folder's runs: the model, the data, all sizes but how many records a step reads."""
    setting: dict[str, object] = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    return {name: value for name, value in setting.items() if name != "read_ahead"}


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
    cells = {
        name: [
            _cell(runs.get(arm, {}), {} if arm == beside else runs.get(beside, {}), intervals=intervals) for arm in arms
        ]
        for name, runs in values.items()
    }
    measure = EXACT if exact else TEST_LOSS
    legend = LEGEND.format(beside=ARMS[beside].label, measure=measure)
    return laid_out(cells, arms, legend, least=36 if intervals else 18)


def laid_out(cells: Mapping[str, Sequence[str]], arms: Sequence[str], legend: str, *, least: int) -> str:
    """A table of cells by column, one for each arm, and what they are."""
    width = max(least, *(len(name) + 2 for name in cells))
    lines = [f"{'':<20}" + "".join(f"{name:>{width}}" for name in cells)]
    for row, arm in zip(zip(*cells.values(), strict=True), arms, strict=True):
        lines.append(f"{ARMS[arm].label:<20}" + "".join(f"{cell:>{width}}" for cell in row))
    return "\n".join([*(line.rstrip() for line in lines), "", legend])


def _seconds_in(folder: Path, found: Mapping[str, Mapping[int, Run]], arms: Sequence[str], beside: str) -> list[str]:
    """The cells of one setting."""
    calibration, zero_shot = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("calibration", "zero-shot")
    )
    start = sum(zero_shot["test"]) / len(zero_shot["test"])
    cells = []
    for arm in arms:
        runs, others = found.get(arm, {}), found.get(beside, {})
        shared = sorted(runs.keys() & others.keys())
        if not shared:
            cells.append("")
            continue
        losses, spent = curve_of([others[seed] for seed in shared], start, calibration)
        curve, seconds = curve_of([runs[seed] for seed in shared], start, calibration)
        steps = first_reached([0, *runs[shared[0]].at], curve, losses[-1])
        share = first_reached(seconds, curve, losses[-1]) / spent[-1]
        reached = f"{steps:.0f}, {share:.0%}" if steps < math.inf else "not reached"
        cells.append(f"{reached}; {seconds[-1]:.0f} s ({len(shared)})")
    return cells


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
