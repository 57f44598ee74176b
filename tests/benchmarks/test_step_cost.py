"""``benchmarks/step_cost.py``: floors, measurements that notice what is wrong, and a short run."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftw_optim import TargetGradient

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from step_cost import arms as step_arms
from step_cost import command as step_cost
from step_cost import goals as step_goals
from step_cost import grams as step_grams
from step_cost import measure as step_measure
from step_cost import phases as step_phases
from step_cost import points as step_points
from step_cost import report as step_report
from step_cost.points import Point

TINY = Point("tiny", width=64, layers=2, t=16, n=4, k=1, m=1, ways=step_points.WAYS)


# --- points


@pytest.mark.parametrize(
    ("way", "point", "expected"),
    [
        # 1 + m/(r n) + k/(3 n)
        ("factors", Point("", n=16, k=4, m=4), 1 + 1 / 4 + 1 / 12),
        ("factors", Point("", n=16, k=16, m=8, r=4), 1 + 1 / 8 + 1 / 3),
        # + 0 with LoRA
        ("factors", Point("", n=16, k=4, m=4, lora=8), 1 + 1 / 4),
        # k/n in place of k/(3 n)
        ("rerun", Point("", n=16, k=4, m=4), 1 + 1 / 4 + 1 / 4),
        ("rerun", Point("", n=16, k=4, m=4, lora=8), 1 + 1 / 4 + 1 / 4),
        # 1 + 2 s/3 + (1/3 + 2 s/3) m/(r n)
        ("graph", Point("", n=16, m=4), 1 + 2 / 3 + 1 / 4),
        ("graph", Point("", n=16, m=8, r=4, layers=8, scored=1), 1 + 1 / 12 + (1 / 3 + 1 / 12) / 8),
        # Forward and input gradient alone for the factors of what is not scored.
        ("factors", Point("", n=16, k=4, m=4, layers=4, scored=1), 2 / 3 + 1 / 12 + 1 / 12 + (1 / 3 + 1 / 6) / 4),
        # Quarters with checkpointing, of which one is the forward's second run.
        ("factors", Point("", n=16, k=4, m=4, checkpoint=True), 1 + 1 / 4 + 1 / 16),
        ("graph", Point("", n=16, k=4, m=4, checkpoint=True), 1 + 3 / 4 + 1 / 4),
    ],
)
def test_the_floor_is_that_of_the_design(way: str, point: Point, expected: float) -> None:
    assert point.floor(way) == pytest.approx(expected)


def test_auto_has_the_floor_of_what_it_chooses() -> None:
    with pytest.raises(ValueError, match="floor of its choice"):
        TINY.floor("auto")


def test_points_survive_json_and_have_names_of_their_own() -> None:
    sets = (step_points.GOALS, step_points.MEMORY, step_points.GRID, step_points.CASES, step_points.LARGE)
    points = [point for some in (*sets, step_points.QUICK) for point in some]
    assert len({point.name for point in points}) == len(points)
    assert step_points.RATIO_GOALS.keys() <= {point.name for point in points}
    for point in points:
        assert Point.from_json(json.loads(json.dumps(step_measure.asdict(point)))) == point
        assert point.k <= point.n


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As the published checkpoints have them.
    [("Qwen3-0.6B, full", 596_049_920), ("Llama-3.2-1B, full", 1_235_814_400)],
)
def test_large_models_have_the_published_size(name: str, parameters: int) -> None:
    point = next(point for point in step_points.LARGE if point.name == name)
    model = step_arms.build_model(point, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    adapted = step_arms.build_model(replace(point, lora=16, checkpoint=True), "meta")
    assert 0 < sum(parameter.numel() for parameter in step_arms.trained(adapted).values()) < parameters / 50


def test_large_models_are_measured_only_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--goals", "--grid", "--cases"], ["--cases", "--only", "checkpointing"]):
        step_cost.main(["--list", *arguments])
        assert "Qwen3-0.6B" not in capsys.readouterr().out
    step_cost.main(["--list", "--only", "Qwen3-0.6B"])
    assert "Qwen3-0.6B, LoRA, checkpointing" in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        step_cost.parse_arguments(["--only", "no such point"])
    assert "--list shows the names" in capsys.readouterr().err


# --- measurements


@pytest.mark.slow
def test_all_ways_of_a_point_are_measured_in_one_run() -> None:
    found = step_measure.measure(TINY, repeats=3, limit=0.0, device="cpu")
    assert found["seconds"].keys() == found["live_bytes"].keys() == {"plain", *TINY.ways}
    assert all(len(some) == step_measure.FEWEST for some in found["seconds"].values())
    for way, one in found["ways"].items():
        assert one["applied_by"] == ("factors" if way == "auto" else way)
        assert one["over_floor"] == pytest.approx(one["ratio"] / TINY.floor(one["applied_by"]))
        assert one["quartiles"][0] <= one["ratio"] <= one["quartiles"][1]
        assert one["weights_above_zero"] == [1, 1, 1]
        assert min(one["phases"].values()) >= 0
        assert one["phases"].keys() == set(step_phases.PHASES.values())
    best, over, _ = step_goals.regret(found) or pytest.fail("all ways were measured")
    ratios = {way: one["ratio"] for way, one in found["ways"].items()}
    assert ratios[best] == min(ratios["factors"], ratios["graph"])
    assert over == pytest.approx(ratios["auto"] / ratios[best] - 1)


def test_a_step_that_applies_nothing_is_not_taken_for_a_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    built = step_arms.selective_arm

    def without_a_target(point: Point, way: str, device: str) -> Any:
        step, optimizer = built(point, way, device)
        closure = optimizer.target.closure
        optimizer.target = TargetGradient(lambda: 0 * closure())
        return step, optimizer

    monkeypatch.setattr(step_measure, "selective_arm", without_a_target)
    with pytest.raises(RuntimeError, match="one was skipped"):
        step_measure.measure(replace(TINY, ways=("factors",)), repeats=1, limit=0.0, device="cpu")


@pytest.mark.parametrize("way", ["factors", "rerun"])
def test_phases_hold_no_time_of_others_and_make_up_the_step(way: str) -> None:
    step, _ = step_arms.selective_arm(TINY, way, "cpu")
    step(0)
    for _ in range(2):
        with step_phases.PhaseClock("cpu") as clock:
            start = time.perf_counter()
            step(1)
            whole = time.perf_counter() - start
        assert sum(clock.spent.values()) == pytest.approx(whole, rel=0.05)
        assert clock.spent.keys() == set(step_phases.PHASES.values())
        assert min(clock.spent.values()) > 0


def test_a_clock_stops_where_a_step_fails() -> None:
    with pytest.raises(LookupError), step_phases.PhaseClock("cpu"):
        raise LookupError
    with step_phases.PhaseClock("cpu") as clock:
        time.sleep(0.01)
    assert clock.spent == {step_phases.REST: pytest.approx(0.01, abs=0.01)}


def test_time_counts_for_the_innermost_range_and_for_the_device_while_it_works() -> None:
    host = [(0, 10, "outer"), (0, 10, "inner"), (2, 4, "innermost"), (4, 5, "innermost"), (12, 20, "outer")]
    ranges = [step_phases.Range(float(start), float(end), label) for start, end, label in host]
    assert step_phases.exclusive(ranges) == {"outer": 8.0, "inner": 7.0, "innermost": 3.0}
    behind = step_phases.Range(9.0, 15.0, "innermost", on_device=True)
    assert step_phases.exclusive([*ranges, behind]) == {"outer": 5.0, "inner": 6.0, "innermost": 9.0}
    assert step_phases.exclusive([]) == {}


@pytest.mark.parametrize(
    ("how", "whole"),
    # bfloat16 rounds at 4e-3; what is summed of it in float32 does not add to that.
    [({}, 1e-5), ({"dtype": "bfloat16"}, 3e-2), ({"autocast": True}, 3e-2), ({"lora": 4, "family": "qwen3"}, 1e-5)],
    ids=["float32", "bfloat16", "autocast", "lora"],
)
def test_errors_of_the_gram_matrix_are_those_of_its_precision(how: dict[str, Any], whole: float) -> None:
    found = step_grams.gram_errors(replace(TINY, **how), "cpu")
    assert found["computation"] < 1e-5
    assert found["whole"] < whole


def test_an_error_of_the_gram_matrix_is_found() -> None:
    problem = step_grams.Problem(TINY, "cpu")
    gram, shares = problem.recorded()
    exact = problem.exact()
    assert max(step_grams.errors_of(gram, shares, exact).values()) < 1e-5
    gram[0, 1] += 1e-3 * (gram[0, 0] * gram[1, 1]).sqrt()
    assert step_grams.errors_of(gram, shares, exact) == pytest.approx({"computation": 1e-3, "whole": 1e-3}, rel=1e-2)


def test_other_ways_give_the_same_gram_matrix() -> None:
    found = step_grams.compare_ways(TINY, "cpu")
    assert found.keys() == {step_grams.OURS, "loop", "vmap", "opacus"}
    ran = {way: one for way, one in found.items() if "failed" not in one}
    assert ran.keys() >= found.keys() - {"opacus"}, "Opacus alone may be missing"
    for one in ran.values():
        assert one["error"] < 1e-5
        assert len(one["seconds"]) == step_grams.TIMED
        assert one["live_bytes"] > 0


# --- what the results come to


def result(t: int, n: int, over_floor: float, phases: dict[str, float]) -> dict[str, Any]:
    point = step_measure.asdict(Point(f"t {t}, n {n}", t=t, n=n, also=("chart t", "chart n")))
    way = {"over_floor": over_floor, "phases": phases}
    return {"point": point, "ways": {"factors": way}}


def test_growth_and_shares_are_judged_by_their_goals() -> None:
    phases = {"materialise": 10.0, "Gram products": 1.0, "solve": 0.4, "rest of the Gram matrix": 2.0}
    less = phases | {"Gram products": 0.5}
    results = [result(512, 16, 1.05, phases), result(256, 8, 1.0, less), result(1024, 64, 1.2, less)]
    assert step_goals.shares_of_materialising(results[0]) == (pytest.approx(0.14), pytest.approx(0.34))
    text = step_goals.goals(results)
    assert "missed  growth of the ratio to the floor, t 256 to 1024: 20.0% (goal 10.0%)" in text
    assert "met     products and solve of materialising, worst at n 16: 14.0% (goal 15.0%)" in text


@pytest.mark.slow
def test_a_point_that_fails_is_said_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [replace(TINY, name="one"), replace(TINY, name="two", ways=("factors",))]
    monkeypatch.setattr(step_cost, "QUICK", points)
    monkeypatch.setattr(step_cost, "_points", lambda options: (points, []))
    measure = step_cost.measure

    def out_of_memory(point: Point, **how: Any) -> Any:
        if point.name == "one":
            raise MemoryError("no more")
        return measure(point, **how)

    monkeypatch.setattr(step_cost, "measure", out_of_memory)
    results = step_cost.main(["--quick", "--repeats", "3", "--seconds", "0", "--out", str(tmp_path)])
    assert "one failed: MemoryError: no more" in capsys.readouterr().out
    assert [("failed" in found) for found in results] == [True, False]


# --- the whole


@pytest.mark.slow
def test_a_quick_run_keeps_a_table_raw_numbers_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = step_cost.main(["--quick", "--repeats", "3", "--out", str(tmp_path)])
    assert not step_report.failures(results)
    printed = capsys.readouterr().out
    text = (tmp_path / "step_cost.txt").read_text()
    assert text in printed
    for part in (
        "with pages kept",
        "auto took",
        "cost over the context",
        "cost over the candidates",
        "peak memory above the model",
        "largest relative error of the Gram matrix",
        "the same Gram matrix by other ways",
        "ms of a step, by phase",
        "goals",
    ):
        assert part in text
    kept = json.loads((tmp_path / "step_cost.json").read_text())
    assert kept["results"] == json.loads(json.dumps(results))
    assert {"cpu", "cores", "threads", "torch", "commit"} <= kept["machine"].keys()
    assert all((tmp_path / f"step_cost_{axis}.png").stat().st_size > 10_000 for axis in "tn")
    memory = results[-1]["peaks"]
    assert memory["ours"]["live"] > memory["plain"]["live"] > memory["plain"]["state"] > 0
