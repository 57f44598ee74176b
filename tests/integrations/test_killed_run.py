"""A run on candidate streams that is killed, with its log."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ftw_optim.selection_log import read_log

STEPS = 40


def start(directory: Path, *, may_end: bool) -> subprocess.Popen[bytes]:
    directory.mkdir(exist_ok=True)
    (directory / "progress").unlink(missing_ok=True)
    if may_end:
        (directory / "may_end").touch()
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "killed_run.py"), str(directory), str(STEPS), "4"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Weights, selection log and data order, after two kills with SIGKILL at random steps."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole, may_end=True)
    steps = sorted(random.Random(1).sample(range(2, STEPS), 2))
    for step in steps:
        process = start(killed, may_end=False)
        progress = killed / "progress"
        while process.poll() is None and not (progress.exists() and int(progress.read_text() or 0) >= step):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finished(start(killed, may_end=True))
    finished(uninterrupted)
    assert (killed / "order.txt").read_text() == (whole / "order.txt").read_text()
    assert (killed / "skipped.json").read_text() == (whole / "skipped.json").read_text()
    expected = torch.load(whole / "weights.pt", weights_only=True)
    for name, weights in torch.load(killed / "weights.pt", weights_only=True).items():
        assert torch.equal(weights, expected[name]), name
    for format in ("jsonl", "parquet"):
        logs = [read_log(run / format) for run in (whole, killed)]
        assert len(logs[0].steps) == STEPS
        one, other = ([{k: v for k, v in row.items() if k != "ms"} for row in log.steps] for log in logs)
        assert other == one
        assert list(logs[1].candidates()) == list(logs[0].candidates())
        assert list(logs[1].texts()) == list(logs[0].texts())
    for path in (whole / "jsonl").iterdir():
        if path.stem == "times":  # which no two runs share
            continue
        assert (killed / "jsonl" / path.name).read_bytes() == path.read_bytes()


REPOSITORY = Path(__file__).parents[2]
