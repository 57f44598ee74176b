"""Learned shares and records that others take from a log: against its rows, and through the loaders of those others."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Dataset, interleave_datasets, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import TrlParser
from trl.scripts.utils import DatasetMixtureConfig, get_dataset

from ftw_optim.report.__main__ import main
from ftw_optim.report._data import Digest, SourceTotals
from ftw_optim.report._mixture import FORMS, learned_shares, mixture
from ftw_optim.selection_log import LoggedRun, SelectionLog, read_log
from tests.support.releases import older
from tests.support.selections import selection

SOURCES = {"math/a b": 60, 'chat: "x" é\u2028#': 200, "never": 5}
"""Names of sources that YAML would misread, and the number of records of each."""


@pytest.fixture
def run(tmp_path: Path) -> LoggedRun:
    """A log in which the third source has no weight."""
    names = list(SOURCES)
    with SelectionLog(tmp_path / "run") as log:
        for step in range(1, 6):
            sources = [names[(step + at) % 2] for at in range(5)] + ["never"]
            kept, weights = torch.tensor([0, 1, 3]), torch.tensor([0.5, 0.3, 0.2 * step], dtype=torch.float64)
            ids = [f"{source}/{(step * at) % 4}" for at, source in enumerate(sources)]
            log.record(step, selection(step, n=6, kept=kept, weights=weights), ids=ids, sources=sources)
    return read_log(tmp_path / "run")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for number, (name, count) in enumerate(SOURCES.items()):
        found[name] = tmp_path / f"source {number}.jsonl"
        found[name].write_text("\n".join(json.dumps({"text": f"{name} {at}"}) for at in range(count)))
    return found


def expected(run: LoggedRun) -> dict[str, float]:
    """The mean over steps of each source's share of the weight, from the rows."""
    total: dict[int, float] = defaultdict(float)
    share: dict[str, float] = defaultdict(float)
    for row in run.candidates():
        total[row["step"]] += row["weight"]
    for row in run.candidates():
        share[row["source"]] += row["weight"] / total[row["step"]] / len(total)
    return share


def written(run: LoggedRun, files: dict[str, Path], form: str) -> Path:
    """The file that the command writes."""
    out = run.directory / f"{form}.yaml"
    data = [part for name, file in files.items() for part in ("--data", f"{name}={file}")]
    assert main([str(run.directory), "--mixture", str(out), "--mixture-format", form, *data]) == 0
    return out


