"""The page: which candidates were picked, with which weights, how useful they were, and what it cost."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from itertools import pairwise
from statistics import median

from ftw_optim.report._charts import HEIGHT, MISSING, WIDTH, Axis, Chart, as_table, below, number, table, ticks
from ftw_optim.report._data import Digest, digest, histogram, only_numbers
from ftw_optim.report._samples import EXAMPLES_SHOWN, Example
from ftw_optim.selection_log import LoggedRun

_TEXT_SHOWN = 400  # characters at once
_TEXT_KEPT = 5000  # characters at all
_METRICS_SHOWN = 12
_TARGET_LOSSES = {"target_loss": "trained on", "guide_loss": "guide", "held_out_loss": "held out"}
_KNOWN = frozenset({*_TARGET_LOSSES, "target_share", "blind"})
"""Metrics of a selection with a place of their own on the page."""


def page(run: LoggedRun, *, title: str) -> str:
    """The HTML of a run's page."""
    return page_of(digest(run), title=title)


def page_of(found: Digest, *, title: str) -> str:
    """The HTML of a page with these numbers."""
    body = (
        _empty()
        if not found.steps
        else "".join((_figures(found), _charts(found), _cost(found), _sources(found), _examples(found)))
    )
    style = files("ftw_optim.report").joinpath("_style.css").read_text("utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style}</style></head>'
        f"<body><main><header><h1>{escape(title)}</h1><p>{_period(found)}</p></header>{body}</main></body></html>\n"
    )


def _period(found: Digest) -> str:
    if not found.steps:
        return "No step was logged."
    first, last = found.edges[0][0], found.edges[-1][1]
    binned = f", averaged in {len(found.edges)} bins" if len(found.edges) < found.steps else ""
    steps = f"One step, {first:,}" if found.steps == 1 else f"{found.steps:,} steps, {first:,} to {last:,}{binned}"
    return f"{steps}; {found.candidates:,} candidates offered."


def _empty() -> str:
    return "<p>The log is there, but it holds no step yet: selections are shown here once they are recorded.</p>"


def _figures(found: Digest) -> str:
    """The box with the few most important numbers of the run."""
    kept = sum(one.kept for one in found.totals.values())
    phases = [only_numbers(values) for values in found.phases.values()]
    shown = {
        "candidates kept": number(kept / found.candidates if found.candidates else None, percent=True),
        "effective size": _typical(found, "effective_size"),
        "cosine to the target": _typical(found, "cosine"),
        "steps skipped": f"{sum(found.skipped):,}",
        "candidates rejected": f"{sum(found.rejected):,}",
    }
    blind = only_numbers(found.metrics.get("blind", []))
    if blind:
        shown["steps with a memorised guide"] = number(sum(blind) / len(blind), percent=True)
    if phases:
        shown["ms a step in named phases"] = number(sum(median(values) for values in phases if values))
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in shown.items())
    return f'<dl class="figures">{boxes}</dl>'


def _typical(found: Digest, curve: str) -> str:
    values = only_numbers(found.curves[curve])
    return number(median(values)) if values else MISSING


