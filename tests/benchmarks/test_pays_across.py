"""The table of several settings: which runs it takes, and its differences against means written out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pays.across import main
from pays.runs import Run
from pays.store import Store


def saved(folder: Path, arm: str, losses: list[float], *, seed: int = 0, steps: int = 4, **more: list[float]) -> None:
    Store(folder, {}).save(Run(arm=arm, steps=steps, lr=1e-3, seed=seed, at=[steps], test=[losses], **more))


def test_arms_are_compared_in_each_setting_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for seed in (0, 1):
        saved(one, "adamw-n", [2.0, 3.0, 4.0], seed=seed)
    saved(one, "ftw", [1.5, 2.4, 3.6], seed=1)
    saved(one, "ftw", [9.0, 9.0, 9.0], seed=1, steps=2)  # a smaller budget
    saved(one, "topk", [1.0, 3.0, 5.0], seed=0)
    saved(two, "ftw", [1.0, 1.0, 1.0])
    lines = main([str(one), str(two)]).splitlines()
    assert lines[0].split() == ["one", "two"]
    assert [line.split() for line in lines[1:4]] == [
        ["AdamW,", "by", "record", "3.000", "(2)"],
        ["filter-then-weight", "2.500", "(1)", "-0.50*", "1.000", "(1)"],
        ["top-k,", "dot", "product", "3.000", "(1)", "+0.00"],
    ]
    assert "difference to AdamW, by record" in lines[-2]
    (line,) = (
        line for line in main([str(one), "--arms", "topk", "--beside", "ftw"]).splitlines() if line.startswith("top-k")
    )
    assert line.split()[-2:] == ["3.000", "(1)"]  # no seed that both have
    (line,) = (line for line in main([str(one), "--intervals"]).splitlines() if line.startswith("filter"))
    mean, low, high = (float(part.strip("[],")) for part in line.split()[-3:])
    assert mean == -0.5
    assert -0.6 <= low < mean < high <= -0.4
    lines = main([str(one), "--seeds", "0"]).splitlines()
    assert [line.split()[-3:] for line in lines[1:3]] == [["record", "3.000", "(1)"], ["3.000", "(1)", "+0.00"]]


def test_what_is_decoded_exactly_is_compared_where_it_was_looked_at(tmp_path: Path) -> None:
    saved(tmp_path / "one", "adamw-n", [2.0, 3.0, 4.0, 5.0], exact=[0.0, 0.0, 1.0, 0.0])
    saved(tmp_path / "one", "ftw", [2.0, 3.0, 4.0, 5.0], exact=[1.0, 1.0, 1.0, 0.0])
    saved(tmp_path / "one", "topk", [2.0, 3.0, 4.0, 5.0])  # made before that was looked at
    lines = main([str(tmp_path / "one"), "--exact"]).splitlines()
    assert [line.split()[-3:] for line in lines[1:3]] == [["record", "0.250", "(1)"], ["0.750", "(1)", "+0.50"]]
    assert lines[3] == "top-k, dot product"
    assert "share of test rows whose response is decoded exactly" in lines[-2]


def test_seconds_until_the_loss_of_another_arm_are_beside_its_own(tmp_path: Path) -> None:
    """At twice the pace of the calibration, and with a second for each token of the trunk."""
    for arm, losses, seconds in (("adamw-n", [3.0, 2.0], [4.0, 8.0]), ("ftw", [2.5, 1.5], [6.0, 12.0])):
        for seed in (0, 1):
            run = Run(arm=arm, steps=4, lr=1e-3, seed=seed, at=[2, 4], test=[[loss, loss] for loss in losses])
            run.seconds, run.run_tokens, run.paces = seconds, [1.0, 2.0], [2.0]
            Store(tmp_path, {}).save(run)
    saved(tmp_path, "topk", [9.0], seed=5)
    for name, content in (
        ("calibration", {"pace": 1.0, "trunk_seconds_per_token": 1.0}),
        ("zero-shot", {"test": [4.0, 4.0]}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    lines = main([str(tmp_path), "--seconds"]).splitlines()
    # AdamW takes 8 / 2 + 2 = 6 s; filter-then-weight is at 2.0 half-way from step 2 (4 s) to step 4 (8 s).
    assert lines[1].split()[3:] == ["4,", "100%;", "6", "s", "(2)"]
    assert lines[2].split() == ["filter-then-weight", "3,", "100%;", "8", "s", "(2)"]
    assert lines[3] == "top-k, dot product"
    (line,) = (one for one in main([str(tmp_path), "--seconds", "--beside", "ftw"]).splitlines() if "AdamW," in one)
    assert line.split()[-5:] == ["not", "reached;", "6", "s", "(2)"]


def test_arms_that_a_folder_has_not_come_from_one_that_differs_in_what_is_read_ahead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, read_ahead, test_rows in (("near", 128, 3), ("far", 1024, 3), ("other", 128, 4)):
        store = Store(tmp_path / name, {"read_ahead": read_ahead, "test_rows": test_rows})
        losses = {"adamw-n": [2.0, 3.0, 4.0], "ftw": [9.0, 9.0, 9.0]} if name != "far" else {"ftw": [2.0, 3.0, 4.0]}
        for arm, of_rows in losses.items():
            store.save(Run(arm=arm, steps=4, lr=1e-3, seed=0, at=[4], test=[of_rows]))
    near, far, other = (str(tmp_path / name) for name in ("near", "far", "other"))
    lines = main([far, "--others", near]).splitlines()
    assert [line.split()[-2:] for line in lines[1:3]] == [["3.000", "(1)"], ["(1)", "+0.00"]]
    for arguments, message in (
        ([far, "--others", other], "differs from"),
        ([far, near, "--others", near], "needs as many folders, 2, got 1"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path)], "has no results of pays.py"),
        ([str(tmp_path), "--seconds", "--exact"], "leave --exact and --intervals out"),
        ([str(tmp_path), "--beside", "adam"], "'adam' is not one of adamw-k"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
