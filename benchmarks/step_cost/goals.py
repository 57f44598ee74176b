"""The verdicts on the results of ``step_cost.py``: regret, growth, shares, and which of the goals are met."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .grams import OURS
from .phases import MATERIALISE, PRODUCTS, REST_OF_GRAM, SOLVE
from .points import ERROR_GOALS, GROWTH_GOAL, MEMORY_GOALS, RATIO_GOALS, SHARE_GOAL

Found = dict[str, Any]
"""What was found at one point."""


def name_of(found: Found) -> str:
    return str(found["point"]["name"])


def timed(results: Iterable[Found]) -> list[Found]:
    """The results that have times."""
    return [found for found in results if found.get("ways")]


def on_chart(results: Iterable[Found], axis: str) -> list[Found]:
    """The timed results of the series over ``axis``, in its order."""
    chosen = [found for found in timed(results) if f"chart {axis}" in found["point"]["also"]]
    return sorted(chosen, key=lambda found: found["point"][axis])


def shares_of_materialising(found: Found, way: str = "factors") -> tuple[float, float]:
    """Gram products and solve over materialising; and all of the Gram matrix but materialising, and the solve."""
    phases = found["ways"][way]["phases"]
    narrow = phases.get(PRODUCTS, 0.0) + phases.get(SOLVE, 0.0)
    wide = narrow + phases.get(REST_OF_GRAM, 0.0)
    return narrow / phases[MATERIALISE], wide / phases[MATERIALISE]


def regret(found: Found) -> tuple[str, float, bool] | None:
    """The sooner one of ``"factors"`` and ``"graph"``, ``"auto"`` over it less one, and whether they overlap.

    They do where the quartiles of ``"auto"`` begin no later than those of the sooner way end.
    """
    ways = found["ways"]
    if not {"factors", "graph", "auto"} <= ways.keys():
        return None
    best = min(("factors", "graph"), key=lambda way: float(ways[way]["ratio"]))
    over = ways["auto"]["ratio"] / ways[best]["ratio"] - 1
    return best, over, ways["auto"]["quartiles"][0] <= ways[best]["quartiles"][1]


def growth(series: list[Found], where: Callable[[Found], Found]) -> float:
    """The growth of the ratio to the floor, from the first point of a series to the worst of the others."""
    first, *others = (float(where(found)["ways"]["factors"]["over_floor"]) for found in series)
    return max(others) / first - 1


def activation_share(found: Found) -> float:
    """The share of activations in the peak of the plain step, the model included."""
    plain = found["peaks"]["plain"]
    return float((plain["live"] - plain["state"]) / (plain["live"] + plain["trained"]))


def goals(results: list[Found]) -> str:
    """Which of the goals that these results are about are met."""
    lines: list[tuple[str, float, float, str]] = []
    pages: list[tuple[str, Callable[[Found], Found]]] = [
        ("", lambda found: found),
        (", pages kept", lambda found: found.get("pages_kept", {})),
    ]
    for label, where in pages:
        for found in timed(results):
            if name_of(found) in RATIO_GOALS and where(found):
                unit, most = RATIO_GOALS[name_of(found)]
                one = next(iter(where(found)["ways"].values()))
                value = one["over_floor"] if unit == "x floor" else one["ratio"]
                lines.append((f"{name_of(found)}{label}, {unit}", value, most, ".2f"))
        series = on_chart(results, "t")
        if len(series) > 1 and all(where(found) for found in series):
            ends = f"t {series[0]['point']['t']} to {series[-1]['point']['t']}"
            lines.append(
                (f"growth of the ratio to the floor, {ends}{label}", growth(series, where), GROWTH_GOAL, ".1%")
            )
    series = on_chart(results, "n")
    if series:
        worst = max(series, key=lambda found: shares_of_materialising(found)[0])
        share = shares_of_materialising(worst)[0]
        lines.append(
            (f"products and solve of materialising, worst at n {worst['point']['n']}", share, SHARE_GOAL, ".1%")
        )
    for found in results:
        if "peaks" in found:
            value = found["peaks"]["ours"]["live"] / found["peaks"]["plain"]["live"]
            lines.append((name_of(found), value, MEMORY_GOALS[found["point"]["ways"][0]], ".2f"))
    for kind, most in ERROR_GOALS.items():
        worst_errors = [found["errors"] for found in results if "errors" in found and _precision(found) == kind]
        for label, what in (("from the factors", "computation"), ("in all", "whole")) if worst_errors else ():
            value = max(one[what] for one in worst_errors)
            lines.append((f"error of the Gram matrix in {kind}, {label}", value, most, ".0e"))
    faster = [
        f"{name_of(found)} ({way} {one['beside_ours']:.2f})"
        for found in results
        for way, one in found.get("other_ways", {}).items()
        if way != OURS and one.get("beside_ours", 1.0) < 1.0
    ]
    text = [
        f"{'met   ' if value <= most else 'missed'}  {label}: {value:{form}} (goal {most:{form}})"
        for label, value, most, form in lines
    ]
    if any("other_ways" in found for found in results):
        text.append(f"other ways to the same Gram matrix that were faster: {', '.join(faster) or 'none'}")
    return "\n".join(["goals", *text]) if text else ""


def _precision(found: Found) -> str:
    return "bfloat16" if found["point"]["autocast"] else str(found["point"]["dtype"])
