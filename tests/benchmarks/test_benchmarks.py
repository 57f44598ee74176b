"""The main job: its records and batches, text that every machine has, and a short run."""

from __future__ import annotations

import ast
import gzip
import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from finetune import command as finetune
from finetune import corpus
from pays import command as pays
from pays import records, report, tiny

RECORDS = [
    {"source": f"s{index % 3}", "prompt": f"What is {index} and {index}?", "response": f"It is {2 * index}."}
    for index in range(60)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.train_tokenizer([[record["prompt"], record["response"]] for record in RECORDS])


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
def test_json_lines_are_read(tmp_path: Path, name: str) -> None:
    assert records.read_records(str(write_lines(tmp_path / name, RECORDS))) == RECORDS


def test_a_data_set_is_read_by_name_and_split(tmp_path: Path) -> None:
    for split, lines in (("train", RECORDS[:5]), ("test", RECORDS[5:])):
        write_lines(tmp_path / f"{split}.jsonl", lines)
    assert records.read_records(str(tmp_path)) == RECORDS[:5]
    assert records.read_records(f"{tmp_path}:test") == RECORDS[5:]


def test_records_without_a_response_field_are_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "records.jsonl", [{"prompt": "?", "answer": "!"}])
    with pytest.raises(ValueError, match="record 0 has the fields prompt, answer"):
        records.read_records(str(path))


def test_only_the_response_and_the_end_carry_a_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = records.encoder(tokenizer, 64)
    batch = records.collate([encode(record) for record in (RECORDS[1], RECORDS[59] | {"response": "No. " * 5})])
    counted = batch["labels"] != records.IGNORED
    assert tokenizer.decode(batch["labels"][0][counted[0]]) == "It is 2." + tiny.END
    assert tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]) == (
        "What is 1 and 1?\nIt is 2." + tiny.END
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
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encode = records.encoder(tokenizer, 64)
    first, again, other = (records.shuffled_examples(RECORDS, encode, 150, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first[:60]) == sorted(first[60:120])
    assert first[:60] != first[60:120]


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


@pytest.fixture
def machine_text(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Records in the place of the docstrings, of which the target's area has a sixth."""
    found = [
        {"source": corpus.TARGET_AREA if index % 6 == 0 else f"s{index % 3}", **_said(index)} for index in range(900)
    ]
    monkeypatch.setattr(corpus, "installation_records", lambda: found)
    monkeypatch.setattr(corpus, "without_near_copies", list)
    monkeypatch.setattr(finetune, "TARGET_RECORDS", 16)
    monkeypatch.setattr(finetune, "TEST_RECORDS", 20)
    monkeypatch.setattr(pays, "pretrained", lambda name, cache: tiny.tiny_model())
    return found


def _said(index: int) -> dict[str, str]:
    return {"prompt": f"What is {index} and {index}?", "response": f"It is {2 * index}."}


SMALL = [
    part
    for name, value in {
        "steps": 4,
        "candidates": 6,
        "keep": 2,
        "target-batch": 3,
        "read-ahead": 9,
        "test-rows": 12,
        "pool-rows": 8,
        "blocks": 2,
        "lora": 2,
    }.items()
    for part in (f"--{name}", str(value))
]


def test_the_default_job_is_towards_an_area_of_this_machine(
    machine_text: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main(["--out", str(tmp_path), *SMALL])
    printed = capsys.readouterr().out
    for label in (
        "zero-shot",
        "AdamW, by record",
        "ftw, by token",
        "n tested, by token",
        "(baseline: AdamW, by token)",
        "(baseline: target + rand., tok)",
        "n target, by token",
        "50 % of the stream refusal",
    ):
        assert label in printed
    assert (tmp_path / "finetune.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "table.json").read_text())
    assert [one["arm"] for one in figures] == finetune.ARMS
    shares = {one["arm"]: one["own"][0] for one in figures}
    assert 0.0 < shares["adamw-n"] < 1.0
    pool, target, test = (
        records.read_records(tmp_path / "records" / f"{name}.jsonl") for name in ("pool", "target", "test")
    )
    assert {record["source"] for record in target + test} == {corpus.TARGET_AREA}
    assert len(pool) + len(target) + len(test) == len(machine_text)
    # The files are kept, and so are the runs: the same command does nothing anew.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    (tmp_path / "records" / "pool.jsonl").touch()
    finetune.main(["--out", str(tmp_path), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == before


def test_records_and_options_of_ones_own(
    machine_text: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = write_lines(tmp_path / "pool.jsonl.gz", RECORDS[:40])
    target, test = (write_lines(tmp_path / f"{name}.jsonl", RECORDS[40:]) for name in ("target", "test"))
    files = ["--pool", str(pool), "--target", str(target), "--test", str(test), "--out", str(tmp_path / "out")]
    finetune.main([*files, *SMALL, "--arms", "adamw-n", "--seeds", "2"])
    assert "AdamW, by record" in capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (figures["arm"], figures["seeds"]) == ("adamw-n", 2)
    assert not (tmp_path / "out" / "records").exists()


def test_half_a_data_set_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.parse_arguments(["--pool", "x.jsonl"])
    assert "--pool, --target and --test go together" in capsys.readouterr().err
