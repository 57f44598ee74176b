"""The table as a picture: test loss against steps and seconds, and which records had the weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from pays.arms import ARMS
from pays.report import Figures

HEADROOM = 0.2
"""How far above the loss at the start the picture goes, as a share of what the best arm gains."""


def write_picture(figures: Sequence[Figures], directory: Path) -> None:
    """``finetune.png``, for the figures of some arms."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    by_steps, by_seconds, by_source = figure.subplots(1, 3)
    colours = dict(zip([one.arm for one in figures], matplotlib.color_sequences["tab10"], strict=False))
    labels = {one.arm: ARMS[one.arm.split(":")[0]].label for one in figures}
    for one in figures:
        line = "--" if ARMS[one.arm.split(":")[0]].method is None else "-"
        for axes, x in ((by_steps, one.at), (by_seconds, one.seconds)):
            axes.plot(x, one.curve, line, color=colours[one.arm], marker="o", markersize=3, label=labels[one.arm])
    start, lowest = figures[0].curve[0], min(min(one.curve) for one in figures)
    top = start + HEADROOM * (start - lowest)
    if lowest < start and top < max(max(one.curve) for one in figures):
        for axes in (by_steps, by_seconds):
            axes.set_ylim(lowest - HEADROOM / 2 * (start - lowest), top)  # what is memorised would flatten all others
    by_steps.set(xlabel="steps", ylabel="test loss on the target (dashed: no selection)")
    by_seconds.set(xlabel="CPU seconds of training")
    by_steps.legend(fontsize="small")
    shown = [one for one in figures if one.rows[0]]
    damaged = any(one.damaged[1] for one in shown)
    by_source.barh(
        [labels[one.arm] for one in shown],
        [one.damaged[1] if damaged else one.own[1] for one in shown],
        color=[colours[one.arm] for one in shown],
    )
    by_source.invert_yaxis()
    whose = "damaged records" if damaged else "the target's own source"
    by_source.set(xlabel=f"share of the pool records' weight that {whose} had", xlim=(0, 1))
    figure.savefig(directory / "finetune.png", dpi=120)
