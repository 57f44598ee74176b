"""The example scripts, run on a tiny random model saved to disk."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pays import tiny

from tests.support.models import seeded

EXAMPLES = Path(__file__).parents[2] / "benchmarks" / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks under its old name
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # Lightning
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, candidates of two kinds, and target examples of one of them."""
    directory = tmp_path_factory.mktemp("examples")
    sums = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}.", "source": "sums"} for i in range(40)]
    other = [{"prompt": f"Say {i}", "response": "word " * (1 + i % 5), "source": "words"} for i in range(20)]
    for name, records in (("pool", [*sums[:20], *other, {**other[0], "response": ""}]), ("target", sums[20:])):
        lines = [json.dumps(record) for record in records]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer = tiny.train_tokenizer([[record["prompt"], record["response"]] for record in [*sums, *other]])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    seeded(lambda: LlamaForCausalLM(config)).save_pretrained(directory / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(directory / "model")
    return directory


@pytest.fixture
def example(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Runs a script, and returns the directory of what it wrote."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name: str, output: str, **options: Any) -> Path:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        given = {"model": here / "model", "pool": here / "pool.jsonl", "target": here / "target.jsonl", **options}
        given |= {"output": tmp_path / output, "batch-size": 2, "accumulate": 3, "keep": 2, "lora": 2, "lr": 0.01}
        script.main([part for key, value in given.items() for part in (f"--{key}", str(value))])
        _reset()
        return tmp_path / output

    _reset()  # of what a trainer left behind
    with torch.random.fork_rng():
        yield run
    _reset()


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def adapters(here: Path, output: Path) -> dict[str, torch.Tensor]:
    """Of a saved model, which must load onto the one it was trained from."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "model"), output)
    return {name: parameter for name, parameter in model.state_dict().items() if "lora_" in name}


def test_the_loop_of_accelerate_trains_and_resumes(example: Callable[..., Path], here: Path) -> None:
    """Over the end of an epoch: 20 micro-batches of two, three at a step."""
    whole = example("accelerate_loop", "whole", steps=9, **{"save-every": 4})
    trained = adapters(here, whole)
    assert all(bool(value.any()) for value in trained.values())
    torch.manual_seed(5)
    resumed = example("accelerate_loop", "resumed", steps=9, resume=whole / "step-000004", **{"save-every": 4})
    torch.testing.assert_close(adapters(here, resumed), trained, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")  # the resumed run writes elsewhere
def test_the_module_of_lightning_trains_and_resumes(example: Callable[..., Path], here: Path) -> None:
    output = example("lightning_module", "whole", epochs=1)
    assert all(bool(value.any()) for value in adapters(here, output).values())
    with (output / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["selection/kept_share"]]
    shares = [float(row["selection/kept_share"]) for row in rows]
    assert shares == pytest.approx([2 / 6] * 6 + [2 / 4]), "of 20 micro-batches, three at a step"
    assert all(-1.0 <= float(row["selection/cosine"]) <= 1.0 for row in rows)
    again = example("lightning_module", "resumed", epochs=2, resume=output / "last.ckpt")
    with (again / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"1"}, "the second one alone"
