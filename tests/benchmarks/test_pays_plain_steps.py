"""An arm that selects at some steps alone, while its proposal is trusted, trains as its candidates do without it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pays import command
from pays.arms import ARMS
from pays.proposals import Chooser, Known, similar


@pytest.mark.parametrize("trusts", [True, False])
def test_target_rows_run_at_every_fourth_step_while_the_proposal_is_trusted(
    trusts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def propose(known: Known) -> Chooser:
        return replace(similar(known), trusted=lambda: trusts)

    for name in ("tested-n-tokens", "tested-n"):
        monkeypatch.setitem(ARMS, name, replace(ARMS[name], propose=propose))
    sizes = ["--quick", "--steps", "10", "--seeds", "1", "--lr", "guide=0.03", "target=0.03"]
    arms = ["similarity-n-tokens", "tested-n-tokens", "tested-n"]
    plain, every, fourth = command.main([*sizes, "--out", str(tmp_path), "--arms", *arms])
    assert plain.rows == (10 * 6, 0)
    assert every.rows == (10 * 6, 10 * 3)
    assert fourth.rows == (10 * 6, (3 if trusts else 10) * 3)
    assert fourth.curve == pytest.approx(every.curve, rel=1e-4)
    assert (fourth.curve == pytest.approx(plain.curve, rel=1e-4)) == trusts