def _charts(found: Digest) -> str:
    curves = found.curves
    of = {name: curves.get(name, []) for name in ("cosine", "residual", "effective_size", "kept")}
    decreases = {"predicted": curves["predicted_decrease"]}
    if "realised_decrease" in curves:
        decreases["realised"] = curves["realised_decrease"]
    lost = {
        "steps skipped": [float(n) for n in found.skipped],
        "candidates rejected": [float(n) for n in found.rejected],
    }

    def chart(title: str, note: str, unit: str, series: dict[str, list[float | None]], **options: object) -> Chart:
        return Chart(title=title, note=note, unit=unit, series=series, edges=found.edges, **options)  # type: ignore[arg-type]

    share = {"kind": "stack", "limits": (0.0, 1.0), "percent": True}
    charts: list[Chart | str] = [
        chart("Picked", "Each source's share of the weight.", "share of the weight", found.weight, **share),
        chart("Offered", "Each source's share of the candidates.", "share of the candidates", found.offered, **share),
        chart(
            "Utility by source",
            "Mean inner product with the target gradient: above zero, a step along the candidate helps the target.",
            "utility",
            found.utility,
        ),
        _weights(found),
        chart(
            "How well the target is met",
            "Cosine of the applied gradient to the target gradient, and the share of the target left unmatched.",
            "no unit",
            {"cosine": of["cosine"], "residual": of["residual"]},
            zero=True,
        ),
        chart(
            "Kept and effective size",
            "Candidates with a weight, and how many equal weights theirs amount to.",
            "candidates",
            {"kept": of["kept"], "effective size": of["effective_size"]},
            zero=True,
        ),
        chart(
            "Decrease of the target loss", "By one step, as the curvature predicts it.", "loss", decreases, zero=True
        ),
        chart(
            "Loss of the candidates",
            "Mean over all offered, and over the kept by their weights.",
            "loss",
            {"offered": curves["loss, offered"], "by weight": curves["loss, by weight"]},
        ),
        chart(
            "Target rows in the step",
            "The share of the weight of target rows that are trained on.",
            "share of the weight",
            {"target rows": found.metrics.get("target_share", [])},
            limits=(0.0, 1.0),
            percent=True,
        ),
        chart(
            "Loss of the target rows",
            "The guide is memorised where its loss falls below that of rows that nothing is trained on.",
            "loss",
            {label: found.metrics.get(name, []) for name, label in _TARGET_LOSSES.items()},
        ),
        chart("Cost of a step", "Mean time by phase.", "milliseconds", found.phases, kind="stack"),
    ]
    if any(found.skipped) or any(found.rejected):
        charts.append(
            chart(
                "Skipped and rejected",
                "Steps at which nothing was applied; candidates whose loss or gradient was not finite.",
                "count",
                {name: list(values) for name, values in lost.items() if any(values)},
                kind="bars",
            )
        )
    metrics = {name: values for name, values in found.metrics.items() if name not in _KNOWN}
    if len(metrics) > _METRICS_SHOWN:
        names = ", ".join(list(metrics)[_METRICS_SHOWN:])
        charts.append(f'<p class="wide">Further metrics in the log: {escape(names)}.</p>')
    charts += [
        chart(name, "A metric of the training loop.", "value", {name: values})
        for name, values in list(metrics.items())[:_METRICS_SHOWN]
    ]
    drawn = [one if isinstance(one, str) else one.html(i) for i, one in enumerate(charts)]
    return f'<section aria-label="Charts" class="charts">{"".join(drawn)}</section>'


def _weights(found: Digest) -> str:
    """The histogram of the kept candidates' shares of the weight."""
    if not found.shares:
        return ""
    edges, counts = histogram(found.shares)
    left, bottom = 54, HEIGHT - 42
    x = Axis(low=0.0, high=edges[-1], start=left, end=WIDTH - 12)
    y = Axis(low=0.0, high=float(max(counts.values())), start=bottom, end=28)
    label = "candidates kept"
    parts = [f'<text class="unit" x="2" y="14">{label}</text>']
    parts += [
        f'<line class="grid" x1="{left}" x2="{WIDTH - 12}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text class="tick" x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{_short(tick)}</text>'
        for tick in ticks(0.0, y.high)
        if tick == int(tick)
    ]
    parts += [below(x(tick), f"{100 * tick:g} %") for tick in ticks(0.0, edges[-1])]
    parts.append(
        f'<text class="unit" x="{WIDTH - 12}" y="{HEIGHT - 4}" text-anchor="end">share of its step\'s weight</text>'
    )
    rows = []
    for index, (low, high) in enumerate(pairwise(edges)):
        count = counts[index]
        name = f"{number(low, percent=True)} to {number(high, percent=True)}"
        rows.append([name, f"{count:,}"])
        parts.append(
            f'<rect class="f0" x="{x(low)}" y="{y(count)}" width="{max(0.5, x(high) - x(low) - 1):.1f}" '
            f'height="{bottom - y(count):.1f}"><title>{name}: {count:,}</title></rect>'
        )
    title = "Distribution of the weights"
    note = "Of all kept candidates, each one's share of the weight at its step."
    typical, largest = (number(value, percent=True) for value in (median(found.shares), max(found.shares)))
    said = f"{len(found.shares):,} weights, median {typical}, largest {largest}"
    return (
        f"<figure><figcaption><h3>{title}</h3><p>{note}</p></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="weights-t weights-d">'
        f'<title id="weights-t">{title}</title><desc id="weights-d">{said}</desc>{"".join(parts)}</svg>'
        f"{as_table(['share', label], rows, caption=title)}</figure>"
    )


