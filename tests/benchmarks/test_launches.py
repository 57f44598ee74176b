"""``step_cost.py --launches``: what is counted, and how many operations a step may take beside a plain one."""

from __future__ import annotations

import gc
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from step_cost import command as step_cost
from step_cost import launches as step_launches
from step_cost import points as step_points
from step_cost.launches import BOUNDS, Counts, launches

from tests.support.grids import slow

# --- what is counted

SHAPES = st.lists(st.integers(0, 4), min_size=2, max_size=4)


@settings(max_examples=30)
@given(shape=SHAPES, operations=st.integers(0, 5), views=st.integers(0, 5), lookups=st.integers(0, 5))
def test_operations_views_and_lookups_are_counted_each_apart(
    shape: list[int], operations: int, views: int, lookups: int
) -> None:
    def step() -> None:
        made = torch.zeros(shape)
        for _ in range(operations):
            made = made + 1.0
        for _ in range(views):
            made.transpose(0, 1)
        for _ in range(lookups):
            torch.promote_types(made.dtype, torch.float64)

    assert launches(step) == Counts(
        operations={"zeros": 1} | ({"add": operations} if operations else {}),
        views={"transpose": views} if views else {},
        lookups={"promote_types": lookups} if lookups else {},
        calls=1,
    )


@pytest.mark.parametrize(
    ("run", "kind", "name"),
    [
        (lambda x: x.view(-1), "views", "view"),
        (lambda x: x.expand(2, 3, 4), "views", "expand"),
        (lambda x: x.t(), "views", "t"),
        (lambda x: x[1:], "views", "slice"),
        (lambda x: x[0], "views", "select"),
        (lambda x: x[None], "views", "unsqueeze"),
        (lambda x: x.squeeze(), "views", "squeeze"),
        (lambda x: x.detach(), "views", "detach"),
        (lambda x: x.permute(1, 0), "views", "permute"),
        (lambda x: x.as_strided((2,), (1,)), "views", "as_strided"),
        (lambda x: x.split(2), "views", "split"),
        (lambda x: x.split([1, 2]), "views", "split_with_sizes"),
        (lambda x: x.unbind(), "views", "unbind"),
        (lambda x: x.diagonal(), "views", "diagonal"),
        (lambda x: x.unsqueeze_(0), "views", "unsqueeze_"),
        (lambda x: torch.ops.aten._unsafe_view(x, [12]), "views", "_unsafe_view"),
        (lambda x: x.unsafe_split(2), "views", "unsafe_split"),
        (lambda x: torch.promote_types(x.dtype, torch.float64), "lookups", "promote_types"),
        (lambda x: torch.can_cast(torch.float32, torch.float64), "lookups", "can_cast"),
        (lambda x: x.add_(1), "operations", "add_"),
        (lambda x: x.sum(), "operations", "sum"),
        (lambda x: x.double(), "operations", "_to_copy"),
        (lambda x: x.clone(), "operations", "clone"),
        (lambda x: x.equal(x), "operations", "equal"),
        (lambda x: torch._foreach_add_([x, x], 1.0), "operations", "_foreach_add_"),
        (lambda x: torch.empty(3), "operations", "empty"),
    ],
)
def test_each_operation_counts_for_its_kind(run: Any, kind: str, name: str) -> None:
    x = torch.ones(3, 4)

    def step() -> None:
        run(x)

    with torch.no_grad():
        counts = launches(step)
    assert getattr(counts, kind) == {name: 1}
    assert counts.total == (kind == "operations")
    assert sum(map(len, (counts.operations, counts.views, counts.lookups))) == 1


def test_operators_that_a_step_seldom_reaches_are_known_by_their_schema() -> None:
    ops = torch.ops.aten
    assert {step_launches.kind(one) for one in (ops.result_type.Tensor, ops.result_type.Scalar)} == {"lookups"}
    assert {step_launches.kind(one) for one in (ops.unsafe_split_with_sizes.default, ops.t_.default)} == {"views"}
    assert {step_launches.kind(one) for one in (ops._fused_adamw_.default, ops.mm.out)} == {"operations"}


