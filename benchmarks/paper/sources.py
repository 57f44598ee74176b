"""Data sets of the hub as records: an instruction mixture as the pool, and two tasks with examples and questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import load_dataset
from pays.records import Record, read_records

POOL = "allenai/tulu-v2-sft-mixture"
LETTERS = "ABCD"


def pool_records(name: str | None, count: int) -> list[Record]:
    """The records of a local file, or the first ``count`` of a mixture of conversations on the hub."""
    if name is not None:
        return read_records(name)
    found = (record for row in load_dataset(POOL, split="train", streaming=True) for record in conversation(row))
    return [record for record, _ in zip(found, range(count), strict=False)]


def conversation(row: Mapping[str, Any]) -> Iterator[Record]:
    """The first exchange of a conversation in the form of Tulu: what was asked, and what was answered."""
    asked = [message["content"] for message in row["messages"] if message["role"] == "user"]
    answered = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    if asked and answered:
        yield {"prompt": asked[0], "response": answered[0], "source": str(row.get("dataset") or "pool")}


def task_records(task: str, target: str | None, test: str | None) -> tuple[list[Record], list[Record]]:
    """Examples and test questions of a task: of local files where they are given, else of the hub."""
    if target is not None and test is not None:
        return read_records(target), read_records(test)
    if task == "mmlu":
        return tuple(list(map(multiple_choice, load_dataset("cais/mmlu", "all", split=of))) for of in ("dev", "test"))
    name = "google-research-datasets/tydiqa"
    train, held_out = (load_dataset(name, "secondary_task", split=of) for of in ("train", "validation"))
    return list(one_of_each_language(map(extraction, train))), list(map(extraction, held_out))


def multiple_choice(row: Mapping[str, Any]) -> Record:
    """A question of MMLU as its authors print it, answered by a letter."""
    subject = str(row["subject"])
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    return {
        "source": f"mmlu/{subject}",
        "prompt": f"{header}\n\n{row['question']}{choices}\nAnswer:",
        "response": LETTERS[row["answer"]],
        "choices": list(row["choices"]),
        "answer": row["answer"],
    }


def extraction(row: Mapping[str, Any]) -> Record:
    """A question of TyDiQA with the passage that holds its answer; all accepted answers are kept."""
    answers = list(row["answers"]["text"])
    return {
        "source": f"tydiqa/{str(row['id']).partition('-')[0]}",
        "prompt": "Answer the following question based on the information in the given passage.\n\n"
        f"Passage: {row['context']}\nQuestion: {row['question']}\nAnswer:",
        "response": answers[0],
        "answers": answers,
    }


def one_of_each_language(records: Iterator[Record]) -> Iterator[Record]:
    """The first record of each source, of which the paper's target set consists."""
    seen: set[str] = set()
    for record in records:
        if record["source"] not in seen:
            seen.add(record["source"])
            yield record


def with_examples(record: Record, examples: Sequence[Record], shots: int) -> str:
    """The question behind ``shots`` worked examples: of its own source where there are enough, else of all.

    What the prompts have in front of their first blank line stands once, if it is the same in all.
    """
    own = [example for example in examples if example["source"] == record["source"]]
    chosen = (own if len(own) >= shots else list(examples))[:shots]
    header, divider, question = record["prompt"].partition("\n\n")
    if not divider:
        header, question = "", record["prompt"]
    parts = []
    for example in chosen:
        before, _, rest = example["prompt"].partition("\n\n")
        parts.append(f"{rest if divider and before == header else example['prompt']}\n{example['response']}")
    return "\n\n".join([*([header] if divider else []), *parts, question])
