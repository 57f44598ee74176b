"""Records and padded batches of them: JSON lines and data sets, tokens, loss on the response only."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that no loss counts

Record = dict[str, Any]
Batch = dict[str, Tensor]


class Example(NamedTuple):
    """One encoded record: the tokens, of which the first ``prompt_length`` carry no loss."""

    tokens: list[int]
    prompt_length: int
    source: str

    @property
    def response_length(self) -> int:
        """The number of tokens that carry a loss."""
        return len(self.tokens) - self.prompt_length


Encoder = Callable[[Record], Example | None]


def read_records(name: str | Path) -> list[Record]:
    """All records of a JSON-lines file (gzip too), or of a data set, ``NAME[:CONFIG][:SPLIT]`` (``train``).

    Raises:
        ValueError: a record lacks ``prompt`` or ``response``, or there is none.
    """
    path = Path(name)
    if path.is_file():
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        # By line feeds alone: responses may hold other characters that end a line.
        records = [json.loads(line) for line in text.split("\n") if line]
    else:
        where, *rest = str(name).split(":")
        config = rest[0] if len(rest) == 2 else None
        records = list(load_dataset(where, config, split=rest[-1] if rest else "train"))
    for number, record in enumerate(records or [{}]):
        if not {"prompt", "response"} <= record.keys():
            found = f"has the fields {', '.join(record)}" if record else "is missing"
            raise ValueError(f"{name} needs records with the fields prompt and response; record {number} {found}.")
    return records


def encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
    """A function from a record to its example, cut after ``max_length`` tokens; None where no token has a loss."""

    def encode(record: Record) -> Example | None:
        response = (record["response"] or "").strip()
        # With the special tokens that this tokenizer puts in front of every text.
        head = tokenizer(f"{record['prompt'] or ''}\n").input_ids
        if not response or len(head) >= max_length:
            return None
        body = tokenizer(response, add_special_tokens=False).input_ids
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return Example([*head, *body, *end][:max_length], len(head), str(record.get("source") or "unnamed"))

    return encode


def first_examples(records: Iterable[Record], encode: Encoder, count: int) -> tuple[list[Example], int]:
    """The first ``count`` examples, fewer where the records end, and the number of records skipped."""
    examples: list[Example] = []
    skipped = 0
    for record in records:
        if len(examples) == count:
            break
        example = encode(record)
        if example is None:
            skipped += 1
        else:
            examples.append(example)
    return examples, skipped


def in_random_order(records: Sequence[Record], *, seed: int) -> list[Record]:
    """One pass over the records in a seeded order."""
    return random.Random(seed).sample(records, len(records))


def shuffled_examples(
    records: Sequence[Record], encode: Encoder, count: int, *, seed: int
) -> tuple[list[Example], int]:
    """``count`` examples in a seeded order, a new one for each round, and the number skipped.

    Raises:
        ValueError: no record gives an example.
    """
    examples: list[Example] = []
    skipped = epoch = 0
    while len(examples) < count:
        order = in_random_order(records, seed=1_000_003 * seed + epoch)
        more, more_skipped = first_examples(order, encode, count - len(examples))
        if not more:
            raise ValueError(f"None of {more_skipped} records has a response within the length; raise --max-length.")
        examples += more
        skipped += more_skipped
        epoch += 1
    return examples, skipped


def endless_batches(examples: Sequence[Example], size: int, *, seed: int) -> Iterator[list[Example]]:
    """Batches of ``size`` examples without end, each round through them in a new seeded order."""
    generator = random.Random(seed)
    waiting: list[Example] = []
    while True:
        while len(waiting) < size:
            waiting += generator.sample(examples, len(examples))
        yield waiting[:size]
        del waiting[:size]


def collate(examples: Sequence[Example], *, device: torch.device | str = "cpu") -> Batch:
    """``input_ids``, ``attention_mask`` and ``labels``, padded on the right; no label on the prompt."""
    longest = max(len(example.tokens) for example in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.int64)  # any token will do where the mask is 0
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (tokens, prompt_length, _) in enumerate(examples):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        attention_mask[row, : len(tokens)] = 1
        labels[row, prompt_length : len(tokens)] = input_ids[row, prompt_length : len(tokens)]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}
