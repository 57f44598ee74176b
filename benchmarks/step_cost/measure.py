"""Measurements of ``step_cost.py``: interleaved times of all arms of a point, and memory.

As ``python -m step_cost.measure`` it measures in the process it is started in, which may be told how to allocate: the
argument is a request as :func:`in_a_process` makes it, the answer is one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from memory import LivePeak, resident_bytes

from .arms import TINY, Step, plain_arm, selective_arm, wait
from .phases import PhaseClock
from .points import Point

BENCHMARKS = Path(__file__).resolve().parents[1]
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Without these, glibc gives every large block back to the system, and the next step faults its pages in again."""
FEWEST = 3
"""Rounds at least, however long they take."""
CLOCKED = 3
"""Steps whose phases are clocked, where a goal is about them, if time allows."""


def seconds(step: Step, numbers: Sequence[int], device: str) -> float:
    """The mean seconds of a step, over some steps."""
    wait(device)
    start = time.perf_counter()
    for number in numbers:
        step(number)
    wait(device)
    return (time.perf_counter() - start) / len(numbers)


def measure(
    point: Point,
    *,
    repeats: int,
    limit: float,
    device: str,
    phases: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times of the plain step and of each way's, interleaved; ratios, floors, phases and memory.

    Args:
        point: what to measure.
        repeats: rounds at most; in each a plain step, and of every way as many as from one target to the next.
        limit: seconds after which no round begins, once there were :data:`FEWEST`.
        device: of the model.
        phases: whether steps are clocked phase by phase, before those that are timed.
        progress: told what is going on.
    """
    gc.collect()
    arms: dict[str, Step] = {}
    optimizers = {}
    arms["plain"], _ = plain_arm(point, device)
    for way in point.ways:
        arms[way], optimizers[way] = selective_arm(point, way, device)
    peaks = {}
    for arm, step in arms.items():
        progress(f"warming up {arm}")
        with LivePeak() as live:
            step(0, TINY)  # makes the optimizer's state
            step(1)
        peaks[arm] = live.peak
    # Before the timed steps, as a second warm-up; a clock would disturb those, on a device.
    clocked = {way: _clocked(point, arms[way], limit, device) for way in point.ways} if phases else {}
    names = list(arms)
    rounds: list[dict[str, float]] = []
    applied: dict[str, list[int]] = {way: [] for way in point.ways}
    start = time.perf_counter()
    while len(rounds) < repeats and (len(rounds) < FEWEST or time.perf_counter() - start < limit):
        progress(f"timed round {len(rounds) + 1}")
        first = 10 + len(rounds) * point.cycle
        numbers = range(first, first + point.cycle)
        # Each begins in turn, so that none always finds the memory as the same other one left it.
        at = len(rounds) % len(names)
        rounds.append(
            {
                arm: seconds(arms[arm], numbers[:1] if arm == "plain" else numbers, device)
                for arm in names[at:] + names[:at]
            }
        )
        for way, optimizer in optimizers.items():
            assert optimizer.selection is not None
            applied[way].append(int((optimizer.selection.weights > 0).sum()))
    found: dict[str, Any] = {
        "seconds": {arm: [one[arm] for one in rounds] for arm in names},
        "live_bytes": peaks,
        "ways": {},
    }
    for way, optimizer in optimizers.items():
        assert optimizer.selection is not None
        applied_by = optimizer.selection.combine
        ratios = [one[way] / one["plain"] for one in rounds]
        floor = point.floor(applied_by)
        found["ways"][way] = {
            "applied_by": applied_by,
            "ratios": ratios,
            "ratio": statistics.median(ratios),
            "quartiles": quartiles(ratios),
            "floor": floor,
            "over_floor": statistics.median(ratios) / floor,
            "live_beside_plain": peaks[way] / peaks["plain"],
            "phases": clocked.get(way, {}),
            "weights_above_zero": applied[way],
        }
    return found


def _clocked(point: Point, step: Step, limit: float, device: str) -> dict[str, float]:
    """Seconds of each phase of a step."""
    most = CLOCKED if "chart n" in point.also else 1
    cycles: list[dict[str, float]] = []
    start = time.perf_counter()
    while not cycles or (len(cycles) < most and time.perf_counter() - start < limit / 2):
        with PhaseClock(device) as clock:
            seconds(step, range(2, 2 + point.cycle), device)
        cycles.append(clock.spent)
    labels = dict.fromkeys(label for spent in cycles for label in spent)
    return {label: statistics.median(spent.get(label, 0.0) for spent in cycles) / point.cycle for label in labels}


def quartiles(values: list[float]) -> list[float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return [values[0]] * 2
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def peak(point: Point, arm: str, device: str) -> dict[str, int]:
    """Highest memory of four steps above that of the model, in bytes: of live tensors, and as the system sees it.

    ``"state"`` is the share of the inner optimizer's state, ``"trained"`` the parameters', which are not counted.
    """
    if arm == "plain":
        step, optimizer = plain_arm(point, device)
        inner = optimizer
    else:
        step, wrapper = selective_arm(point, arm, device)
        inner = wrapper.optimizer
    gc.collect()
    on_device = device != "cpu"
    held = torch.cuda.memory_allocated(device) if on_device else resident_bytes("VmRSS")
    if on_device:
        torch.cuda.reset_peak_memory_stats(device)
    with LivePeak() as live:
        for number in range(4):
            step(number)
    wait(device)
    highest = torch.cuda.max_memory_allocated(device) if on_device else resident_bytes("VmHWM")
    state = [value for entry in inner.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    return {
        "live": live.peak,
        "system": highest - held,
        "state": sum(value.nbytes for value in state),
        "trained": sum(parameter.nbytes for parameter in parameters),
    }


def in_a_process(request: dict[str, Any], point: Point, device: str, *, keep_pages: bool = False) -> dict[str, Any]:
    """The answer of a fresh process: to ``{"peak": arm}`` or to ``{"repeats": ..., "limit": ...}``."""
    content = {**request, "point": asdict(point), "device": device, "threads": torch.get_num_threads()}
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        # -P: the folder that all was started in is not searched, as it is not for a script.
        [sys.executable, "-P", "-m", "step_cost.measure", json.dumps(content)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **(KEEP_PAGES if keep_pages else {})},
    )
    if done.returncode:
        raise RuntimeError(f"The process that measured {point.name!r} failed: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Answer the request of the command line."""
    request = json.loads(sys.argv[1])
    point = Point.from_json(request["point"])
    torch.set_num_threads(request["threads"])
    if "peak" in request:
        found = peak(point, request["peak"], request["device"])
    else:
        how = {key: request[key] for key in ("repeats", "limit", "device")}
        found = measure(point, **how, phases=False)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
