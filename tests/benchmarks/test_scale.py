"""What a step over many ranks sends is what the formulas say, and the command measures and predicts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from scale.counted import counted
from scale.model import CASES, Speeds, predicted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "ranks", [2, 8, pytest.param(64, marks=pytest.mark.slow), pytest.param(1024, marks=pytest.mark.slow)]
)
def test_the_bytes_of_a_step_are_those_of_the_formulas(ranks: int) -> None:
    found = counted(ranks)
    assert {name: found.sent[name] for name in found.expected} == found.expected


@pytest.mark.parametrize(
    "ranks",
    [2, pytest.param(8, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 1024))],
)
def test_the_bytes_of_a_step_in_shards_are_those_of_the_formulas(ranks: int) -> None:
    found = counted(ranks, shards=True)
    assert {name: found.sent[name] for name in found.expected} == found.expected


@pytest.mark.slow
def test_what_a_rank_exchanges_does_not_depend_on_their_number() -> None:
    few, many = counted(16), counted(64)
    assert few.sent["exchange"] <= many.sent["exchange"] <= 1.1 * few.sent["exchange"]


def test_a_model_of_times_has_its_parts() -> None:
    found = predicted(CASES[0], 8, Speeds(), solve=1e-3)
    assert found["solve"] == 1.0
    assert found["exchange"] == pytest.approx(1e3 * 4 * 4 * 42e6 * 7 / 8 / 300e9)
    assert predicted(CASES[0], 16, Speeds(), 0.0)["exchange"] > found["exchange"]  # beyond a node


@pytest.mark.slow
def test_the_command_predicts_in_one_process_and_measures_in_two() -> None:
    script = str(BENCHMARKS / "scale.py")
    said = []
    for command in (
        [sys.executable, script, "--simulate", "--quick"],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "--quick"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "LoRA 16 on 8B" in said[0]
    assert "parameters equal on all ranks: True" in said[1]
    assert "selective / plain" in said[1]
