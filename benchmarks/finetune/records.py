"""Records and padded batches of them: JSON lines and data sets as streams, tokens, loss on the response only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that no loss counts
_SHUFFLE_BUFFER = 10_000

Record = dict[str, Any]
Records = Sequence[Record] | IterableDataset
Batch = dict[str, Tensor]


class Example(NamedTuple):
    """One encoded record: the tokens, of which the first ``prompt_length`` carry no loss."""

    tokens: list[int]
    prompt_length: int
    source: str


Encoder = Callable[[Record], Example | None]


def open_records(name: str) -> IterableDataset:
    """A stream over a JSON-lines file (gzip too) or a data set, ``NAME[:CONFIG][:SPLIT]`` (``train``).

    Raises:
        ValueError: the first record lacks ``prompt`` or ``response``, or there is none.
    """
    if Path(name).is_file():
        stream = load_dataset("json", data_files=name, split="train", streaming=True)
    else:
        path, *rest = name.split(":")
        config = rest[0] if len(rest) == 2 else None
        stream = load_dataset(path, config, split=rest[-1] if rest else "train", streaming=True)
    first = next(iter(stream), {})
    if not {"prompt", "response"} <= first.keys():
        found = f"the fields {', '.join(first)}" if first else "no record"
        raise ValueError(f"{name!r} needs records with the fields prompt and response, it has {found}.")
    return stream


def halves(records: Records) -> tuple[Records, Records]:
    """The records of even and of odd index."""
    if isinstance(records, IterableDataset):
        even, odd = (
            records.filter(lambda _, index, rest=rest: index % 2 == rest, with_indices=True) for rest in (0, 1)
        )
        return even, odd
    return records[0::2], records[1::2]


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


def in_random_order(records: Records, *, seed: int) -> Iterable[Record]:
    """One pass over the records in a seeded order; a stream is shuffled through a buffer."""
    if isinstance(records, IterableDataset):
        return records.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return random.Random(seed).sample(records, len(records))


def shuffled_examples(records: Records, encode: Encoder, count: int, *, seed: int) -> tuple[list[Example], int]:
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
