"""The paper's set-up: data sets as records, worked examples, scores against slow ones, and the whole in short."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from paper import command, scoring, sources
from pays import tiny
from pays.arms import ARMS
from pays.records import Record
from pays.runs import Run

from tests.support.grids import slow


def test_data_sets_become_records() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
            {"role": "user", "content": "And?"},
        ],
        "dataset": "talk",
    }
    assert list(sources.conversation(row)) == [{"prompt": "Why?", "response": "So.", "source": "talk"}]
    assert not list(sources.conversation({"messages": row["messages"][:2], "dataset": "talk"}))
    choice = sources.multiple_choice(
        {"subject": "high_school_art", "question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 2}
    )
    assert choice["response"] == "C"
    assert choice["source"] == "mmlu/high_school_art"
    assert choice["prompt"].endswith("about high school art.\n\nWho?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    asked = [
        sources.extraction(
            {"id": f"{language}--{n}", "context": "Here.", "question": "Where?", "answers": {"text": ["here", "Here"]}}
        )
        for language in ("finnish", "korean")
        for n in range(2)
    ]
    assert (asked[0]["response"], asked[0]["answers"], asked[0]["source"]) == (
        "here",
        ["here", "Here"],
        "tydiqa/finnish",
    )
    assert list(sources.one_of_each_language(iter(asked))) == [asked[0], asked[2]]


def record(source: str, question: str, answer: str, header: str = "Questions.") -> Record:
    return {"source": source, "prompt": f"{header}\n\n{question}", "response": answer}


def test_worked_examples_are_of_the_questions_own_source_where_there_are_enough() -> None:
    examples = [record("a", "1?", "one"), record("b", "2?", "two", "Other."), record("a", "3?", "three")]
    asked = record("a", "4?", "four")
    assert sources.with_examples(asked, examples, 2) == "Questions.\n\n1?\none\n\n3?\nthree\n\n4?"
    assert sources.with_examples(asked, examples, 3) == "Questions.\n\n1?\none\n\nOther.\n\n2?\ntwo\n\n3?\nthree\n\n4?"
    assert sources.with_examples(asked, examples, 0) == "Questions.\n\n4?"
    plain = {"source": "a", "prompt": "Just?", "response": "so"}
    assert sources.with_examples(plain, [plain], 1) == "Just?\nso\n\nJust?"


@pytest.mark.parametrize(
    ("written", "answer", "expected"),
    [
        ("The cat, the dog", "the cat", 2 * 2 / (4 + 2)),
        ("", "cat", 0.0),
        ("...", "", 1.0),
        ("cat", "cat.", 1.0),
        ("cat cat", "cat", 2 / 3),
        ("باريس، فرنسا", "باريس", 2 / 3),
    ],
)
def test_f1_counts_the_words_that_are_shared(written: str, answer: str, expected: float) -> None:
    assert scoring.f1(written, answer) == pytest.approx(expected)


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    net, tokenizer = tiny.tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return net.double().eval(), tokenizer


def questions(task: str) -> tuple[list[Record], list[Record]]:
    examples, asked = command._generated_task(task)
    return examples, [{**one, "prompt": one["prompt"] + " Now?" * (number % 3)} for number, one in enumerate(asked[:7])]


def test_the_likeliest_letter_counts_as_when_questions_are_run_alone(model: tuple[Any, Any]) -> None:
    net, tokenizer = model
    examples, asked = questions("mmlu")
    found = scoring.scorer("mmlu", net, tokenizer, examples, asked, batch=4, longest=500)()
    expected = []
    for one in asked:
        ids = tokenizer(f"{sources.with_examples(one, examples, 5)}\n", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = net(ids).logits[0, -1]
        letters = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "ABCD"]
        expected.append(float(int(logits[letters].argmax()) == one["answer"]))
    assert found == expected
    assert 0.0 < sum(found) < len(found)


def test_answers_are_written_as_when_questions_are_run_alone(
    model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, tokenizer = model
    examples, asked = questions("tydiqa")
    seen: list[str] = []
    monkeypatch.setattr(scoring, "f1", lambda written, answer: seen.append(written) or float(answer == "It is 5."))
    asked[0]["answers"] = ["no", "It is 5."]
    found = scoring.scorer("tydiqa", net, tokenizer, examples, asked, batch=4, longest=500)()
    assert found[0] == 1.0
    del seen[0]  # of the two answers
    for one, written in zip(asked, seen, strict=True):
        ids = tokenizer(f"{sources.with_examples(one, examples, 1)}\n").input_ids
        start = len(ids)
        for _ in range(scoring.ANSWER_TOKENS):
            with torch.no_grad():
                coming = int(net(torch.tensor([ids])).logits[0, -1].argmax())
            if coming == tokenizer.eos_token_id:
                break
            ids.append(coming)
        assert written == tokenizer.decode(ids[start:]).strip().split("\n")[0]


def test_a_long_prompt_loses_its_beginning(model: tuple[Any, Any]) -> None:
    net, tokenizer = model
    examples, asked = questions("mmlu")
    lengths = []
    inner = net.forward

    def watching(**inputs: Any) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return inner(**inputs)

    net.forward = watching
    try:
        scoring.scorer("mmlu", net, tokenizer, examples, asked, batch=4, longest=9)()
    finally:
        del net.forward
    assert set(lengths) == {9}


def test_the_table_sets_scores_beside_random_records() -> None:
    runs = [
        Run(arm=arm, steps=1, lr=1.0, seed=seed, scores=scores)
        for arm, of_seeds in {"adamw-k": ([0, 1], [1, 1]), "ftw": ([1, 1], [1, 1])}.items()
        for seed, scores in enumerate(of_seeds)
    ]
    lines = command.table(runs, [0.0, 1.0], task="mmlu").splitlines()
    assert lines[1].split() == ["zero-shot", "50.00"]
    assert lines[2].split() == [*ARMS["adamw-k"].label.split(), "75.00"]
    assert lines[3].split()[:3] == ["filter-then-weight", "100.00", "+25.00"]


@pytest.mark.parametrize("task", ["mmlu", slow("tydiqa")])
def test_the_quick_form_gives_every_score(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["adamw-k", "ftw", "gradmatch", "target+learned"]
    arguments = ["--quick", "--task", task, "--out", str(tmp_path), "--threads", "1", "--arms", *arms]
    text = command.main(arguments)
    assert text in capsys.readouterr().out
    for label in ("zero-shot", *(ARMS[arm].label for arm in arms)):
        assert label in text
    # What is there is not run again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(before) == 2 * len(arms)
    assert command.main(arguments) == text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == before


def test_a_budget_that_keeps_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(["--out", str(tmp_path), "--candidates", "8"])
    assert "keeps nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.parse_arguments(["--out", str(tmp_path), "--target", "x"])
    assert "go together" in capsys.readouterr().err


def test_every_arm_of_the_table_exists() -> None:
    assert set(command.TABLE) <= set(ARMS)
    assert command.BASELINE in command.TABLE