def _short(count: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{suffix}"
    return f"{count:g}"


def _sources(found: Digest) -> str:
    weights = sum(one.weight for one in found.totals.values())
    rows = []
    for name, one in found.totals.items():
        offered = one.offered / found.candidates
        weight = one.weight / weights if weights else None
        rows.append(
            [
                name,
                f"{weight / offered:.2f}" if weight is not None else MISSING,
                number(weight, percent=True),
                number(offered, percent=True),
                f"{one.kept:,}",
                f"{one.offered:,}",
                number(one.utility / one.utilities if one.utilities else None),
            ]
        )
    heads = ["source", "weight / offered", "share of weight", "share offered", "kept", "offered", "mean utility"]
    note = "Over the whole run. Weight / offered is above 1 for sources that were preferred."
    return f"<section><h2>Sources</h2><p>{note}</p>{table(heads, rows, caption='Sources')}</section>"


def _cost(found: Digest) -> str:
    """What selection cost and saved, in words."""
    if not found.cost.steps:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found.cost.sentences())
    return f"<section><h2>What selection cost</h2><ul>{items}</ul></section>"


def _examples(found: Digest) -> str:
    if not found.most and not found.least:
        return ""
    note = (
        f"Up to {EXAMPLES_SHOWN} samples on each side, by their utility in units of the mean size at their step, "
        "averaged over the steps that offered them (with one offer of zero added to each)."
    )
    if not found.has_texts:
        note += " The log holds no texts: pass texts= to SelectionLog.record to see them here."
    lists = [
        f'<div><h3>{title}</h3><ol class="examples">{"".join(map(_example, examples))}</ol></div>'
        for title, examples in (("Most useful", found.most), ("Least useful", found.least))
        if examples
    ]
    return f'<section><h2>Examples</h2><p>{escape(note)}</p><div class="columns">{"".join(lists)}</div></section>'


def _example(one: Example) -> str:
    facts = (
        f"utility {one.score:+.2f}; offered {one.offered:,} times, kept {one.kept:,} times; mean share of the weight "
        f"{number(one.share, percent=True)}"
    )
    head = f'<p class="name"><b>{escape(one.id)}</b> <span class="source">{escape(one.source)}</span></p>'
    return f'<li>{head}<p class="facts">{escape(facts)}</p>{_text(one.text)}</li>'


def _text(text: str | None) -> str:
    if text is None:
        return ""
    if len(text) <= _TEXT_SHOWN:
        return f'<pre dir="auto">{escape(text)}</pre>'
    rest = f"… ({len(text):,} characters)" if len(text) > _TEXT_KEPT else ""
    return (
        f'<details class="text"><summary><pre dir="auto">{escape(text[:_TEXT_SHOWN])}…</pre>'
        "<span>Whole text</span></summary>"
        f'<pre dir="auto">{escape(text[:_TEXT_KEPT])}{rest}</pre></details>'
    )
