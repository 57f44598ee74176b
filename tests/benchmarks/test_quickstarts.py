"""The quick starts: short enough to be read at once, and each runs and says what was kept and what was learned."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from dates import MIXED, encoded, questions
from pays import tiny

from tests.support.grids import slow
from tests.support.models import seeded

QUICKSTARTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("quickstart_*.py"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),  # TRL and PEFT
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model on disk, whose tokenizer knows dates."""
    path = tmp_path_factory.mktemp("quickstarts")
    asked = questions(MIXED * 20, seed=0)
    tokenizer = tiny.train_tokenizer([[record["prompt"], record["completion"]] for record in asked])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    seeded(lambda: LlamaForCausalLM(config)).save_pretrained(path)  # type: ignore[operator]
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("script", QUICKSTARTS, ids=lambda script: script.stem)
def test_a_quick_start_is_short(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40


def test_there_is_one_for_a_loop_and_for_each_trainer() -> None:
    assert [script.stem for script in QUICKSTARTS] == ["quickstart_loop", "quickstart_sft", "quickstart_trainer"]


@pytest.mark.parametrize("name", ["loop", slow("trainer"), slow("sft")])
def test_a_quick_start_says_what_was_kept_and_what_was_learned(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = next(script for script in QUICKSTARTS if script.stem == f"quickstart_{name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--model", str(model), "--steps", "12"])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    (weights,) = re.findall(r"^weight: (.*?)(?:;|$)", printed, re.MULTILINE)
    shares = {kind: int(share) for kind, share in re.findall(r"(\w+) (\d+)%", weights)}
    assert shares.keys() <= set(MIXED)
    assert max(shares, key=shares.__getitem__) == "right"
    assert sum(shares.values()) == pytest.approx(100, abs=2), "of rounded numbers"
    before, after = map(float, re.findall(r"right answers: ([\d.]+), afterwards ([\d.]+)", printed)[0])
    assert after < before


def test_a_quarter_of_the_answers_is_right_and_only_answers_have_labels(model: Path) -> None:
    assert MIXED.count("right") * 4 == len(MIXED)
    right, missing, weekday = questions(["right", "missing", "weekday"], seed=5)
    assert right["prompt"].endswith("in ISO format:")
    assert re.fullmatch(r" \d{4}-\d\d-\d\d", right["completion"])
    assert (missing["completion"], weekday["completion"][-3:]) == (" TODO", "day")
    tokenizer = tiny.train_tokenizer([[right["prompt"], right["completion"]]])
    (row,) = encoded([right], tokenizer)
    labelled = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(labelled) == right["completion"]
    assert tokenizer.decode(row["input_ids"]) == right["prompt"] + right["completion"]
