"""The benchmarks that are folders answer by the command beside their folder, from wherever it is given."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["finetune", "step_cost"])
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