@pytest.mark.skipif(older("trl", "1.16"), reason="older mixtures of TRL know no fraction of a data set")
def test_trl_makes_the_mixture_of_it(
    run: LoggedRun, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = written(run, files, "trl")
    (config,) = TrlParser((DatasetMixtureConfig,)).parse_args_and_config(["--config", str(path)])
    shares = expected(run)
    assert {one.data_files: one.fraction for one in config.datasets} == {
        str(files[name]): pytest.approx(share, abs=1e-6) for name, share in shares.items() if share
    }
    rows = get_dataset(config)["train"]["text"]
    first, second = list(SOURCES)[:2]
    counts = [sum(text.startswith(name) for text in rows) for name in (first, second)]
    whole = min(60 / shares[first], 200 / shares[second])
    assert counts == [round(shares[first] * whole), round(shares[second] * whole)]
    assert sum(counts) == len(rows)


def test_axolotl_gets_so_many_records_of_each_file(run: LoggedRun, files: dict[str, Path], tmp_path: Path) -> None:
    config = yaml.safe_load(written(run, files, "axolotl").read_text("utf-8"))
    assert config.keys() == {"datasets"}
    shares, counts = expected(run), {}
    for one in config["datasets"]:
        assert one.keys() == {"path", "ds_type", "split"}
        rows = load_dataset(
            one["ds_type"], data_files=one["path"], split=one["split"], cache_dir=str(tmp_path / "cache")
        )
        counts[one["path"]] = len(rows)
    first, second = list(SOURCES)[:2]
    whole = min(60 / shares[first], 200 / shares[second])
    assert counts == {str(files[name]): round(shares[name] * whole) for name in (first, second)}


def test_llama_factory_draws_by_the_shares(run: LoggedRun) -> None:
    config = yaml.safe_load(written(run, {}, "llamafactory").read_text("utf-8"))
    assert config.keys() == {"dataset", "mix_strategy", "interleave_probs"}
    assert config["mix_strategy"] == "interleave_under"
    names = [name.strip() for name in config["dataset"].split(",")]
    probabilities = list(map(float, config["interleave_probs"].split(",")))
    assert dict(zip(names, probabilities, strict=True)) == {
        name: pytest.approx(share, abs=1e-6) for name, share in expected(run).items() if share
    }
    parts = [Dataset.from_dict({"source": [name] * 400}) for name in names]
    drawn = interleave_datasets(parts, probabilities, seed=0, stopping_strategy="first_exhausted")["source"]
    assert drawn.count(names[0]) / len(drawn) == pytest.approx(probabilities[0], abs=0.1)


@given(st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=1, max_size=12).filter(any))
def test_shares_are_rounded_and_sum_to_one(weights: list[float]) -> None:
    found = Digest(steps=1, candidates=1, edges=[])
    found.totals = {str(at): SourceTotals(weight=weight) for at, weight in enumerate(weights)}
    shares = learned_shares(found)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-9)
    for at, weight in enumerate(weights):
        assert shares.get(str(at), 0.0) == pytest.approx(weight / sum(weights), abs=1e-5)
    for form in ("trl", "llamafactory"):
        assert yaml.safe_load(mixture(found, {}, form))


def test_records_are_listed_by_their_mean_weight(run: LoggedRun, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.directory / "new" / "records.jsonl"
    assert main([str(run.directory), "--records", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text("utf-8").split("\n") if line]
    assert f"{out} ({len(lines)} records)" in capsys.readouterr().out
    seen: dict[str, list[float]] = defaultdict(list)
    total: dict[int, float] = defaultdict(float)
    for row in run.candidates():
        total[row["step"]] += row["weight"]
    for row in run.candidates():
        seen[row["id"]].append(row["weight"] / total[row["step"]])
    assert {line["id"] for line in lines} == seen.keys()
    for line in lines:
        shares = seen[line["id"]]
        assert line["mean_weight"] == pytest.approx(sum(shares) / len(shares))
        assert (line["offered"], line["kept"]) == (len(shares), sum(share > 0 for share in shares))
        assert line["id"].startswith(line["source"])
    assert [line["mean_weight"] for line in lines] == sorted((line["mean_weight"] for line in lines), reverse=True)


def test_what_cannot_be_written_is_an_error(
    run: LoggedRun, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(run.directory), "--mixture", str(tmp_path / "out.yaml"), "--mixture-format"]
    for more, words in (
        (["axolotl"], "that of math/a b, "),
        (["trl", "--data", f"other={files['never']}"], "got one of other"),
        (
            ["axolotl", *[part for name in SOURCES for part in ("--data", f"{name}=missing.jsonl")]],
            "there is no missing",
        ),
    ):
        assert main([*asked, *more]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out.yaml").exists()
    with pytest.raises(SystemExit):
        main([*asked, "trl", "--data", "no equals sign"])
    assert "expected SOURCE=FILE" in capsys.readouterr().err
    with SelectionLog(tmp_path / "nameless") as log:
        log.record(1, selection(1, n=6), ids=range(6))
    assert main([str(tmp_path / "nameless"), "--mixture", str(tmp_path / "out.yaml")]) == 2
    assert "pass sources=" in capsys.readouterr().err
    found = Digest(steps=1, candidates=1, edges=[])
    found.totals = {"a,b": SourceTotals(weight=1.0)}
    with pytest.raises(ValueError, match="without commas"):
        mixture(found, {}, "llamafactory")
    found.totals = {"a": SourceTotals()}
    for form in FORMS:
        with pytest.raises(ValueError, match="none has"):
            mixture(found, {}, form)