@pytest.mark.parametrize(("n", "d_in", "d_out"), [(1, 1, 1), (8, 3, 5), (0, 2, 2)])
def test_a_backward_pass_is_counted(n: int, d_in: int, d_out: int) -> None:
    layer = nn.Linear(d_in, d_out, bias=False)
    rows = torch.ones(n, d_in)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(rows).sum(), [layer.weight])

    # The product, its sum, and the weight's gradient; the sum's gradient is expanded.
    assert launches(step).operations == {"mm": 2, "sum": 1, "ones_like": 1}


def test_ranges_for_the_profiler_are_no_operations() -> None:
    def step() -> None:
        with torch.profiler.record_function("a range"):
            pass

    assert launches(step).total == 0


def test_python_calls_are_counted_with_the_step_and_without_c_functions() -> None:
    def inner() -> int:
        return len([1, 2])

    def step() -> None:
        for _ in range(5):
            inner()

    def fails() -> None:
        raise LookupError

    assert step_launches.python_calls(step) == 6
    before = sys.getprofile()
    with pytest.raises(LookupError):
        step_launches.python_calls(fails)
    assert sys.getprofile() is before
    assert gc.isenabled()


# --- a step

MODELS = {
    "LoRA 8, all scored, factors": (8, "factors"),
    "LoRA 8, last block, graph": (8, "graph"),
    "full, all scored, factors": (0, "factors"),
    "full, last block, graph": (0, "graph"),
}


@pytest.mark.parametrize(
    "label", [label if label.startswith("LoRA 8, last block") else slow(label) for label in BOUNDS]
)
def test_a_step_takes_few_operations_beside_a_plain_one(label: str) -> None:
    """On 30 layers, where what is done once for each parameter is nearly all."""
    lora, way = MODELS[label]
    point = step_points.launch_point(30, 64, 16, lora)
    plain, ours = (
        launches(partial(step_launches.warm_arm(point, arm, "cpu"), 2)) for arm in (step_launches.FOR_LOOP, way)
    )
    assert ours.total <= BOUNDS[label] * plain.total, f"{ours.total} operations, plain {plain.total}"


@pytest.mark.parametrize("arm", [step_launches.FOR_LOOP, step_launches.FOREACH, *step_launches.WAYS])
def test_counts_are_those_of_every_step(arm: str) -> None:
    step = step_launches.warm_arm(step_points.launch_point(2, 64, 16, 8), arm, "cpu")
    first = launches(partial(step, 2))
    assert first == launches(partial(step, 2))
    assert first.total == sum(first.operations.values()) > 100
    assert first.calls > 100


# --- the whole


def test_points_have_names_of_their_own_and_are_chosen_by_them(capsys: pytest.CaptureFixture[str]) -> None:
    names = {}
    for arguments in (["--launches"], ["--launches", "--grid"], ["--launches", "--only", "width 576, t 512"]):
        step_cost.main([*arguments, "--list"])
        names[arguments[-1]] = capsys.readouterr().out.splitlines()
        assert len({*names[arguments[-1]]}) == len(names[arguments[-1]])
    assert {*names["--launches"]} < {*names["--grid"]}
    assert len(names["width 576, t 512"]) == 6
    with pytest.raises(SystemExit):
        step_cost.parse_arguments(["--launches", "--cases"])
    assert "points of its own" in capsys.readouterr().err


def test_a_point_whose_plain_step_is_slow_is_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_launches, "SLOW", 0.0)
    monkeypatch.setattr(step_launches, "launches", lambda step: pytest.fail("it would take too long"))
    point = step_points.QUICK_LAUNCHES[0]
    found = step_launches.measure_launches(point, repeats=1, limit=0.0, device="cpu")
    text = step_launches.launch_report([{"point": {"name": point.name}, **found}])
    assert text.startswith(f"{point.name} left out: a plain step takes")


@pytest.mark.slow
def test_a_quick_run_keeps_its_print_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = step_cost.main(["--launches", "--quick", "--repeats", "3", "--out", str(tmp_path)])
    text = (tmp_path / "launches.txt").read_text()
    assert text in capsys.readouterr().out
    assert not [found for found in results if "failed" in found]
    for part in (
        *step_launches.WAYS.values(),
        "Python calls",
        "beside foreach",
        "operations by kind",
        "views, apart",
        "the Gram matrix alone",
    ):
        assert part in text
