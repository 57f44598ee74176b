"""The tables of ``step_cost.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from .goals import (
    Found,
    activation_share,
    goals,
    name_of,
    on_chart,
    regret,
    shares_of_materialising,
    timed,
)
from .phases import MATERIALISE, PRODUCTS, REST_OF_GRAM, SOLVE
from .points import MEMORY_GOALS, WAYS

ERRORS_ARE = (
    "|K_ij - exact_ij| / sqrt(exact_ii exact_jj). From the factors: exact is float64 arithmetic on the very\n"
    "factors and P that ours computed with. In all: exact is float64 gradients of the same parameter values, one\n"
    "candidate at a time, so the rounding of the model's own passes (in bfloat16, if it computes in it) is in it."
)


def measured(results: list[Found]) -> str:
    """One row for each way of each point."""
    if not timed(results):
        return ""
    lines = [
        f"{'':<44}{'plain':>8}   {'ours over plain':<33}{'with pages kept':<28}{'live memory':>11}",
        f"{'':<44}{'ms':>8}{'ratio':>8}{'quartiles':>12}{'floor':>6}{'x floor':>8}"
        f"{'ratio':>8}{'quartiles':>12}{'x floor':>8}{'over plain':>11}",
    ]
    for found in timed(results):
        plain = 1e3 * statistics.median(found["seconds"]["plain"])
        for way, one in found["ways"].items():
            kept = found["pages_kept"]["ways"][way] if "pages_kept" in found else None
            second = f"{'':>28}" if kept is None else f"{_ratio(kept)}{kept['over_floor']:>8.2f}"
            label = f"{name_of(found)} [{way}]"
            lines.append(
                f"{label:<44}{plain:>8.0f}{_ratio(one)}{one['floor']:>6.2f}{one['over_floor']:>8.2f}{second}"
                f"{one['live_beside_plain']:>11.2f}"
            )
    return "\n".join(lines)


def _ratio(one: Found) -> str:
    low, high = one["quartiles"]
    return f"{one['ratio']:>8.2f}{f'{low:.2f}-{high:.2f}':>12}"


def choices(results: list[Found]) -> str:
    """One row for each point with all ways: which was the fastest, and what ``"auto"`` lost."""
    rows = [(found, lost) for found in timed(results) if (lost := regret(found)) is not None]
    if not rows:
        return ""
    lines = [
        f"{'ours over plain':<44}" + "".join(f"{way:>9}" for way in WAYS) + f"{'fastest':>10}{'auto took':>11}"
        f"{'its regret':>12}  beside the sooner of factors and graph"
    ]
    for found, (best, over, overlap) in rows:
        ways = found["ways"]
        fastest = min((way for way in ways if way != "auto"), key=lambda way: float(ways[way]["ratio"]))
        lines.append(
            f"{name_of(found):<44}"
            + "".join(f"{ways[way]['ratio']:>9.2f}" for way in WAYS)
            + f"{fastest:>10}{ways['auto']['applied_by']:>11}{over:>12.1%}  {best}, "
            + ("within the quartiles" if overlap else "outside of the quartiles")
        )
    regrets = [max(0.0, over) for _, (_, over, _) in rows]
    within = sum(overlap for _, (_, _, overlap) in rows)
    chose = sum(found["ways"]["auto"]["applied_by"] == best for found, (best, _, _) in rows)
    reruns = [found for found, (best, _, _) in rows if found["ways"]["rerun"]["ratio"] < found["ways"][best]["ratio"]]
    lines.append(
        f"auto: regret median {statistics.median(regrets):.1%}, largest {max(regrets):.1%}; took the sooner way at "
        f"{chose} of {len(rows)} points, within the quartiles at {within}. rerun, which saves memory and which auto "
        f"does not take, was the fastest at {len(reruns)}."
    )
    return "\n".join(lines)


def over_t(results: list[Found]) -> str:
    """The series over the context."""
    series = on_chart(results, "t")
    if not series:
        return ""
    lines = [f"{'cost over the context':<24}{'n':>5}{'ratio':>8}{'floor':>8}{'x floor':>9}{'pages kept: x floor':>21}"]
    for found in series:
        one, point = found["ways"]["factors"], found["point"]
        kept = found["pages_kept"]["ways"]["factors"]["over_floor"] if "pages_kept" in found else None
        lines.append(
            f"t {point['t']:<22}{point['n']:>5}{one['ratio']:>8.2f}{one['floor']:>8.2f}{one['over_floor']:>9.2f}"
            f"{'' if kept is None else f'{kept:.2f}':>21}"
        )
    return "\n".join(lines)


def over_n(results: list[Found]) -> str:
    """The series over the candidates."""
    series = on_chart(results, "n")
    if not series:
        return ""
    lines = [
        f"{'cost over the candidates':<24}{'t':>5}{'ratio':>8}{'x floor':>9}{'materialise ms':>16}{'products ms':>13}"
        f"{'solve ms':>10}{'rest of Gram ms':>17}{'products + solve':>18}{'with the rest':>15}"
    ]
    for found in series:
        one, point = found["ways"]["factors"], found["point"]
        narrow, wide = shares_of_materialising(found)
        times = [1e3 * one["phases"].get(label, 0.0) for label in (MATERIALISE, PRODUCTS, SOLVE, REST_OF_GRAM)]
        lines.append(
            f"n {point['n']:<22}{point['t']:>5}{one['ratio']:>8.2f}{one['over_floor']:>9.2f}{times[0]:>16.1f}"
            f"{times[1]:>13.1f}{times[2]:>10.1f}{times[3]:>17.1f}{narrow:>18.1%}{wide:>15.1%}"
        )
    lines.append("shares are of the time of materialising in the same step")
    return "\n".join(lines)


def phases(results: list[Found]) -> str:
    """The time of each phase at each point."""
    lines = ["ms of a step, by phase"]
    for found in timed(results):
        for way, one in found["ways"].items():
            parts = ", ".join(f"{label} {1e3 * value:.0f}" for label, value in one["phases"].items())
            lines.append(f"{name_of(found)} [{way}]: {parts}")
    return "\n".join(lines) if len(lines) > 1 else ""


def memory(results: list[Found]) -> str:
    """Peaks beside plain, with the goals."""
    rows = [found for found in results if "peaks" in found]
    if not rows:
        return ""
    lines = [
        f"{'peak memory above the model':<32}{'plain MiB':>10}{'activations':>13}{'live tensors':>14}{'goal':>6}"
        f"{'as the system sees it':>23}"
    ]
    for found in rows:
        plain, ours, way = found["peaks"]["plain"], found["peaks"]["ours"], found["point"]["ways"][0]
        lines.append(
            f"{name_of(found):<32}{plain['live'] / 2**20:>10.0f}{activation_share(found):>13.0%}"
            f"{ours['live'] / plain['live']:>14.2f}{MEMORY_GOALS[way]:>6.2f}{ours['system'] / plain['system']:>23.2f}"
        )
    lines.append("activations: of the peak of plain, parameters and optimizer state included")
    return "\n".join(lines)


def errors(results: list[Found]) -> str:
    """Largest relative errors of the Gram matrix."""
    rows = [found for found in results if "errors" in found]
    if not rows:
        return ""
    lines = [f"{'largest relative error of the Gram matrix':<44}{'from the factors':>18}{'in all':>9}"]
    lines += [
        f"{name_of(found):<44}{found['errors']['computation']:>18.0e}{found['errors']['whole']:>9.0e}" for found in rows
    ]
    return "\n".join(lines)


def explained_errors(results: list[Found]) -> str:
    """The errors of the Gram matrix, with an explanation of what they are."""
    table = errors(results)
    return f"{table}\n{ERRORS_ARE}" if table else ""


def other_ways(results: list[Found]) -> str:
    """Other ways to the same Gram matrix."""
    lines = []
    for found in results:
        for way, one in found.get("other_ways", {}).items():
            label = f"{name_of(found)}: {way}"
            if "failed" in one:
                lines.append(f"{label:<70} did not run: {one['failed']}")
                continue
            lines.append(
                f"{label:<70}{1e3 * statistics.median(one['seconds']):>8.0f} ms{one['beside_ours']:>7.2f} x ours"
                f"   error {one['error']:.0e}{one['live_bytes'] / 2**20:>8.0f} MiB"
            )
    return "\n".join(["the same Gram matrix by other ways", *lines]) if lines else ""


def failures(results: list[Found]) -> str:
    """Points that could not be measured."""
    return "\n".join(f"{name_of(found)} failed: {found['failed']}" for found in results if "failed" in found)


def brief(found: Found) -> str:
    """The tables about a point, as soon as it is measured."""
    return filled((measured, memory, errors, other_ways, failures), [found])


def report(results: list[Found]) -> str:
    """All tables that these results fill."""
    return filled(
        (measured, choices, over_t, over_n, memory, explained_errors, other_ways, phases, goals, failures), results
    )


def filled(tables: Iterable[Callable[[list[Found]], str]], results: list[Found]) -> str:
    """The tables that these results fill, below each other."""
    return "\n\n".join(text for table in tables if (text := table(results)))
