"""Charts as inline SVG: lines, stacked areas and bars, with axes and legends, and their numbers in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import final

from ftw_optim.report._data import Series, only_numbers

WIDTH, HEIGHT = 520, 268
MISSING, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 28, 42


def number(value: float | None, *, percent: bool = False) -> str:
    """A number as text for readers; a dash for None."""
    if value is None:
        return MISSING
    if percent:
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} {TIMES} 10{superscript(int(exponent))}"


def superscript(exponent: int) -> str:
    """An exponent in raised digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them."""
    size = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(size))
    unit = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= size * 0.999)
    return [unit * i for i in range(math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9) + 1)]


@final
@dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale of the picture, which maps values from ``low`` to ``high`` to places from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _range(values: Sequence[float], *, zero: bool) -> tuple[float, float, bool]:
    """The lower and upper end of a vertical axis, and whether single values far outside are cut."""
    if not values:
        return 0.0, 1.0, False
    ranked = sorted(values)
    cut = False
    low, high = ranked[0], ranked[-1]
    if len(ranked) >= 20:  # the first steps of an optimizer can be a hundred times the later ones
        trim = max(2, len(ranked) // 40)
        rest = ranked[trim:-trim]
        spread = rest[-1] - rest[0] or abs(rest[-1]) or 1.0
        cut = low < rest[0] - 2 * spread or high > rest[-1] + 2 * spread
        if cut:
            low, high = max(low, rest[0] - 0.1 * spread), min(high, rest[-1] + 0.1 * spread)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.03 * (high - low)
    low, high = low - pad * (low != 0.0), high + pad * (high != 0.0)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
        if zero and low < 0 <= ranked[0]:
            low = 0.0
    return low, high, cut


@final
@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure over the bins of a run.

    Attributes:
        title, note: the texts above the figure; the note says how to read it.
        unit: the unit of the vertical axis.
        series: the values by name; all as long as ``edges``.
        edges: first and last step of each bin.
        kind: ``"lines"``, ``"stack"`` or ``"bars"``.
        limits: the ends of the vertical axis; None: chosen from the values.
        percent: whether the values are shares, to be shown in percent.
        zero: whether the vertical axis of lines shows zero, as it always does for areas and bars.
    """

    title: str
    note: str
    unit: str
    series: Mapping[str, Series]
    edges: Sequence[tuple[int, int]]
    kind: str = "lines"
    limits: tuple[float, float] | None = None
    percent: bool = False
    zero: bool = False

    def html(self, number_of_chart: int) -> str:
        """The HTML of the figure; ``number_of_chart`` makes the ids of its title and description unique."""
        series = {name: values for name, values in self.series.items() if only_numbers(values)}
        if not series:
            return ""
        legend = "".join(
            f'<li><span class="key c{i % 8}{" line" if self.kind == "lines" else ""}"></span>{escape(name)}</li>'
            for i, name in enumerate(series)
        )
        legend = f'<ul class="legend">{legend}</ul>' if len(series) > 1 else ""
        svg, cut = self._svg(series, number_of_chart)
        note = self.note + (" Single values lie outside of what is shown; the table has them." if cut else "")
        return (
            f"<figure><figcaption><h3>{escape(self.title)}</h3><p>{escape(note)}</p></figcaption>"
            f"{legend}{svg}{self._table(series)}</figure>"
        )

    def _svg(self, series: Mapping[str, Series], number_of_chart: int) -> tuple[str, bool]:
        first, last = self.edges[0][0], self.edges[-1][1]
        x = Axis(low=first - (first == last), high=last + (first == last), start=_LEFT, end=WIDTH - _RIGHT)
        stacked = _stacked(list(series.values())) if self.kind == "stack" else [([], list(v)) for v in series.values()]
        shown = [value for _, tops in stacked for value in only_numbers(tops)]
        low, high, cut = _range(shown, zero=self.zero or self.kind != "lines")
        if self.limits is not None:
            low, high, cut = *self.limits, False
        exponent = 0
        largest = max(abs(low), abs(high))
        if not self.percent and (largest < 5e-3 or largest >= 1e5):
            exponent = 3 * math.floor(math.log10(largest) / 3)
        y = Axis(low=low, high=high, start=HEIGHT - _BOTTOM, end=_TOP)
        scale = f" ({TIMES} 10{superscript(exponent)})" if exponent else ""
        parts = [f'<text class="unit" x="2" y="14">{escape(self.unit + scale)}</text>']
        for tick in ticks(low, high):
            if self.kind == "bars" and tick != int(tick):
                continue  # they count
            label = f"{100 * tick:g} %" if self.percent else f"{tick / 10.0**exponent:,.4g}"
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{label}</text>')
        for tick in ticks(x.low, x.high):
            if tick == int(tick) and first <= tick <= last:
                parts.append(below(x(tick), f"{tick:,.0f}"))
        parts.append(f'<text class="unit" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
        draw = {"lines": self._line, "stack": self._area, "bars": self._bars}[self.kind]
        parts += [draw(i % 8, bottom, top, x, y) for i, (bottom, top) in enumerate(stacked)]
        parts += self._tips(series, x)
        name = f"chart{number_of_chart}"
        summary = "; ".join(f"{key}: {_said(values, self.percent)}" for key, values in series.items())
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}t {name}d">'
            f'<title id="{name}t">{escape(self.title)}, {escape(self.unit)} by step</title>'
            f'<desc id="{name}d">{escape(summary)}</desc>{"".join(parts)}</svg>'
        ), cut

    def _middle(self, index: int) -> float:
        return sum(self.edges[index]) / 2

    def _line(self, colour: int, _: Series, values: Series, x: Axis, y: Axis) -> str:
        pieces: list[list[str]] = [[]]
        for index, value in enumerate(values):
            if value is None:
                pieces.append([])
            else:
                pieces[-1].append(f"{x(self._middle(index))},{y(value)}")
        drawn = []
        for piece in filter(None, pieces):
            drawn.append(f'<polyline class="line s{colour}" points="{" ".join(piece)}"/>')
            if len(piece) == 1 or len(values) <= 30:
                points = [point.split(",") for point in piece]
                drawn += [f'<circle class="f{colour}" cx="{px}" cy="{py}" r="2.5"/>' for px, py in points]
        return "".join(drawn)

    def _area(self, colour: int, bottoms: Series, tops: Series, x: Axis, y: Axis) -> str:
        drawn = []
        for start, end in _pieces(tops):
            over, under = [], []
            for index in range(start, end):
                top, bottom = tops[index], bottoms[index]
                assert top is not None
                assert bottom is not None
                # To the edges of the run, and of a gap: one bin is a rectangle.
                left, right = self.edges[index]
                places = [self._middle(index)]
                if index == start:
                    places.insert(0, left - 0.5 if left == right else left)
                if index == end - 1:
                    places.append(right + 0.5 if left == right else right)
                over += [f"{x(place)},{y(top)}" for place in places]
                under += [f"{x(place)},{y(bottom)}" for place in places]
            drawn.append(f'<polygon class="area f{colour}" points="{" ".join([*over, *reversed(under)])}"/>')
        return "".join(drawn)

    def _bars(self, colour: int, _: Series, values: Series, x: Axis, y: Axis) -> str:
        wide = max(1.0, (WIDTH - _LEFT - _RIGHT) / len(values) / len(self.series) - 1)
        return "".join(
            f'<rect class="f{colour}" x="{x(self._middle(i)) + wide * colour - wide * len(self.series) / 2:.1f}" '
            f'y="{y(value)}" width="{wide:.1f}" height="{y(0) - y(value):.1f}"/>'
            for i, value in enumerate(values)
            if value
        )

    def _tips(self, series: Mapping[str, Series], x: Axis) -> list[str]:
        """Invisible columns, one for each bin, which show the values of the bin under the pointer."""
        count = len(self.edges)
        places = [x(self._middle(index)) for index in range(count)]
        borders = [_LEFT, *((a + b) / 2 for a, b in pairwise(places)), WIDTH - _RIGHT]
        return [
            f'<rect class="tip" x="{borders[i]:.1f}" y="{_TOP}" width="{max(0, borders[i + 1] - borders[i]):.1f}" '
            f'height="{HEIGHT - _TOP - _BOTTOM}"><title>{escape(self._label(i))}: '
            + escape(", ".join(f"{name} {number(values[i], percent=self.percent)}" for name, values in series.items()))
            + "</title></rect>"
            for i in range(count)
        ]

    def _label(self, index: int) -> str:
        first, last = self.edges[index]
        return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"

    def _table(self, series: Mapping[str, Series]) -> str:
        rows = [
            [self._label(index), *(number(values[index], percent=self.percent) for values in series.values())]
            for index in range(len(self.edges))
        ]
        return as_table(["step", *series], rows, caption=self.title)


