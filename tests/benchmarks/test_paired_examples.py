"""The example scripts: each runs, and is the script without selection but for a few lines."""

from __future__ import annotations

import difflib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support.trainer_runs import model, tokenizer

EXAMPLES = Path(__file__).parents[2] / "benchmarks" / "examples"
NAMES = ("trainer_lora", "sft_lora", "dpo_lora", "plain_loop")
CHANGED = {
    "trainer_lora": 12,
    "sft_lora": 12,
    "dpo_lora": 12,
    "plain_loop": 16,
    "torchrun_loop": 18,
    "torchrun_fsdp": 20,
}
"""Lines of the diff that are added or removed, those of the docstring and of the import included."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning"),  # TRL and PEFT
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with its tokenizer, and records."""
    path = tmp_path_factory.mktemp("examples")
    model(tie_word_embeddings=True).save_pretrained(path / "model")  # type: ignore[operator]
    tokenizer().save_pretrained(path / "model")
    generator = torch.Generator().manual_seed(0)

    def text(words: int, top: int) -> str:
        return " ".join(f"w{number}" for number in torch.randint(0, top, (words,), generator=generator).tolist())

    for name, count, top in (("pool", 40, 40), ("target", 6, 8)):
        records = [
            {"source": f"{name}/{n % 3}", "prompt": text(3, top), "response": text(2 + n % 4, top), "lang": "en"}
            for n in range(count)
        ]
        for record in records:
            record |= {"chosen": record["response"], "rejected": text(4, top)}
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(
    script: Path, folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> dict[str, torch.Tensor]:
    settings = ["--model", str(folder / "model"), "--data", str(folder / "pool.jsonl"), "--steps", "3", "--cpu"]
    monkeypatch.setattr(sys, "argv", [str(script), *settings, "--output", str(output), *more])
    runpy.run_path(str(script), run_name="__main__")
    return safetensors.torch.load_file(output / "adapter_model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_with_and_without_selection(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(EXAMPLES / f"{name}_baseline.py", folder, tmp_path / "plain", monkeypatch)
    target = ("--target", str(folder / "target.jsonl"))
    ours = run(EXAMPLES / f"{name}.py", folder, tmp_path / "ours", monkeypatch, *target)
    assert ours.keys() == plain.keys()
    assert all(bool(value.isfinite().all()) for value in ours.values())
    trained = [key for key in ours if "lora_B" in key]  # zero before training
    assert trained
    assert all(bool(ours[key].any()) and not torch.equal(ours[key], plain[key]) for key in trained)


@pytest.mark.slow
def test_the_packed_example_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ("--target", str(folder / "target.jsonl"), "--packing")
    found = run(EXAMPLES / "sft_lora.py", folder, tmp_path, monkeypatch, *target)
    assert any(bool(value.any()) for key, value in found.items() if "lora_B" in key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "saved", "of_interest"),
    [("torchrun_loop", "adapter_model", "lora_B"), ("torchrun_fsdp", "model", "proj")],
)
def test_an_example_for_several_processes_runs_on_two(
    name: str, saved: str, of_interest: str, folder: Path, tmp_path: Path
) -> None:
    found = {}
    for end in ("_baseline", ""):
        script = str(EXAMPLES / f"{name}{end}.py")
        settings = ["--model", str(folder / "model"), "--data", str(folder / "pool.jsonl"), "--steps", "3", "--cpu"]
        settings += ["--output", str(tmp_path / f"run{end}")] + (
            [] if end else ["--target", str(folder / "target.jsonl")]
        )
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
        done = subprocess.run([*launcher, *settings], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found[end] = safetensors.torch.load_file(tmp_path / f"run{end}" / f"{saved}.safetensors")
    trained = [key for key in found[""] if of_interest in key]
    assert trained
    assert all(
        bool(found[""][key].any()) and not torch.equal(found[""][key], found["_baseline"][key]) for key in trained
    )


@pytest.mark.parametrize("name", CHANGED)
def test_an_example_is_the_script_without_selection_but_for_a_few_lines(name: str) -> None:
    plain, ours = ((EXAMPLES / f"{name}{end}.py").read_text().splitlines() for end in ("_baseline", ""))
    lines = [line for line in difflib.ndiff(plain, ours) if line[0] in "+-"]
    assert "ftw_optim" not in "\n".join(plain)
    assert 0 < len(lines) <= CHANGED[name], "\n".join(lines)
