"""Runs of ``python -m ftw_optim.score``: killed and started again, with a later target, in bounded memory, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import last_blocks
from ftw_optim.score.__main__ import main
from ftw_optim.score._gradients import GradientRows
from ftw_optim.score._model import load_model
from ftw_optim.score._scoring import Options, score_pool
from tests.support.grids import slow
from tests.support.scored import byte_tokenizer, read_lines, small_llama, text_records, write_lines

FEW = Options(dim=64, warm_up=2, batch_size=3, block=6, max_length=64, say=lambda line: None)


@pytest.fixture
def model() -> nn.Module:
    found = small_llama(dtype=torch.float32)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(last_blocks(found, 1)(name, parameter))
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_llama(dtype=torch.float32).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    lines = [json.dumps(record) for record in text_records(20, seed=1)]
    lines[4], lines[9], lines[15] = "{broken", '{"prompt": "no response"}', '{"prompt": "p", "response": " "}'
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "sums.jsonl", text_records(5, seed=2, source="sums"))


class Killed(BaseException):
    """The stand-in for the end of a process."""


def dying(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Let the process end in the pass after so many ones."""
    left, real = [passes], GradientRows.of

    def of(self: GradientRows, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(self, batch)

    monkeypatch.setattr(GradientRows, "of", of)


@pytest.mark.parametrize("passes", [slow(0), slow(1), 4, slow(5), slow(6)])
def test_a_killed_run_ends_with_the_same_files(
    passes: int, model: nn.Module, pool: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = score_pool(model, byte_tokenizer(), pool, target, tmp_path / "whole", options=FEW)
    with monkeypatch.context() as patch:
        dying(patch, passes)
        with pytest.raises(Killed):
            score_pool(model, byte_tokenizer(), pool, target, tmp_path / "killed", options=FEW)
    for name in ("gradients.bin", "records.jsonl"):  # torn in the middle of a block
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(b'{"half a')
    score_pool(model, byte_tokenizer(), pool, target, tmp_path / "killed", options=FEW)
    for name in ("gradients.bin", "records.jsonl", "place.json", "sums/scored.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(read_lines(out)) == 17


def test_a_later_target_costs_its_own_passes_alone(
    model: nn.Module, pool: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = write_lines(tmp_path / "greetings.jsonl.gz", text_records(4, seed=3, source="greetings"))
    alone, _ = score_pool(model, byte_tokenizer(), pool, later, tmp_path / "alone", options=FEW)
    score_pool(model, byte_tokenizer(), pool, target, tmp_path / "both", options=FEW)
    rows: list[int] = []
    real = GradientRows.of

    def counted(self: GradientRows, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        rows.append(len(batch["labels"]))
        return real(self, batch)

    monkeypatch.setattr(GradientRows, "of", counted)
    said: list[str] = []
    options = Options(**{**vars(FEW), "say": said.append})
    out, found = score_pool(model, byte_tokenizer(), pool, later, tmp_path / "both", options=options)
    assert sum(rows) == 4
    assert said == [f"17 sketches found in {tmp_path / 'both'}: only the target's rows are run."]
    assert out == tmp_path / "both" / "greetings" / "scored.jsonl"
    assert out.read_bytes() == alone.read_bytes()
    assert (tmp_path / "both" / "sums" / "scored.jsonl").is_file()
    assert found.sources["greetings"].ranks / found.sources["greetings"].ranked < 8  # of 17


def test_the_command_shows_best_and_worst_and_goes_on(
    saved: Path, pool: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(saved), str(pool), str(target), "--out", str(tmp_path / "out"), "--lora", "2", "--last-blocks", "1"]
    command += ["--dim", "256", "--max-length", "64", "--warm-up", "2"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "3 records cannot be scored:" in first
    assert "encode: KeyError" in first
    assert "17 of 17 records ranked towards 5 rows" in first
    for words in ("\nbest ", "\nworst ", "mean rank", str(tmp_path / "out" / "sums" / "scored.jsonl")):
        assert words in first
    assert main(command) == 0
    assert "17 sketches found" in capsys.readouterr().out
    assert main([*command, "--lr", "1"]) == 2
    assert "learning_rate = 0.0002, not 1.0" in capsys.readouterr().err
    adapted, _ = load_model(str(saved), lora=2, blocks=None, seed=0, device="cpu", dtype=torch.float32)
    adapted.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    again = [str(tmp_path / "adapter"), *command[1:4], str(tmp_path / "of adapter"), "--max-length", "64"]
    assert main(again) == 0
    assert main([*again, "--lora", "2"]) == 2
    assert "is an adapter: leave --lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pool": "missing.jsonl"}, "there is no file"),
        ({"target": "missing.jsonl"}, "there is no file"),
        ({"pool": "empty.jsonl"}, "one of them is empty"),
        ({"target": "other.jsonl"}, "encode: KeyError"),
        ({"pool": "other.jsonl"}, "encode: KeyError"),
        ({"pool": "cut.jsonl.gz"}, "it was cut"),
        ({"more": ["--dim", "7"]}, "even number"),
        ({"more": ["--max-length", "0"]}, "max_length must be positive"),
        ({"more": ["--last-blocks", "9"]}, "count must be from 1 to the 3 blocks"),
        ({"more": ["--optimizer-state", "other.pt"]}, "in no known order do their shapes agree"),
        ({"more": ["--optimizer-state", "sgd.pt"]}, "Expected the state of an AdamW (exp_avg, exp_avg_sq, step)"),
        ({"more": ["--optimizer-state", "tensor.pt"]}, "Expected what AdamW.state_dict() returned"),
        ({"more": ["--out", "full"]}, "Expected an empty folder"),
        ({"part": []}, "--lora RANK, --last-blocks N, or both"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_is_an_error_that_says_what_to_do(
    change: dict[str, Any],
    words: str,
    saved: Path,
    pool: Path,
    target: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n\n")
    write_lines(Path("other.jsonl"), [{"text": "no prompt"}])
    packed = write_lines(Path("whole.jsonl.gz"), text_records(9, seed=1)).read_bytes()
    Path("cut.jsonl.gz").write_bytes(packed[:-20])
    Path("full").mkdir()
    Path("full", "something").touch()
    for name, optimizer, size in (("other", torch.optim.AdamW, 3), ("sgd", torch.optim.SGD, 3)):
        parameter = nn.Parameter(torch.ones(size))
        parameter.grad = torch.ones(size)
        made = optimizer([parameter], lr=0.1, **({"momentum": 0.5} if name == "sgd" else {}))
        made.step()
        torch.save(made.state_dict(), f"{name}.pt")
    torch.save(torch.ones(3), "tensor.pt")
    command = [str(saved), change.get("pool", str(pool)), change.get("target", str(target)), "--max-length", "64"]
    part = change.get("part", ["--last-blocks", "1"])
    assert main([*command, "--out", "out", *part, *change.get("more", [])]) == 2
    assert words in capsys.readouterr().err


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from ftw_optim.score import _store
from ftw_optim.score._ranking import rank_records
from ftw_optim.score._store import Rows
_store.AT_ONCE = 2**20
n, folder = int(sys.argv[1]), Path(sys.argv[2])
rows = Rows(folder / "rows", width=512, dtype=torch.float32)
generator = torch.Generator().manual_seed(0)
for _ in range(n // 1000):
    rows.append(torch.randn(1000, 512, generator=generator))
records = ({"id": str(at), "source": "s", "loss": 0.0, "begins": ""} for at in range(n))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = rank_records(rows, records, torch.randn(8, 512), folder / "scored", sketch_error=0.1, compared=64)
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found.ranked]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pool(tmp_path: Path) -> None:
    """Ranking 80,000 rows (164 MB) takes but 20 bytes for each of them more than ranking 4,000 (8 MB)."""
    peaks = []
    for n in (4_000, 80_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, str(n), str(folder)], capture_output=True, text=True, check=True
        )
        peak, ranked = json.loads(ran.stdout)
        assert ranked == n
        peaks.append(peak)
        shutil.rmtree(folder)
    assert peaks[1] - peaks[0] < 30_000  # kilobytes, of the 156,000 that the further rows have


@pytest.mark.slow
def test_a_run_killed_by_a_signal_goes_on(saved: Path, tmp_path: Path, target: Path) -> None:
    pool = write_lines(tmp_path / "pool.jsonl.gz", text_records(300, seed=1))
    command = [sys.executable, "-m", "ftw_optim.score", str(saved), str(pool), str(target), "--last-blocks", "1"]
    command += ["--dim", "64", "--max-length", "64", "--warm-up", "2", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    running = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    place = tmp_path / "killed" / "place.json"
    while running.poll() is None and not place.exists():
        pass
    running.kill()
    running.wait()
    assert not json.loads(place.read_text())["done"]
    ran = subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "going on from there" in ran.stdout
    for name in ("gradients.bin", "records.jsonl", "sums/scored.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
