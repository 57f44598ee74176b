"""Measurements of ``step_cost.py``: interleaved times of all arms of a point, and memory.

As a script it measures in the process it is started in, which may be told how to allocate: the argument is a request
as :func:`in_a_process` makes it, the answer is one line of JSON.
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
from typing import Any

import torch
from memory import LivePeak, resident_bytes
from step_arms import TINY, Step, plain_arm, selective_arm, wait
from step_phases import PhaseClock
from step_points import Point

from ftw_optim import SelectiveOptimizer

KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Without these, glibc gives every large block back to the system, and the next step faults its pages in again."""
FEWEST = 3
"""Rounds at least, however long they take."""
CLOCKED = 3
"""Steps whose phases are clocked, where a goal is about them."""


def seconds(step: Step, numbers: Sequence[int], device: str) -> float:
    """Of a step, over some steps."""
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
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times of the plain step and of each way's, interleaved; ratios, floors, phases and memory.

    Args:
        point: what to measure.
        repeats: rounds at most; in each a plain step, and of every way as many as from one target to the next.
        limit: seconds after which no round begins, once there were :data:`FEWEST`.
        device: of the model.
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
    phases = {}
    chosen = {}
    for way, optimizer in optimizers.items():
        progress(f"phases of {way}")
        cycles = []
        for _ in range(CLOCKED if "chart n" in point.also else 1):
            # These steps warm up too; a clock would disturb those that are timed, on a device.
            with PhaseClock(device) as clock:
                seconds(arms[way], range(2, 2 + point.r), device)
            cycles.append(clock.spent)
        labels = dict.fromkeys(label for spent in cycles for label in spent)
        phases[way] = {
            label: statistics.median(spent.get(label, 0.0) for spent in cycles) / point.r for label in labels
        }
        _applied(optimizer)
        assert optimizer.selection is not None
        chosen[way] = optimizer.selection.update
    names = list(arms)
    rounds: list[dict[str, float]] = []
    applied: dict[str, list[int]] = {way: [] for way in point.ways}
    start = time.perf_counter()
    while len(rounds) < repeats and (len(rounds) < FEWEST or time.perf_counter() - start < limit):
        progress(f"timed round {len(rounds) + 1}")
        first = 10 + len(rounds) * point.r
        numbers = range(first, first + point.r)
        # Each begins in turn, so that none always finds the memory as the same other one left it.
        at = len(rounds) % len(names)
        rounds.append(
            {
                arm: seconds(arms[arm], numbers[:1] if arm == "plain" else numbers, device)
                for arm in names[at:] + names[:at]
            }
        )
        for way, optimizer in optimizers.items():
            applied[way].append(_applied(optimizer))
    found: dict[str, Any] = {
        "seconds": {arm: [one[arm] for one in rounds] for arm in names},
        "live_bytes": peaks,
        "ways": {},
    }
    for way in point.ways:
        ratios = [one[way] / one["plain"] for one in rounds]
        floor = point.floor(chosen[way])
        found["ways"][way] = {
            "applied_by": chosen[way],
            "ratios": ratios,
            "ratio": statistics.median(ratios),
            "quartiles": quartiles(ratios),
            "floor": floor,
            "over_floor": statistics.median(ratios) / floor,
            "live_beside_plain": peaks[way] / peaks["plain"],
            "phases": phases[way],
            "weights_above_zero": applied[way],
        }
    return found


def _applied(optimizer: SelectiveOptimizer) -> int:
    """How many candidates the last step applied."""
    selection = optimizer.selection
    assert selection is not None
    if selection.skipped:
        raise RuntimeError("Expected every step to apply something, but one was skipped: it would be too fast.")
    return int((selection.weights > 0).sum())


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
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(content)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(KEEP_PAGES if keep_pages else {})},
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
        found = measure(point, repeats=request["repeats"], limit=request["limit"], device=request["device"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