def below(x: float, text: str) -> str:
    """The label of a tick on the horizontal axis; at the right edge it is moved so that it is not cut."""
    anchor = "end" if x > WIDTH - _RIGHT - 16 else "middle"
    return f'<text class="tick" x="{x}" y="{HEIGHT - 22}" text-anchor="{anchor}">{escape(text)}</text>'


def as_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """The numbers of a figure as a table that readers can open."""
    return f"<details><summary>The same as a table</summary>{table(heads, rows, caption=caption)}</details>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """A table whose first column names its rows. Cells are escaped."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    caption = escape(caption)
    # Focusable, so that a keyboard can scroll it.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _said(values: Series, percent: bool) -> str:
    numbers = only_numbers(values)
    first, last = (number(value, percent=percent) for value in (numbers[0], numbers[-1]))
    return f"from {first} to {last}, between {number(min(numbers), percent=percent)} and " + number(
        max(numbers), percent=percent
    )


def _stacked(series: Sequence[Series]) -> list[tuple[Series, Series]]:
    """The bottoms and tops of stacked series; a bin in which nothing was measured stays empty."""
    below: list[float] = [0.0] * len(series[0])
    layers = []
    for values in series:
        present = [any(one[i] is not None for one in series) for i in range(len(values))]
        bottoms: Series = [value if there else None for value, there in zip(below, present, strict=True)]
        below = [base + (value or 0.0) for base, value in zip(below, values, strict=True)]
        layers.append((bottoms, [top if there else None for top, there in zip(below, present, strict=True)]))
    return layers


def _pieces(values: Series) -> list[tuple[int, int]]:
    """The first and the one-past-last index of each run of bins that have values."""
    pieces: list[tuple[int, int]] = []
    for index, value in enumerate(values):
        if value is None:
            continue
        if pieces and pieces[-1][1] == index:
            pieces[-1] = (pieces[-1][0], index + 1)
        else:
            pieces.append((index, index + 1))
    return pieces
