"""The selection log: what comes back is what was recorded, also when the run was killed and resumed."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw_optim import Selection
from ftw_optim.selection_log import LoggedRun, SelectionLog, read_log
from tests.support.selections import selection

FORMATS = ["jsonl", "parquet"]


def new_log(directory: Path, **options: Any) -> SelectionLog:
    """With several Parquet files within a few steps."""
    return SelectionLog(directory, **{"rows_per_part": 12, **options})


def record(log: SelectionLog, step: int, **changes: Any) -> None:
    """What some step of every run in this module logs: ids come again, metrics come and go."""
    generator = random.Random(step)
    ids = [f"s{generator.randrange(20)}" for _ in range(5)]
    metrics = {"lr": 0.1 / step} | ({"realised_decrease": -0.5} if step % 3 == 0 else {}) | {"ms_target": 1.5 * step}
    log.record(
        step,
        selection(step, **changes),
        ids=ids,
        sources=[f"source {name[-1]}" for name in ids],
        metrics=metrics,
        texts=[f"text of {name}: ü 文 \u2028 \n" for name in ids],
    )


def contents(run: LoggedRun) -> dict[str, list[Any]]:
    return {"steps": run.steps, "candidates": list(run.candidates()), "texts": list(run.texts())}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# ---------------------------------------------------------------------- what is recorded is what is read


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_recorded_is_what_is_read(tmp_path: Path, format: str) -> None:
    chosen = selection(1, kept=torch.tensor([3, 1]), weights=torch.tensor([0.75, 0.25], dtype=torch.float64))
    with new_log(tmp_path / "new" / "log", format=format) as log:
        log.record(
            4, chosen, ids=["a", 7, "c", "d", "a"], sources=list("xyzxy"), metrics={"lr": 0.5}, texts=list("PQRST")
        )
        log.record(6, chosen, ids=[1, 2, 3, 4, 5])
    run = read_log(tmp_path / "new" / "log")
    rows = list(run.candidates())
    assert [row["weight"] for row in rows] == [0.0, 0.25, 0.0, 0.75, 0.0] * 2
    assert [row["loss"] for row in rows[:5]] == chosen.losses.tolist()
    assert [row["utility"] for row in rows[:5]] == chosen.cross_gram.tolist()
    assert [row["id"] for row in rows] == ["a", "7", "c", "d", "a", "1", "2", "3", "4", "5"]
    assert [row["source"] for row in rows] == [*"xyzxy", None, None, None, None, None]
    assert [row["step"] for row in rows] == [4] * 5 + [6] * 5
    assert dict(run.texts()) == {"a": "P", "7": "Q", "c": "R", "d": "S"}  # the first text of an id
    first, second = run.steps
    assert first == {
        "step": 4,
        "offered": 5,
        "kept": 2,
        "kept_share": 0.4,
        "effective_size": 1.5,
        "residual": 0.75,
        "cosine": 0.5,
        "predicted_decrease": 1e-3,
        "fitted_scale": 0.7,
        "rejected": [],
        "skipped": False,
        "converged": True,
        "combine": "factors",
        "metrics": {"lr": 0.5},
        "ms": {},
    }
    assert second["metrics"] == {}


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    for format in FORMATS:
        with new_log(tmp_path / format, format=format) as log:
            for step in range(1, 12):
                record(log, step)
    assert contents(read_log(tmp_path / "jsonl")) == contents(read_log(tmp_path / "parquet"))
    assert len(list((tmp_path / "parquet").glob("steps-*"))) > 2


@pytest.mark.parametrize("format", FORMATS)
def test_times_are_apart_so_that_the_rest_is_the_same_in_every_run(tmp_path: Path, format: str) -> None:
    times = [{"ms_target": 1.0, "selection/ms/gram": 2.0}, {"ms_target": 9.0, "selection/ms/gram": 8.0}]
    for name, ms in zip("ab", times, strict=True):
        with new_log(tmp_path / name, format=format) as log:
            log.record(1, selection(1), ids=range(5), metrics={"lr": 1.0, "items": 3.0, **ms})
        (row,) = read_log(tmp_path / name).steps
        assert row["ms"] == ms
        assert row["metrics"] == {"lr": 1.0, "items": 3.0}
    a, b = (
        {name: data for name, data in files(tmp_path / run).items() if not name.startswith("times")} for run in "ab"
    )
    assert a == b


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path: Path, format: str) -> None:
    nothing = torch.empty(0)
    bad = selection(1, kept=nothing.long(), weights=nothing.double(), cosine=math.nan, combine="skipped", skipped=True)
    losses = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 2.0])
    with new_log(tmp_path, format=format) as log:
        log.record(
            1,
            Selection(**{**vars(bad), "losses": losses, "rejected": torch.tensor([0, 1, 2])}),
            ids=list("abcde"),
            metrics={"grad_norm": math.inf},
            texts=["\ud800 half a pair", "", "", "", ""],
        )
    if format == "jsonl":
        for path in tmp_path.iterdir():
            for line in path.read_text("utf-8").splitlines():
                json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    run = read_log(tmp_path)
    assert [row["loss"] for row in run.candidates()] == [None, None, None, 1.0, 2.0]
    (step,) = run.steps
    assert step["cosine"] is None
    assert step["metrics"] == {"grad_norm": None}
    assert step["rejected"] == ["a", "b", "c"]
    assert step["skipped"]
    assert step["kept"] == 0
    assert dict(run.texts())["a"] == "? half a pair"


# ---------------------------------------------------------------------- killed and resumed


@st.composite
def interruptions(draw: st.DrawFn) -> tuple[int, int, int, bytes]:
    """Steps of a run, the step of its checkpoint, that at which it was killed, and half a line."""
    steps = draw(st.integers(1, 9))
    checkpoint = draw(st.integers(0, steps))
    return (
        steps,
        checkpoint,
        draw(st.integers(checkpoint, steps)),
        draw(st.sampled_from([b"", b'{"st', b"{}\xc3", b"x"])),
    )


@pytest.mark.parametrize("format", FORMATS)
@given(interruptions())
@settings(max_examples=40)
def test_a_resumed_log_is_that_of_an_uninterrupted_run(format: str, interruption: tuple[int, int, int, bytes]) -> None:
    steps, checkpoint, killed, torn = interruption
    with TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        with new_log(whole, format=format) as log:
            for step in range(1, steps + 1):
                record(log, step)

        log = new_log(broken, format=format)
        state = log.state_dict()
        for step in range(1, killed + 1):
            record(log, step)
            if step == checkpoint:
                state = json.loads(json.dumps(log.state_dict()))  # plain values
        if broken.exists():  # not closed: what Parquet holds back is lost
            for path in broken.glob("*.jsonl"):
                path.write_bytes(path.read_bytes() + torn)
            (broken / "steps.unfinished").write_bytes(b"PAR1")
        del log

        with new_log(broken, format=format) as log:
            log.load_state_dict(state)
            for step in range(checkpoint + 1, steps + 1):
                record(log, step)
        if format == "jsonl":
            assert {n: b for n, b in files(broken).items() if n != "steps.unfinished"} == files(whole)
        assert contents(read_log(broken)) == contents(read_log(whole))


@pytest.mark.parametrize("format", FORMATS)
def test_a_log_rolls_back_within_one_process(tmp_path: Path, format: str) -> None:
    with (
        new_log(tmp_path / "rolled", format=format) as log,
        new_log(tmp_path / "plain", format=format) as plain,
    ):
        for step in (1, 2):
            record(log, step)
            record(plain, step)
        state = log.state_dict()
        for step in (3, 4):
            record(log, step, cosine=-1.0)
        log.load_state_dict(state)
        for step in (3, 4):
            record(log, step)
            record(plain, step)
    assert contents(read_log(tmp_path / "rolled")) == contents(read_log(tmp_path / "plain"))


@pytest.mark.parametrize("table", ["steps", "candidates", "texts", "times"])
def test_a_torn_last_line_is_left_out_and_so_is_a_step_that_was_not_finished(tmp_path: Path, table: str) -> None:
    with new_log(tmp_path) as log:
        for step in (1, 2, 3):
            record(log, step)
    before = contents(read_log(tmp_path))
    path = tmp_path / f"{table}.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    after = contents(read_log(tmp_path))
    lost = {"steps": ("steps", 1), "candidates": ("candidates", 1), "texts": ("texts", 1)}.get(table)
    if lost is not None:
        assert after[lost[0]] == before[lost[0]][: -lost[1]]
    if table == "steps":
        assert after["candidates"] == before["candidates"][:-5]
    if table == "times":
        assert [row["ms"] for row in after["steps"]] == [{"ms_target": 1.5}, {"ms_target": 3.0}, {}]


def test_a_line_that_is_broken_elsewhere_is_an_error(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        for step in (1, 2):
            record(log, step)
    path = tmp_path / "steps.jsonl"
    path.write_bytes(path.read_bytes()[3:])
    with pytest.raises(ValueError, match=r"Expected JSON in line 1 of .*steps\.jsonl"):
        read_log(tmp_path)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("format", FORMATS)
def test_a_log_that_is_there_is_neither_overwritten_nor_continued_unasked(tmp_path: Path, format: str) -> None:
    with new_log(tmp_path) as log:
        record(log, 1)
    with pytest.raises(FileExistsError, match=r"Expected no log in .*texts\.jsonl.*load_state_dict.*overwrite=True"):
        record(new_log(tmp_path, format=format), 1)
    with pytest.raises(FileExistsError, match="Expected no log"):
        new_log(tmp_path, format=format).state_dict()
    (tmp_path / "notes.jsonl").write_text("mine")
    with new_log(tmp_path, format=format, overwrite=True) as log:
        record(log, 2)
    assert [row["step"] for row in read_log(tmp_path).steps] == [2]
    assert (tmp_path / "notes.jsonl").read_text() == "mine"


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_of_another_log_is_refused_and_nothing_is_cut(tmp_path: Path, format: str) -> None:
    with new_log(tmp_path / "long", format=format) as log:
        for step in range(1, 9):
            record(log, step)
            log.state_dict()
        state = log.state_dict()
    with new_log(tmp_path / "short", format=format) as log:
        record(log, 1)
    before = files(tmp_path / "short")
    with pytest.raises(ValueError, match="the log of another run, or was removed"):
        new_log(tmp_path / "short", format=format).load_state_dict(state)
    assert files(tmp_path / "short") == before
    other = FORMATS[format == "jsonl"]
    with pytest.raises(ValueError, match=f"Expected the state of a log with format='{other}'"):
        new_log(tmp_path / "short", format=other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"what SelectionLog\.state_dict\(\) returned, got the keys \['step'\]"):
        new_log(tmp_path / "short", format=format).load_state_dict({"step": 1})


def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of 'jsonl', 'parquet', got 'csv'"):
        new_log(tmp_path, format="csv")
    with pytest.raises(ValueError, match="rows_per_part must be at least 1, got 0"):
        new_log(tmp_path, rows_per_part=0)
    log = new_log(tmp_path)
    record(log, 3)
    before = files(tmp_path)
    ids = list(range(5))
    for wrong, options in {
        "Expected a step after 3, the last one logged, got 3": {"step": 3, "ids": ids},
        "Expected 5 ids, one for each candidate, got 4": {"step": 4, "ids": ids[:4]},
        "Expected 5 sources, one for each candidate, got 1": {"step": 4, "ids": ids, "sources": ["a"]},
        "Expected 5 texts, one for each candidate, got 6": {"step": 4, "ids": ids, "texts": list("abcdef")},
    }.items():
        with pytest.raises(ValueError, match=wrong):
            log.record(selection=selection(1), **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metric 'lr' as a number, got a tensor on meta"):
        log.record(4, selection(1), ids=ids, metrics={"lr": torch.ones((), device="meta")})  # type: ignore[dict-item]
    assert files(tmp_path) == before
    log.close()
    with pytest.raises(RuntimeError, match="is closed"):
        record(log, 5)


def test_reading_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        read_log(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"steps\.jsonl or steps-000000\.parquet"):
        read_log(tmp_path)
    with new_log(tmp_path / "a") as log:
        record(log, 1)
    assert read_log(tmp_path).directory == tmp_path / "a"  # a run's directory with one log in a folder
    with new_log(tmp_path / "b") as log:
        record(log, 1)
    with pytest.raises(ValueError, match="found several"):
        read_log(tmp_path)


@pytest.fixture
def _without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("_without_pyarrow")
def test_only_parquet_needs_pyarrow(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        record(log, 1)
    assert len(list(read_log(tmp_path).candidates())) == 5
    with pytest.raises(ImportError, match=r"ftw-optim\[datasets\]"):
        new_log(tmp_path, format="parquet")


def test_target_rows_in_the_step_are_logged_with_it(tmp_path: Path) -> None:
    changes = {
        "weights": torch.tensor([0.25, 0.25], dtype=torch.float64),
        "target_weights": torch.tensor([0.375, 0.125], dtype=torch.float64),
        "target_losses": torch.tensor([1.0, 2.0]),
    }
    with SelectionLog(tmp_path) as log:
        log.record(1, selection(1), ids=range(5))
        log.record(2, selection(2, **changes), ids=range(5), metrics={"lr": 0.5})
    first, second = (json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines())
    assert first["metrics"] == {}
    assert second["metrics"] == {"target_share": 0.5, "target_loss": 1.5, "lr": 0.5}
