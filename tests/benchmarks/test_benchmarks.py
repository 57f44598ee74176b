"""The benchmarks: their data, their batches, and a short run of each kind."""

from __future__ import annotations

import ast
import gzip
import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from finetune import command as finetune
from finetune import corpus, models, records, report

from tests.support.grids import slow

RECORDS = [
    {"source": f"s{index % 3}", "prompt": f"What is {index} and {index}?", "response": f"It is {2 * index}."}
    for index in range(60)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.train_tokenizer([[record["prompt"], record["response"]] for record in RECORDS])


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# --- corpus


def test_a_record_is_a_signature_and_its_docstring() -> None:
    source = '''
class Shelf(list, Generic[T]):
    """Holds books in the order of their titles."""

    if True:
        async def find(self, title: str = "A", *rest) -> Book | None:
            """The book with this title, or None if it is lent."""

    def short(self):
        """Too short."""

    def outer(self):
        def inner():
            """Local functions are nobody's documentation."""
'''
    assert list(corpus.documented(ast.parse(source), "library")) == [
        {
            "source": "library",
            "prompt": "class Shelf(list, Generic[T]):",
            "response": "Holds books in the order of their titles.",
        },
        {
            "source": "library",
            "prompt": "def find(self, title: str='A', *rest) -> Book | None:",
            "response": "The book with this title, or None if it is lent.",
        },
    ]


def test_sources_are_read_and_not_imported(tmp_path: Path) -> None:
    for name in ("red/apple.py", "green.py", "_hidden.py", "red/tests/pear.py", "red/broken.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f'raise SystemExit\n\ndef f():\n    """Documentation of {name}, long enough."""\n')
    (tmp_path / "red/broken.py").write_text("def f(:\n")
    found = [(record["source"], record["response"]) for record in corpus.read_tree(tmp_path, package="torch")]
    assert found == [
        ("torch.green", "Documentation of green.py, long enough."),
        ("torch.red", "Documentation of red/apple.py, long enough."),
    ]


def test_near_copies_are_removed_whatever_their_case_and_spacing() -> None:
    text = "Returns the number of books on the shelf, lent ones included."
    originals = [{"source": "a", "prompt": "def count():", "response": text}]
    copies = [
        {"source": "b", "prompt": "def size():", "response": "Note. " + text.upper().replace(" ", "\n  ")},
        {"source": "b", "prompt": "def len():", "response": text[10:52] + " And nothing else."},
    ]
    different = [{"source": "c", "prompt": "def books():", "response": text[:28] + "shelves."}]
    assert corpus.without_near_copies(originals + copies + different) == originals + different


@pytest.mark.slow
def test_the_embedded_corpus_hides_its_target_area_and_holds_its_splits_apart() -> None:
    before = set(sys.modules)
    pool, target, test = corpus.build_corpus(160, 256)
    # Python imports the codec that a file declares.
    imported = {name for name in set(sys.modules) - before if not name.startswith("encodings.")}
    assert not imported, "reading must not import what it reads"
    assert (len(target), len(test)) == (160, 256)
    assert {record["source"] for record in target + test} == {corpus.TARGET_AREA}
    hidden = sum(record["source"] == corpus.TARGET_AREA for record in pool)
    assert len(pool) > 4000
    assert 0.02 * len(pool) < hidden < 0.3 * len(pool)
    # No window in two records, of one split or of two: all windows together are as many as each one's.
    everything = [f"{record['prompt']} {record['response']}" for record in pool + target + test]
    flat = [" ".join(text.lower().split()) for text in everything]
    found = [{text[at : at + 40] for at in range(len(text) - 39)} for text in flat]
    assert len(set().union(*found)) == sum(map(len, found))


def test_an_area_that_is_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "installation_records", lambda: RECORDS)
    with pytest.raises(ValueError, match=r"'s1' has \d+ records"):
        corpus.build_corpus(50, 50, area="s1")


# --- records


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_json_lines_are_read_as_a_stream(tmp_path: Path, name: str) -> None:
    stream = records.open_records(str(write_lines(tmp_path / name, RECORDS)))
    assert list(stream) == RECORDS


def test_a_data_set_is_read_by_name_and_split(tmp_path: Path) -> None:
    for split, lines in (("train", RECORDS[:5]), ("test", RECORDS[5:])):
        write_lines(tmp_path / f"{split}.jsonl", lines)
    assert list(records.open_records(str(tmp_path))) == RECORDS[:5]
    assert list(records.open_records(f"{tmp_path}:test")) == RECORDS[5:]


def test_records_without_a_response_field_are_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "records.jsonl", [{"prompt": "?", "answer": "!"}])
    with pytest.raises(ValueError, match="it has the fields prompt, answer"):
        records.open_records(str(path))


def test_only_the_response_and_the_end_carry_a_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = records.encoder(tokenizer, 64)
    batch = records.collate([encode(record) for record in (RECORDS[1], RECORDS[59] | {"response": "No. " * 5})])
    counted = batch["labels"] != records.IGNORED
    assert tokenizer.decode(batch["labels"][0][counted[0]]) == "It is 2." + models.END
    assert tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]) == (
        "What is 1 and 1?\nIt is 2." + models.END
    )
    assert torch.equal(batch["input_ids"][counted], batch["labels"][counted])
    assert not counted[batch["attention_mask"] == 0].any()
    assert batch["attention_mask"][1].all(), "padded to the longest"


def test_records_without_a_label_are_skipped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    blank = [{"prompt": "Why?", "response": response} for response in ("", " \n", None)]
    long = [{"prompt": "Why? " * 40, "response": "Because."}]
    encode = records.encoder(tokenizer, 32)
    examples, skipped = records.first_examples([*blank, *long, *RECORDS[:2]], encode, 9)
    assert (len(examples), skipped) == (2, 4)
    assert [example.source for example in examples] == ["s0", "s1"]
    with pytest.raises(ValueError, match="None of 4 records"):
        records.shuffled_examples([*blank, *long], encode, 1, seed=0)


def test_a_prompt_may_be_empty(tokenizer: PreTrainedTokenizerBase) -> None:
    example = records.encoder(tokenizer, 32)({"prompt": None, "response": "Yes."})
    assert example is not None
    assert example.prompt_length > 0, "the first label needs a token to be predicted from"


def test_an_order_depends_on_the_seed_alone_and_every_round_is_complete(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    stream = records.open_records(str(write_lines(tmp_path / "records.jsonl", RECORDS)))
    encode = records.encoder(tokenizer, 64)
    for source in (RECORDS, stream):
        first, again, other = (records.shuffled_examples(source, encode, 150, seed=seed)[0] for seed in (0, 0, 1))
        assert first == again
        assert first != other
        assert sorted(first[:60]) == sorted(first[60:120])
        assert first[:60] != first[60:120]
        even, odd = records.halves(source)
        assert [list(even), list(odd)] == [RECORDS[0::2], RECORDS[1::2]]


def test_batches_go_through_all_examples_before_one_comes_back() -> None:
    examples = [records.Example([index], 0, "a") for index in range(6)]
    rounds = list(islice(records.endless_batches(examples, 4, seed=3), 6))
    assert all(len(batch) == 4 for batch in rounds)
    flat = [example for batch in rounds for example in batch]
    assert all(sorted(flat[at : at + 6]) == examples for at in range(0, 24, 6))


# --- report


@pytest.mark.parametrize(("level", "expected"), [(5.0, 0.0), (3.5, 15.0), (2.0, 20.0), (1.0, float("inf"))])
def test_a_level_is_reached_where_the_curve_first_comes_down_to_it(level: float, expected: float) -> None:
    assert report.first_reached([0.0, 10.0, 20.0], [5.0, 5.0, 2.0], level) == expected


# --- the whole


def save_model(kind: str, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=64,
                eos_token_id=0,
                bos_token_id=None,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=64,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "extra"),
    [slow("qwen3", []), ("gpt2", ["--sequential"]), slow("qwen3", ["--lora", "2"]), slow("gpt2", ["--lora", "2"])],
    ids=["qwen3", "gpt2", "qwen3-lora", "gpt2-lora"],
)
def test_a_model_from_disk_is_tuned_on_records_from_files(
    kind: str,
    extra: list[str],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = save_model(kind, tokenizer, tmp_path / kind)
    pool = write_lines(tmp_path / "pool.jsonl.gz", RECORDS[:40])
    target = write_lines(tmp_path / "target.jsonl", RECORDS[40:50])
    test = write_lines(tmp_path / "test.jsonl", [*RECORDS[50:], {"prompt": "?", "response": "", "source": ""}])
    out = tmp_path / "out"
    arguments = {
        "--pool": pool,
        "--target": target,
        "--test": test,
        "--model": directory,
        "--out": out,
        "--steps": 3,
        "--eval-every": 2,
        "--candidates": 6,
        "--keep": 2,
        "--target-batch": 3,
        "--refresh-every": 2,
        "--seeds": 2,
    }
    flat = [str(item) for pair in arguments.items() for item in pair]
    finetune.main([*flat, "--lrs", "1e-3", "1e-2", *extra])

    printed = capsys.readouterr().out
    assert all(arm.label in printed for arm in finetune.ARMS.values())
    assert max(map(len, printed.splitlines())) <= 100
    assert (out / "finetune.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert results["sizes"]["skipped"] == 1
    assert len(results["runs"]) == 2 * len(finetune.ARMS)
    for run in results["runs"]:
        assert run["steps"] == [0, 2, 3]
        assert run["losses"][0] == results["runs"][0]["losses"][0], "all arms start from the same weights"
        assert run["losses"][1] != run["losses"][0]
        if run["picks"]:
            assert run["arm"] in ("keep_k", "tilt_all")
            assert len(run["picks"]) == 3
            assert sum(run["picks"][0]["shares"].values()) == pytest.approx(1)
    assert [sum(counts.values()) for counts in results["offered"]["0"]] == [6, 6, 6]


@pytest.mark.slow
def test_the_small_gpt_is_made_once(tmp_path: Path) -> None:
    first = models.small_gpt(RECORDS, tmp_path, steps=2)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert models.small_gpt(RECORDS, tmp_path, steps=2) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert models.small_gpt(RECORDS[:50], tmp_path, steps=2) != first
    model, tokenizer = models.load_model(str(first))
    assert 0.8e6 < sum(param.numel() for param in model.parameters()) < 1.5e6
    assert tokenizer.eos_token == models.END
    assert not model.training, "dropout must be off"


def test_the_same_command_gives_the_same_losses(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    directory = save_model("qwen3", tokenizer, tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    files = ["--pool", str(data), "--target", str(data), "--test", str(data), "--model", str(directory)]
    small = ["--steps", "2", "--candidates", "4", "--keep", "2", "--seeds", "1", "--lrs", "1e-2"]
    interleaved, sequential = (
        finetune.main([*files, *small, "--out", str(tmp_path), *extra]) for extra in ([], ["--sequential"])
    )
    assert [run.losses for run in interleaved.runs] == [run.losses for run in sequential.runs]


def test_half_a_data_set_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.parse_arguments(["--pool", "x.jsonl"])
    assert "--pool, --target and --test go together" in capsys.readouterr().err
