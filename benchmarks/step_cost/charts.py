"""The pictures of ``step_cost.py``: cost over the context and over the candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from .goals import Found, on_chart, shares_of_materialising
from .points import GROWTH_GOAL, SHARE_GOAL


def write_charts(results: list[Found], machine: dict[str, Any], directory: Path) -> list[Path]:
    """``step_cost_t.png`` and ``step_cost_n.png``, each where its points were measured."""
    written = []
    where = f"{machine['cpu'] if machine['device'] == 'cpu' else machine['device']}, torch {machine['torch']}"
    for axis, draw in (("t", _draw_t), ("n", _draw_n)):
        series = on_chart(results, axis)
        if series:
            path = directory / f"step_cost_{axis}.png"
            figure = draw(series, where)
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def _draw_t(series: list[Found], where: str) -> Figure:
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    _draw_over_floor(axes, series, "t")
    first = series[0]["ways"]["factors"]["over_floor"]
    goal = (1 + GROWTH_GOAL) * first
    axes.axhline(
        goal, color="black", linestyle="--", linewidth=1, label=f"goal: at most {GROWTH_GOAL:.0%} above the first"
    )
    axes.set_xticks(
        [found["point"]["t"] for found in series],
        [f"{found['point']['t']}\n(n = {found['point']['n']})" for found in series],
    )
    axes.set_xlabel("tokens of a candidate, t")
    axes.set_title(f"Cost of a selective step over the context\n{_what(series[0])}; {where}", fontsize="medium")
    axes.legend(fontsize="small")
    return figure


def _draw_n(series: list[Found], where: str) -> Figure:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    cost, share = figure.subplots(1, 2)
    _draw_over_floor(cost, series, "n")
    cost.set(xlabel="candidates, n", title="Cost of a selective step over the candidates")
    cost.legend(fontsize="small")
    counts = [found["point"]["n"] for found in series]
    narrow, wide = zip(*(shares_of_materialising(found) for found in series), strict=True)
    share.plot(counts, narrow, marker="o", label="Gram products and solve")
    share.plot(counts, wide, marker="o", color="grey", label="with P, its root and the mean gradient")
    share.axhline(SHARE_GOAL, color="black", linestyle="--", linewidth=1, label=f"goal: at most {SHARE_GOAL:.0%}")
    share.set(
        xlabel="candidates, n",
        ylabel="time over that of materialising (%)",
        title="The rest of the Gram matrix, beside materialising",
        ylim=(0, None),
    )
    share.yaxis.set_major_formatter(PercentFormatter(1.0))
    share.legend(fontsize="small")
    for axes in (cost, share):
        _powers(axes)
        axes.set_xticks(counts, [str(count) for count in counts])
    figure.suptitle(f"t = {series[0]['point']['t']}, {_what(series[0])}; {where}", fontsize="medium")
    return figure


def _draw_over_floor(axes: Axes, series: list[Found], axis: str) -> None:
    """Medians of the ratio to the floor with their quartiles, and the same where pages are kept."""
    kept = [{**found["pages_kept"], "point": found["point"]} for found in series if "pages_kept" in found]
    for label, some in (("default allocator settings", series), ("pages kept by the allocator", kept)):
        if not some:
            continue
        x = [found["point"][axis] for found in some]
        ways = [found["ways"]["factors"] for found in some]
        y = [way["over_floor"] for way in ways]
        low = [way["over_floor"] - way["quartiles"][0] / way["floor"] for way in ways]
        high = [way["quartiles"][1] / way["floor"] - way["over_floor"] for way in ways]
        axes.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, label=label)
    axes.axhline(1.0, color="grey", linestyle=":", linewidth=1, label="floor")
    axes.set_ylabel("step over plain AdamW step, over the floor\n(median and quartiles)")
    axes.set_ylim(0.9, None)
    _powers(axes)


def _powers(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())


def _what(found: Found) -> str:
    point = found["point"]
    size = f"width {point['width']}, {point['layers']} layers"
    return f"{point['family'].capitalize()} of {size}, k = m = n / 4, {point['dtype']}"
