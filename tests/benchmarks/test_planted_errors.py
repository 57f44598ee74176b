"""The power of the self-check and its false alarms: the cells of the table that ``benchmarks/self_check.py`` prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import self_check

from tests.support.grids import grid


@pytest.mark.parametrize(
    ("dtype", "way", "name"),
    grid(
        list(self_check.DTYPES),
        list(self_check.WAYS),
        list(self_check.ERRORS),
        fast=lambda dtype, way, name: dtype in ("float32", "bfloat16 + LoRA") and way == "factors",
    ),
)
def test_a_planted_error_is_found(dtype: str, way: str, name: str) -> None:
    """At the first selection; where some losses have the same weight in the check, by the third."""
    parameters, lora = self_check.DTYPES[dtype]
    exact = parameters in (torch.float32, torch.float64)
    found = self_check.cell(name, parameters, lora=lora, way=way, seeds=3)
    assert found.endswith(" 1.00")
    if exact:
        assert found == "1.00 1.00"


@pytest.mark.parametrize(
    ("dtype", "way", "name"),
    grid(
        list(self_check.DTYPES),
        list(self_check.WAYS),
        list(self_check.CLEAN),
        fast=lambda dtype, way, name: dtype == "bfloat16 + LoRA",
    ),
)
def test_a_model_without_an_error_passes_every_check(dtype: str, way: str, name: str) -> None:
    parameters, lora = self_check.DTYPES[dtype]
    assert self_check.cell(name, parameters, lora=lora, way=way, seeds=2) == "0.00 0.00"


@pytest.mark.slow
def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(self_check, "ERRORS", ("BatchNorm",))
    monkeypatch.setattr(self_check, "CLEAN", ("clean",))
    self_check.main(["--quick", "--seeds", "1", "--out", str(tmp_path / "table.txt")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.txt").read_text()
    rows = [line.split() for line in printed.splitlines()[4:]]
    assert [row[:2] for row in rows] == [
        ["BatchNorm", "factors"],
        ["BatchNorm", "graph"],
        ["clean", "factors"],
        ["clean", "graph"],
    ]
    assert {cell for row in rows[:2] for cell in row[2:]} == {"1.00"}
    assert {cell for row in rows[2:] for cell in row[2:]} == {"0.00"}


def test_the_cost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point = {"layers": 1, "width": 16, "t": 8, "n": 4, "k": 1, "m": 1}
    monkeypatch.setattr(self_check, "COSTS", {"a small one": ("factors", point)})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    self_check.main(["--cost", "--quick", "--out", str(tmp_path / "cost.txt")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "cost.txt").read_text()
    assert printed.splitlines()[-1].split()[:4] == ["a", "small", "one", "factors"]
    assert printed.splitlines()[-1].endswith(" %")
