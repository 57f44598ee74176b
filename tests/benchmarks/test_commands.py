"""The benchmarks that are folders answer by the command beside their folder, from wherever it is given."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "lens", "paper", "pays", "scale", "step_cost"])
def test_a_command_says_its_question_and_its_options_from_another_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise ImportError('a folder of that name, where one happens to be')")
    command = BENCHMARKS / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(command), "--help"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    question = (ast.get_docstring(ast.parse(command.read_text())) or "").splitlines()[0]
    assert " ".join(question.split()) in " ".join(done.stdout.split())
    assert f"usage: {name}.py" in done.stdout
    assert "--quick" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_arithmetic_is_the_same_arithmetic() -> None:
    command = [sys.executable, str(BENCHMARKS / "compiled.py"), "--only", "64 x 64", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("64 x 64")]
    assert len(lines) == 2
    for line in lines:
        assert float(line.split()[-1]) < 1e-6
        assert float(line.split(" ms")[0].split()[-1]) > 0


@pytest.mark.slow
def test_two_checkouts_are_compared_each_with_its_own_package() -> None:
    command = [sys.executable, str(BENCHMARKS / "before_after.py"), str(BENCHMARKS.parent), "--quick", "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    way, before, after, ratio = done.stdout.splitlines()[1].split("t 8")[1].split()[:4]
    assert way == "factors"
    assert float(before) > 0
    assert float(after) > 0
    assert float(ratio) > 0
    elsewhere = subprocess.run([*command[:2], str(BENCHMARKS), "--quick"], capture_output=True, text=True, check=False)
    assert elsewhere.returncode != 0
    assert "Is it a checkout of ftw_optim?" in elsewhere.stderr
