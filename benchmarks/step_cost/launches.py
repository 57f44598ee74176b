"""How many operations and Python calls a step makes, and its time where each of them is small.

Where the arithmetic of an operation is small, its launch is what it takes: a step of few and narrow rows takes as long
as it has operations and Python calls. Counts are exact and the same at each step; they depend on the number of layers,
hardly on width and ``t``.
"""

from __future__ import annotations

import cProfile
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .arms import TINY, Step, plain_arm, selective_arm
from .goals import Found, name_of
from .grams import OURS, compare_ways
from .measure import FEWEST, quartiles, seconds
from .points import Point
from .report import filled

BOUNDS = {
    "LoRA 8, all scored, factors": 0.99,
    "LoRA 8, last block, graph": 1.05,
    "full, all scored, factors": 1.11,
    "full, last block, graph": 1.08,
}
"""Operations of ours over those of plain AdamW (for-loop) that 30 layers may take at most, by what is trained."""

FOR_LOOP, FOREACH = "plain, for-loop", "plain, foreach"
WAYS = {"factors": "ours, factors, all scored", "graph": "ours, graph, last block"}
"""The arm of each value of ``combine``."""
SLOW = 5.0
"""Seconds of a plain step; a point where it takes longer is left out."""
LARGEST = 12
"""Kinds of operations that are printed of a point."""

HIDDEN_VIEWS = {"_unsafe_view", "unsafe_split", "unsafe_split_with_sizes"}
"""Views whose schema doesn't say so: autograd is to take what they return for new."""


@dataclass(frozen=True)
class Counts:
    """What a step does, by the name of the operation.

    Attributes:
        operations: those that compute, fill, copy or wait: what a device would be given.
        views: other shapes of the same memory.
        lookups: questions about types, and labels for a profiler; no tensor's entries are read or made.
        calls: Python functions that are called, on this thread.
    """

    operations: dict[str, int]
    views: dict[str, int]
    lookups: dict[str, int]
    calls: int

    @property
    def total(self) -> int:
        """Operations; views and look-ups are none."""
        return sum(self.operations.values())


def launches(step: Callable[[], object]) -> Counts:
    """What one step does.

    Args:
        step: is run twice, once for the operations and once for the Python calls; what it makes at its first run alone,
            such as an optimizer's state, is to be there already.
    """
    with _Launches() as seen:
        step()
    kinds: dict[str, dict[str, int]] = {"operations": {}, "views": {}, "lookups": {}}
    for operator, count in seen.counts.items():
        name = operator._schema.name.removeprefix("aten::")
        found = kinds[kind(operator)]
        found[name] = found.get(name, 0) + count
    return Counts(**kinds, calls=python_calls(step))


@cache
def kind(operator: torch._ops.OpOverload) -> str:
    """``"operations"``, ``"views"`` or ``"lookups"``: the field of :class:`Counts` that an operator counts for."""
    schema = operator._schema
    reads = any("Tensor" in str(argument.type) for argument in schema.arguments)
    makes = any("Tensor" in str(result.type) for result in schema.returns)
    if any(str(result.real_type) == "ScalarType" for result in schema.returns) or not (reads or makes):
        return "lookups"
    aliases = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
    hidden = schema.name.removeprefix("aten::") in HIDDEN_VIEWS
    return "views" if aliases or hidden or torch.Tag.inplace_view in operator.tags else "operations"


def python_calls(step: Callable[[], object]) -> int:
    """Python functions that a step calls, itself among them, on this thread; calls of C functions are none."""
    profile = cProfile.Profile(builtins=False)
    # A collection calls what listens for one, at a moment that has nothing to do with the step.
    collects = gc.isenabled()
    gc.disable()
    try:
        profile.runcall(step)
    finally:
        if collects:
            gc.enable()
    return sum(entry.callcount for entry in profile.getstats())


class _Launches(TorchDispatchMode):
    """Counts what reaches the dispatcher inside of the block: what autograd has no smaller parts for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch._ops.OpOverload] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def warm_arm(point: Point, arm: str, device: str) -> Step:
    """A step that has what it makes once: the optimizer's state, and the target gradient where it is kept.

    Args:
        point: the model and its batches.
        arm: :data:`FOR_LOOP`, :data:`FOREACH`, or one of :data:`WAYS`, which says what is scored.
        device: of the model.
    """
    if arm in (FOR_LOOP, FOREACH):
        step, _ = plain_arm(point, device, foreach=arm == FOREACH)
    else:
        scored = {"factors": 0, "graph": 1}[arm]
        step, _ = selective_arm(replace(point, scored=scored), arm, device, foreach=False)
    step(0, TINY)
    step(1)
    return step


def measure_launches(
    point: Point,
    *,
    repeats: int,
    limit: float,
    device: str,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Counts and times of plain steps and ours, interleaved, and times of the ways to the Gram matrix.

    Args:
        point: what to measure; ``scored`` and ``ways`` say nothing here.
        repeats: rounds at most, of a step of each arm.
        limit: seconds after which no round begins, once there were :data:`FEWEST`.
        device: of the model.
        progress: told what is going on.
    """
    gc.collect()
    progress("warming up")
    arms = {FOR_LOOP: warm_arm(point, FOR_LOOP, device)}
    plain = seconds(arms[FOR_LOOP], [2], device)
    if plain > SLOW:
        return {"left_out": plain}
    arms |= {arm: warm_arm(point, arm, device) for arm in (FOREACH, *WAYS)}
    progress("counting")
    counts = {arm: launches(partial(step, 2)) for arm, step in arms.items()}
    names = list(arms)
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < repeats and (len(rounds) < FEWEST or time.perf_counter() - start < limit):
        progress(f"timed round {len(rounds) + 1}")
        at = len(rounds) % len(names)  # each begins in turn
        rounds.append({arm: seconds(arms[arm], [10 + len(rounds)], device) for arm in names[at:] + names[:at]})
    arms.clear()
    return {
        "counts": {arm: {**asdict(one), "total": one.total} for arm, one in counts.items()},
        "seconds": {arm: [one[arm] for one in rounds] for arm in names},
        "other_ways": compare_ways(point, device, progress),
    }


