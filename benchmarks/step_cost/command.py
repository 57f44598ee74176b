"""The command line of ``step_cost.py``, and the points that it asks for, one after the other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from machine import hardware
from tqdm import tqdm

from .charts import write_charts
from .goals import Found
from .grams import compare_ways, gram_errors
from .launches import launch_brief, launch_report, measure_launches
from .measure import in_a_process, measure
from .points import CASES, GOALS, GRID, LARGE, LAUNCH_GRID, LAUNCHES, MEMORY, QUICK, QUICK_LAUNCHES, Point
from .report import brief, report


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", action="store_true", help="the points with a goal, and memory; the default")
    parser.add_argument("--grid", action="store_true", help="all ways over n, t, width, LoRA and scored share")
    parser.add_argument("--cases", action="store_true", help="the ways people train, all ways")
    parser.add_argument(
        "--launches", action="store_true", help="operations, Python calls and time of small steps; --grid: all points"
    )
    parser.add_argument("--quick", action="store_true", help="small points in place of others")
    parser.add_argument(
        "--only", help="points whose name contains this; a large model has to be named, such as Qwen3-0.6B"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the points and stop")
    parser.add_argument("--repeats", type=int, default=5, help="rounds at most (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of timed rounds of a point, after three (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="for example cuda (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    if options.launches and (options.goals or options.cases):
        parser.error("--launches has points of its own; it goes with --grid, --only and --quick")
    options.points, options.memory = _points(options)
    if not options.points and not options.memory:
        parser.error(f"no point of these sets has {options.only!r} in its name; --list shows the names")
    return options


def _points(options: argparse.Namespace) -> tuple[list[Point], list[Point]]:
    """The points to measure, and the points whose memory is measured."""
    if options.launches:
        grid = LAUNCH_GRID if options.grid or options.only else LAUNCHES
        points, memory = [*(QUICK_LAUNCHES if options.quick else grid)], []
    elif options.quick:
        points, memory = [*QUICK], [replace(QUICK[0], name="quick, memory", ways=("factors",))]
    else:
        goals = options.goals or not (options.grid or options.cases)
        points = [*(GOALS if goals else []), *(GRID if options.grid else []), *(CASES if options.cases else [])]
        memory = [*MEMORY] if goals else []
    if options.only:
        # Not what merely has a word in common.
        large = [] if options.launches else [point for point in LARGE if point.shape in options.only]
        points = [point for point in [*points, *large] if options.only in point.name]
        memory = [point for point in memory if options.only in point.name]
    return points, memory


def measured(point: Point, options: argparse.Namespace, bar: Any) -> Found:
    """Everything that is asked about a point; what failed is said in place of it."""

    def progress(text: str) -> None:
        bar.set_description(f"{point.name}: {text}")

    found: Found = {"point": asdict(point)}
    try:
        if point.ways:
            found |= measure(
                point, repeats=options.repeats, limit=options.seconds, device=options.device, progress=progress
            )
        if "kept pages" in point.also and options.device == "cpu" and sys.platform == "linux":
            progress("with pages kept")
            request = {"repeats": options.repeats, "limit": options.seconds}
            found["pages_kept"] = in_a_process(request, point, options.device, keep_pages=True)
        if "errors" in point.also:
            progress("errors")
            found["errors"] = gram_errors(point, options.device)
        if "other ways" in point.also:
            found["other_ways"] = compare_ways(point, options.device, progress)
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    return found


def peaks(point: Point, options: argparse.Namespace, bar: Any) -> Found:
    """Memory of the plain step and of ours, a process each."""
    found: Found = {"point": asdict(point)}
    bar.set_description(point.name)
    try:
        found["peaks"] = {
            name: in_a_process({"peak": arm}, point, options.device)
            for name, arm in (("plain", "plain"), ("ours", point.ways[0]))
        }
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    return found


def counted(point: Point, options: argparse.Namespace, bar: Any) -> Found:
    """Operations, calls and times of a point of ``--launches``."""
    found: Found = {"point": asdict(point)}
    try:
        found |= measure_launches(
            point,
            repeats=options.repeats,
            limit=options.seconds,
            device=options.device,
            progress=lambda text: bar.set_description(f"{point.name}: {text}"),
        )
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    return found


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> list[Found]:
    """Measure, print, keep; results are kept as they come."""
    options = parse_arguments(arguments, description=description)
    if options.list:
        print(*(point.name for point in (*options.points, *options.memory)), sep="\n")
        return []
    if options.launches:
        return _launches(options)
    machine = hardware(options.device)
    results: list[Found] = []
    work = [(measured, point) for point in options.points] + [(peaks, point) for point in options.memory]
    with tqdm(work, unit="point") as bar:
        for run, point in bar:
            results.append(run(point, options, bar))
            with bar.external_write_mode():
                print(brief(results[-1]), end="\n\n", flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                content = {"machine": machine, "repeats": options.repeats, "results": results}
                (options.out / "step_cost.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join([", ".join(f"{key} {value}" for key, value in machine.items()), "", report(results)])
    print(text)
    if options.out:
        (options.out / "step_cost.txt").write_text(text + "\n")
        write_charts(results, machine, options.out)
    return results


def _launches(options: argparse.Namespace) -> list[Found]:
    """Count and time the points of ``--launches``, print, keep the print-out."""
    torch.set_num_threads(1)  # there is nothing to share in a small operation
    machine = hardware(options.device)
    results: list[Found] = []
    with tqdm(options.points, unit="point") as bar:
        for point in bar:
            results.append(counted(point, options, bar))
            with bar.external_write_mode():
                print(launch_brief(results[-1]), end="\n\n", flush=True)
    text = "\n".join([", ".join(f"{key} {value}" for key, value in machine.items()), "", launch_report(results)])
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "launches.txt").write_text(text + "\n")
    return results
