"""Records of JSON lines: encoded with the loss on the response alone, in blocks from which a run can go on."""

from __future__ import annotations

import gzip
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from ftw_optim._step.losses import IGNORED
from ftw_optim.integrations.streaming._records import Record, Unreadable, reader_of
from ftw_optim.integrations.streaming._screening import Encode, Sample, Screening

SHOWN = 60
"""Characters of a prompt that are kept to show a record by."""


def encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encode:
    """A function from a record to its tokens, which are cut after ``max_length``, and labels on its response alone.

    The prompt is followed by a line feed, the response by the tokenizer's end of a text. A record is refused (None)
    where its response is empty, or its prompt alone fills the length.
    """

    def encode(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        prompt, response = record["prompt"] or "", (record["response"] or "").strip()
        head = tokenizer(f"{prompt}\n").input_ids  # with what this tokenizer puts in front of every text
        if not response or len(head) >= max_length:
            return None
        body = tokenizer(response, add_special_tokens=False).input_ids
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = [*head, *body, *end][:max_length]
        labels = [*[IGNORED] * len(head), *tokens[len(head) :]]
        return {"input_ids": tokens, "labels": labels, "begins": prompt[:SHOWN]}

    return encode


@final
class Records:
    """The encoded records of a file, read block by block.

    Args:
        path: JSON lines, plain or gzip, with the fields ``prompt`` and ``response``, and ``source`` and ``id`` if there
            are any. The id of a record without one is the name of the file and the record's number in it.
        encode: makes a sample of a record.
        limit: number of records that are read, skipped ones included; None: all.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path, encode: Encode, *, limit: int | None = None) -> None:
        self._name, self._limit = path.name.partition(".")[0], limit
        self._reader = reader_of(self._name, path)
        self._screening = Screening(encode, id_field="id", source_field="source")
        self.path, self.read = path, 0

    def block(self, size: int) -> list[Sample]:
        """The samples of the next ``size`` records, without those that are skipped; read on until one is found."""
        samples: list[Sample] = []
        taken = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # skipped records are counted, and told at the end
            while taken < size or not samples:
                found = self._next()
                if found is None:
                    break
                taken += 1
                sample = self._screening.sample(found, self._name, self.read - 1)
                if sample is not None:
                    samples.append(sample)
        return samples

    def drawn(self, count: int, *, seed: int) -> list[Sample]:
        """The samples of ``count`` records, drawn without replacement among all; fewer where some are skipped."""
        of = count_records(self.path, self._limit)
        wanted = set(random.Random(seed).sample(range(of), min(count, of)))
        samples: list[Sample] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while (found := self._next()) is not None:
                if self.read - 1 in wanted:
                    sample = self._screening.sample(found, self._name, self.read - 1)
                    samples += [] if sample is None else [sample]
        return samples

    def _next(self) -> Record | Unreadable | None:
        """The next record within the limit."""
        if self._limit is not None and self.read >= self._limit:
            return None
        found = self._reader.read()
        self.read += found is not None
        return found

    @property
    def skipped(self) -> int:
        """The number of records that gave no sample."""
        return sum(sum(reasons.values()) for reasons in self._screening.skipped.values())

    def why_skipped(self) -> str:
        """The counts of skipped records by source and reason, and the first of them, as text."""
        first = f"\nThe first: {self._screening.first}" if self._screening.first else ""
        return self._screening.table() + first

    def position(self) -> dict[str, Any]:
        """The place after the last block, as JSON values."""
        return {
            "reader": self._reader.position(),
            "read": self.read,
            "skipped": self._screening.skipped,
            "first": self._screening.first,
        }

    def go_on_from(self, position: Mapping[str, Any]) -> None:
        """Go on from what :meth:`position` returned."""
        self._reader.begin(position["reader"])
        self.read = position["read"]
        self._screening.skipped, self._screening.first = position["skipped"], position["first"]

    def nothing(self) -> ValueError:
        """The error where no record gave a sample."""
        return ValueError(
            f"Expected records with prompt and response in {self.path}, got none that can be scored.\n"
            f"{self.why_skipped()}"
        )


def count_records(path: Path, limit: int | None = None) -> int:
    """The number of lines that are not empty, read as a stream; ``limit`` at most.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is not what its ending ``.gz`` says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected JSON lines, plain or gzip, but there is no file {path}.")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            count = sum(1 for line in lines if line.strip())
        except EOFError as error:
            raise OSError(f"Expected a whole gzip file, but {path} ends in the middle: it was cut.") from error
    return count if limit is None else min(count, limit)