def launch_brief(found: Found) -> str:
    """The tables about a point, as soon as it is measured."""
    return filled((_steps, _grams, _left_out), [found])


def launch_report(results: list[Found]) -> str:
    """All tables that these results fill."""
    return filled((_steps, _kinds, _grams, _left_out), results)


def _steps(results: list[Found]) -> str:
    """Four rows for each point: operations, Python calls and time."""
    lines = [
        f"{'':<32}{'operations':>20}{'Python calls':>18}{'time':>9}   {'beside for-loop':<22}beside foreach",
        f"{'':<32}{'number':>12}{'ratio':>8}{'number':>10}{'ratio':>8}{'ms':>9}{'ratio':>8}{'quartiles':>14}"
        f"{'ratio':>8}{'quartiles':>14}",
    ]
    for found in (one for one in results if "counts" in one):
        lines.append(name_of(found))
        plain = found["counts"][FOR_LOOP]
        for arm, one in found["counts"].items():
            ratios = f"{one['total'] / plain['total']:.2f}", f"{one['calls'] / plain['calls']:.2f}"
            lines.append(
                f"  {WAYS.get(arm, arm):<30}{one['total']:>12}{ratios[0]:>8}{one['calls']:>10}{ratios[1]:>8}"
                f"{1e3 * statistics.median(found['seconds'][arm]):>9.1f}"
                + "".join(_beside(found["seconds"], arm, other) for other in (FOR_LOOP, FOREACH)).rstrip()
            )
    lines.append("operations: without views and look-ups of types, which launch nothing")
    return "\n".join(lines) if len(lines) > 3 else ""


def _beside(seconds: Mapping[str, list[float]], arm: str, other: str) -> str:
    """Median and quartiles of the ratio, round by round."""
    if arm == other:
        return f"{'':>22}"
    ratios = [one / beside for one, beside in zip(seconds[arm], seconds[other], strict=True)]
    low, high = quartiles(ratios)
    return f"{statistics.median(ratios):>8.2f}{f'{low:.2f}-{high:.2f}':>14}"


def _kinds(results: list[Found]) -> str:
    """The operations that ours has most of beyond the plain step, for the deepest models and their first point."""
    counted = [found for found in results if "counts" in found]
    deepest = max((found["point"]["layers"] for found in counted), default=0)
    firsts: dict[int, Found] = {}
    for found in counted:
        if found["point"]["layers"] == deepest:
            firsts.setdefault(found["point"]["lora"], found)
    blocks = []
    for found in firsts.values():
        counts = found["counts"]
        operations = {arm: Counter(one["operations"]) for arm, one in counts.items()}
        more = operations["factors"] - operations[FOR_LOOP]
        lines = [f"{'operations by kind, ' + name_of(found):<56}" + "".join(f"{arm:>17}" for arm in counts)]
        lines += [
            f"  {name:<54}" + "".join(f"{operations[arm][name]:>17}" for arm in counts)
            for name, _ in more.most_common(LARGEST)
        ]
        lines += [
            f"  {label:<54}" + "".join(f"{sum(counts[arm][field].values()):>17}" for arm in counts)
            for field, label in (("operations", "all"), ("views", "views, apart"), ("lookups", "look-ups, apart"))
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _grams(results: list[Found]) -> str:
    """One row for each point: the other ways to the same Gram matrix."""
    rows = [found for found in results if "other_ways" in found]
    if not rows:
        return ""
    ways = [way for way in rows[0]["other_ways"] if way != OURS]
    lines = [
        f"{'the Gram matrix alone':<44}{'ours, ms':>10}" + "".join(f"{way:>9}" for way in ways) + "   over our time"
    ]
    failed = []
    for found in rows:
        some = found["other_ways"]
        failed += [
            f"{name_of(found)}: {way} did not run: {one['failed']}" for way, one in some.items() if "failed" in one
        ]
        if "failed" not in some[OURS]:
            lines.append(
                f"{name_of(found):<44}{1e3 * statistics.median(some[OURS]['seconds']):>10.1f}"
                + "".join(f"{'-':>9}" if "failed" in some[way] else f"{some[way]['beside_ours']:>9.2f}" for way in ways)
            )
    return "\n".join(lines + failed)


def _left_out(results: list[Found]) -> str:
    """Points that were not measured, and why."""
    return "\n".join(
        f"{name_of(found)} left out: a plain step takes {found['left_out']:.1f} s, more than {SLOW:.0f} s"
        if "left_out" in found
        else f"{name_of(found)} failed: {found['failed']}"
        for found in results
        if "left_out" in found or "failed" in found
    )
