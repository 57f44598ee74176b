"""The cost of proposals: every proposal in both tables, measured and above zero."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pays.tiny import tiny_model

COMMAND = Path(__file__).parents[2] / "benchmarks" / "proposal_cost.py"
NAMES = ("uniform", "likeness", "learned", "vetted", "tested")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_every_proposal_is_measured_beside_steps_and_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    sizes = ["--read", "24", "--rounds", "2", "--records", "500"]
    monkeypatch.setattr(sys, "argv", ["proposal_cost.py", "--model", str(tmp_path), *sizes])
    runpy.run_path(str(COMMAND), run_name="__main__")
    read, numbered = capsys.readouterr().out.split("Among all 500 records")
    for name in NAMES:
        (row,) = re.findall(rf"^{name} +(.*)$", read, re.MULTILINE)
        middle, least, greatest, of_plain, of_selective = map(float, re.findall(r"[\d.]+", row))
        assert 0.0 < least <= middle <= greatest
        assert of_plain > 0.0
        assert of_selective > 0.0
        (row,) = re.findall(rf"^{name} +(.*)$", numbered, re.MULTILINE)
        _, middle, least, greatest = map(float, re.findall(r"[\d.]+", row))
        assert 0.0 < least <= middle <= greatest
