"""The seconds of a run: sums of what was measured, and an estimate of plain steps that holds by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftw_optim import GreedyFilter, SelectiveOptimizer
from ftw_optim.report import page
from ftw_optim.selection_log import Cost, SelectionLog, cost_of, read_log
from tests.support.selections import selection

TIMES = {"target": 100.0, "candidates": 300.0, "gram": 50.0, "solve": 30.0, "combine": 120.0}


@pytest.mark.parametrize(
    ("combine", "plain"), [("factors", 0.42), ("graph", 0.18), ("rerun", 0.48)], ids=["factors", "graph", "rerun"]
)
def test_plain_steps_are_estimated_by_the_way_of_combining(combine: str, plain: float) -> None:
    cost = Cost()
    for _ in range(3):
        cost.add(TIMES | {"ms_of_others": 9.0}, combine=combine, offered=16, kept=4)
    assert cost.total == pytest.approx(1.8)
    assert cost.plain == pytest.approx(3 * plain)
    assert cost.extra == pytest.approx(1.8 - 3 * plain)
    assert cost.numbers() == {
        "seconds": cost.total,
        "plain_seconds": cost.plain,
        "cost_seconds": cost.extra,
    }
    assert f"as much as {(1.8 - 3 * plain) / plain:.1f} plain steps" in str(cost)
    assert "no pass over one was saved" in str(cost)
    cost.passed_over = 32
    assert cost.saved == pytest.approx(32 / 48 * 3 * plain)
    assert f"would have taken {cost.saved:.3g} s" in str(cost)


def test_a_step_that_combined_nothing_is_its_pass() -> None:
    for combine in ("factors", "graph", "rerun"):
        cost = Cost()
        cost.add({"candidates": 300.0, "target": 10.0}, combine=combine, offered=4, kept=0)
        assert cost.plain == pytest.approx(0.3)


def test_without_times_nothing_is_said() -> None:
    cost = Cost()
    cost.add({"of_another": 1.0}, combine="factors", offered=4, kept=2)
    assert cost.numbers() == {}
    assert str(cost) == "No time of a selection is known."


def test_the_log_and_the_page_tell_it(tmp_path: Path) -> None:
    passed_over = [10, 25, 8, 20]  # a new epoch begins at the third step
    with SelectionLog(tmp_path) as log:
        for step, number in enumerate(passed_over, start=1):
            log.record(
                step, selection(step, milliseconds=TIMES), ids=range(5), metrics={"passed_over": number, "ms_data": 7.0}
            )
    cost = cost_of(read_log(tmp_path))
    assert cost.steps == 4
    assert cost.candidates == 20
    assert cost.seconds == {phase: pytest.approx(4 * spent / 1e3) for phase, spent in TIMES.items()}
    assert cost.passed_over == 25 + 20
    html = page(read_log(tmp_path), title="run")
    assert "What selection cost" in html
    assert "Measured: 4 steps with 20 candidates took 2.4 s in the optimizer (target 0.4 s, candidates 1.2 s" in html
    assert "Saved, estimated: 45 records" in html


def test_a_real_step_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = torch.nn.Linear(3, 1), torch.randn(8, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(model.parameters()),
        model,
        lambda: model(rows[:2]).square()[:, 0],
        filter=GreedyFilter(keep=2),
    )
    with SelectionLog(tmp_path) as log:
        for step in range(2):
            optimizer.step(lambda: model(rows).square()[:, 0])
            log.record(step, optimizer.selection, ids=range(8))
    cost = cost_of(read_log(tmp_path))
    assert cost.steps == 2
    assert {"target", "candidates", "solve"} <= cost.seconds.keys()
    assert 0.0 < cost.plain < cost.total
