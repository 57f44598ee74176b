"""The page about a run: its numbers against the rows of the log, its HTML against a parser, and runs of every size."""

from __future__ import annotations

import math
import random
import re
import sys
from collections import defaultdict
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw_optim.report import page
from ftw_optim.report.__main__ import main
from ftw_optim.report._charts import Chart, number, ticks
from ftw_optim.report._data import MOST_BINS, SOURCES_SHOWN, digest
from ftw_optim.report._demo import DEMO, STEPS, record_demo
from ftw_optim.selection_log import LoggedRun, SelectionLog, read_log
from tests.support.selections import selection

HOSTILE = """<script>alert("1")</script>&amp;'\" 文 😀"""


class Page(HTMLParser):
    """What a page consists of; an unbalanced tag fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def says(self, words: str) -> bool:
        return words in " ".join("".join(self.text).split())


def logged(
    directory: Path, steps: int, *, sources: int = 3, texts: bool = True, n: int = 6, **changes: Any
) -> LoggedRun:
    """A run whose numbers are drawn; some steps are skipped, some candidates rejected."""
    draw = random.Random(steps)
    with SelectionLog(directory) as log:
        for step in range(1, steps + 1):
            fields = dict(changes)
            if step % 7 == 3:
                fields |= {"weights": torch.zeros(2, dtype=torch.float64), "skipped": True, "effective_size": 0.0}
            chosen = selection(step, n=n, **fields)
            if step % 5 == 2:
                chosen.losses[0] = math.nan
                object.__setattr__(chosen, "rejected", torch.tensor([0]))
            ids = [draw.randrange(30) for _ in range(n)]
            metrics = {"lr": 1.0 / step, "ms_target": 2.0, "selection/ms/gram": 3.0 + step}
            log.record(
                step,
                chosen,
                ids=ids,
                sources=[f"source {name % sources}" for name in ids],
                metrics=metrics | ({"selection/realised_decrease": 0.1} if step % 4 == 0 else {}),
                texts=[f"text of {name} {HOSTILE}" for name in ids] if texts else None,
            )
    return read_log(directory)


# ---------------------------------------------------------------------- its numbers


@given(steps=st.integers(1, 300), sources=st.integers(1, 12))
@settings(max_examples=12)
def test_shares_and_means_are_those_of_the_rows(steps: int, sources: int) -> None:
    with TemporaryDirectory() as folder:
        run = logged(Path(folder), steps, sources=sources)
        found = digest(run)
        rows = list(run.candidates())
    assert found.steps == steps
    assert found.candidates == len(rows) == 6 * steps
    assert len(found.edges) == min(steps, MOST_BINS)
    covered = [step for first, last in found.edges for step in range(first, last + 1)]
    assert covered == list(range(1, steps + 1))

    total = defaultdict(float)
    for row in rows:
        total[row["step"]] += row["weight"]
    assert len(found.offered) == min(len(found.totals), SOURCES_SHOWN)
    named = [name for name in found.offered if name in found.totals]
    for at, (first, last) in enumerate(found.edges):
        here = [row for row in rows if first <= row["step"] <= last]
        applied = [row for row in here if total[row["step"]]]
        steps_applied = len({row["step"] for row in applied})
        for name in named:
            of_source = [row for row in here if row["source"] == name]
            assert found.offered[name][at] == pytest.approx(len(of_source) / len(here))
            weight = sum(row["weight"] / total[row["step"]] for row in applied if row["source"] == name)
            assert found.weight[name][at] == (pytest.approx(weight / steps_applied) if steps_applied else None)
            utilities = [row["utility"] for row in of_source]
            assert found.utility[name][at] == (pytest.approx(sum(utilities) / len(utilities)) if utilities else None)
        of_steps = [row for row in run.steps if first <= row["step"] <= last]
        assert found.skipped[at] == sum(row["skipped"] for row in of_steps)
        assert found.rejected[at] == sum(len(row["rejected"]) for row in of_steps)
        for shares, what in ((found.offered, True), (found.weight, bool(steps_applied))):
            values = [series[at] for series in shares.values()]
            assert sum(values) == pytest.approx(1.0) if what else values == [None] * len(values)
        assert found.phases["selection/gram"][at] == pytest.approx(
            sum(3.0 + row["step"] for row in of_steps) / len(of_steps)
        )
    assert found.phases.keys() == {"target", "selection/gram"}
    assert found.metrics.keys() == {"lr"}
    assert sum(found.shares) == pytest.approx(sum(1 for value in total.values() if value))
    for name, one in found.totals.items():
        assert one.offered == sum(row["source"] == name for row in rows)
        assert one.kept == sum(row["source"] == name and row["weight"] > 0 for row in rows)


def test_examples_are_ranked_by_utility_beside_that_of_their_step(tmp_path: Path) -> None:
    run = logged(tmp_path, 50)
    sums: dict[str, list[float]] = defaultdict(list)
    rows = list(run.candidates())
    for step in range(1, 51):
        here = [row for row in rows if row["step"] == step]
        size = sum(abs(row["utility"]) for row in here) / len(here)
        for row in here:
            sums[row["id"]].append(row["utility"] / size)
    scores = {name: sum(values) / (len(values) + 1) for name, values in sums.items()}
    found = digest(run)
    ranked = sorted(scores, key=lambda name: -scores[name])
    assert [one.id for one in found.most] == [name for name in ranked[:10] if scores[name] > 0]
    assert [one.id for one in found.least] == [name for name in ranked[::-1][:10] if scores[name] < 0]
    for one in (*found.most, *found.least):
        assert one.score == pytest.approx(scores[one.id])
        assert one.offered == len(sums[one.id])
        assert one.kept == sum(row["weight"] > 0 for row in rows if row["id"] == one.id)
        assert one.text == f"text of {one.id} {HOSTILE}"


# ---------------------------------------------------------------------- its HTML


def check(html: str) -> Page:
    """A page that stands alone, whose pictures have names and tables, and whose ids are unique."""
    parsed = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert not [
        name for _, attributes in parsed.tags for name in attributes if name.startswith("on") or name in ("src", "href")
    ]
    assert "url(" not in html
    assert "@import" not in html
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    pictures = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) <= set(ids)
    assert sum(tag == "figure" for tag, _ in parsed.tags) == len(pictures)
    assert sum(tag == "table" for tag, _ in parsed.tags) >= len(pictures)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)
    return parsed


@pytest.mark.parametrize("steps", [1, 2, 30, 119, 121, 500])
@pytest.mark.parametrize("sources", [1, 12])
def test_runs_of_every_size_have_a_page(tmp_path: Path, steps: int, sources: int) -> None:
    parsed = check(page(logged(tmp_path, steps, sources=sources), title="A run"))
    for words in (
        "Picked",
        "Offered",
        "Utility by source",
        "Distribution of the weights",
        "Cost of a step",
        "Most useful",
    ):
        assert parsed.says(words), words
    assert parsed.says("Skipped and rejected") == (steps > 1)
    assert parsed.says(f"text of 1 {HOSTILE}"[:9])
    assert parsed.says("other sources") == (sources > SOURCES_SHOWN and steps > 2)


def test_target_rows_have_charts_of_their_own(tmp_path: Path) -> None:
    watched = {
        "target_losses": torch.tensor([1.0, 3.0]),
        "target_weights": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "guide_loss": 2.0,
        "held_out_loss": 2.5,
    }
    with SelectionLog(tmp_path) as log:
        for step in range(1, 5):
            log.record(step, selection(step, blind=step > 1, **watched), ids=range(5))
    parsed = check(page(read_log(tmp_path), title="A run"))
    for words in ("Target rows in the step", "Loss of the target rows", "steps with a memorised guide75.0"):
        assert parsed.says(words), words
    told = " ".join("".join(parsed.text).split())
    assert all(told.count(name) >= 2 for name in ("trained on", "held out")), "in the legend and in the table"
    assert not parsed.says("A metric of the training loop")
    alone = check(page(logged(tmp_path / "other", 4), title="A run"))
    assert not any(alone.says(words) for words in ("Target rows in", "Loss of the target rows", "memorised guide"))


def test_what_the_log_says_is_escaped(tmp_path: Path) -> None:
    with SelectionLog(tmp_path) as log:
        log.record(
            1, selection(1), ids=[HOSTILE] * 5, sources=[HOSTILE] * 5, metrics={HOSTILE: 1.0}, texts=[HOSTILE] * 5
        )
    html = page(read_log(tmp_path), title=HOSTILE)
    parsed = check(html)
    assert "<script" not in html
    assert parsed.says(HOSTILE)
    assert all(value is None or "<" not in value or '"1"' in value for _, a in parsed.tags for value in a.values())


def test_long_texts_are_folded_and_cut(tmp_path: Path) -> None:
    with SelectionLog(tmp_path) as log:
        log.record(1, selection(1), ids=range(5), texts=["short", "m" * 900, "x" * 90_000, "y" * 90_000, "z" * 90_000])
    html = page(read_log(tmp_path), title="A run")
    check(html)
    assert "… (90,000 characters)" in html
    assert len(html) < 90_000


def test_an_empty_log_has_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").touch()
    parsed = check(page(read_log(tmp_path), title="A run"))
    assert parsed.says("it holds no step yet")


def test_missing_texts_sources_and_numbers_are_no_hindrance(tmp_path: Path) -> None:
    nothing = torch.empty(0)
    with SelectionLog(tmp_path) as log:
        for step in (1, 2):
            chosen = selection(
                step,
                losses=torch.full((5,), math.nan),
                cross_gram=torch.zeros(5),
                kept=nothing.long(),
                weights=nothing.double(),
                rejected=torch.arange(5),
                cosine=math.nan,
                skipped=True,
                combine="skipped",
            )
            log.record(step, chosen, ids=range(5))
    parsed = check(page(read_log(tmp_path), title="A run"))
    assert parsed.says("(no source)")
    assert not parsed.says("Picked")
    assert not parsed.says("Examples")
    with SelectionLog(tmp_path / "other") as log:
        log.record(1, selection(1), ids=range(5))
    assert check(page(read_log(tmp_path / "other"), title="A run")).says("The log holds no texts: pass texts=")


def test_single_values_far_outside_do_not_flatten_a_curve() -> None:
    edges = [(i, i) for i in range(60)]
    values: list[float | None] = [1000.0, *(1.0 + 0.1 * (i % 5) for i in range(59))]
    html = Chart(title="A", note="B.", unit="C", series={"a": values}, edges=edges).html(0)
    assert "Single values lie outside of what is shown" in html
    assert "steps" not in html
    assert "1,000" in html  # the table has it
    points = [tuple(map(float, point.split(","))) for point in re.findall(r'points="([^"]*)"', html)[0].split()]
    assert max(y for _, y in points[1:]) - min(y for _, y in points[1:]) > 100


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_round_and_inside(low: float, size: float) -> None:
    high = low + max(size, abs(low) * 1e-6)
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in found)


def test_numbers_for_people() -> None:
    assert [number(value) for value in (0, 0.5, 12, 12345, 1.5e-5, -2.25e7, None)] == [
        "0",
        "0.5",
        "12",
        "12,345",
        "1.50 × 10⁻⁵",  # noqa: RUF001
        "-2.25 × 10⁷",  # noqa: RUF001
        "–",  # noqa: RUF001
    ]
    assert number(0.25, percent=True) == "25.0\N{NO-BREAK SPACE}%"


STYLE = files("ftw_optim.report").joinpath("_style.css").read_text("utf-8")


def test_the_labels_of_two_axes_are_a_line_apart() -> None:
    """At the size of phones too: the first step's number is long, and lies below the lowest label of the other axis."""
    edges = [(100_000 + i, 100_000 + i) for i in range(40)]
    html = Chart(title="A", note="B.", unit="C", series={"a": [0.0, 1.0] * 20}, edges=edges, zero=True).html(0)
    ticks = re.findall(r'<text class="tick" [^>]*y="([\d.]+)" text-anchor="(\w+)">([^<]*)<', html)
    lowest = max(float(y) for y, anchor, _ in ticks if anchor == "end")
    ((first, *_),) = [(float(y), text) for y, _, text in ticks if text == "100,000"]
    assert first - lowest >= max(map(float, re.findall(r"svg text \{[^}]*font-size: ([\d.]+)px", STYLE)))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_ground(scheme: int) -> None:
    """Text by 4.5 to 1 and lines by 3 to 1, as WCAG 2.2 asks for (1.4.3 and 1.4.11)."""
    colours = dict(re.findall(r"--(\w+): (#\w+);", re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for name, least in {"text": 4.5, "quiet": 4.5, **{f"c{place}": 3.0 for place in range(8)}}.items():
        for ground in ("ground", "panel"):
            low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= least, f"{name} on {ground}"


# ---------------------------------------------------------------------- the command


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path / "run" / "log", 5)
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'} (5 steps)\n"
    assert check((tmp_path / "run" / "report.html").read_text("utf-8")).says("Selection in run")
    out = tmp_path / "new" / "page.html"
    assert main([str(tmp_path / "run" / "log"), "--out", str(out), "--title", "My & own"]) == 0
    assert check(out.read_text("utf-8")).says("My & own")


def test_the_command_says_what_it_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, words in ((tmp_path, "Expected a selection log in"), (tmp_path / "none", "there is no directory")):
        assert main([str(run)]) == 2
        assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_to_a_terminal_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(tmp_path, 3)
    main([str(tmp_path)])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main([str(tmp_path)])
    assert "reading the log:   0 %" in capsys.readouterr().err


def test_the_demonstration_is_a_run_that_picks_right_sums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--demo"]) == 0
    assert capsys.readouterr().out == f"{DEMO / 'report.html'} ({STEPS} steps)\n"
    parsed = check((DEMO / "report.html").read_text("utf-8"))
    for title in ("Picked", "Utility by source", "Decrease of the target loss", "Loss of the target rows", "Examples"):
        assert parsed.says(title)
    found = digest(read_log(DEMO))
    weights = {source: one.weight for source, one in found.totals.items()}
    assert weights["sums"] > 0.5 * sum(weights.values())
    losses = [loss for loss in found.metrics["held_out_loss"] if loss is not None]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_the_demonstration_is_the_same_again_and_replaces_what_was_there(tmp_path: Path) -> None:
    record_demo(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    record_demo(tmp_path)
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert first.pop("times.jsonl")
    assert again.pop("times.jsonl")
    assert first == again


@pytest.mark.parametrize("arguments", [[], ["run", "--demo"]], ids=["neither", "both"])
def test_the_command_takes_a_run_or_the_demonstration(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected the directory of a log, RUN, or --demo, and not both" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
