"""Token sets: the different tokens of each of many records, read and sorted at once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim.proposals.drawing import mixed
from ftw_optim.proposals.interface import Sample

_IGNORED = -100
_LARGEST_ID = 1 << 40  # a record's number, a token id and a part fit into one int64


@final
@dataclass(frozen=True)
class Tokens:
    """The tokens of ``n`` records, one record after the other.

    Attributes:
        ids, parts: shape ``(total,)`` int64: the token, and 1 where it has a label, else 0.
        lengths, labelled: shape ``(n,)`` int64, the number of tokens, and of those with a label.
        keys: shape ``(n,)`` int64, hashes of 48 bits of all tokens in their order, and of which have a label.
    """

    ids: Tensor
    parts: Tensor
    rows: Tensor
    lengths: Tensor
    labelled: Tensor
    keys: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Tokens:
        """The tokens of samples; where ``labels`` is missing, every token counts as labelled.

        Raises:
            TypeError, ValueError: see :class:`~ftw_optim.proposals.features.Features`.
        """
        ids, lengths = _joined(samples, "input_ids")
        labels, of_labels = _joined(samples, "labels")
        if not torch.equal(lengths, of_labels):
            at = int((lengths != of_labels).nonzero()[0])
            raise ValueError(
                f"Expected a label for each token, got {int(of_labels[at])} labels for {int(lengths[at])} tokens in "
                f"sample {at}. Give -100 to tokens that do not count."
            )
        parts = (labels != _IGNORED).long()
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        ends = lengths.cumsum(0)
        places = torch.arange(len(ids)) - (ends - lengths)[rows]
        keys = mixed(_sums(mixed(mixed(2 * ids + parts) + places), ends) + lengths) & ((1 << 48) - 1)
        return cls(ids, parts, rows, lengths, _sums(parts, ends), keys)

    def range(self) -> tuple[int, int]:
        """The lowest and the highest id; 0 without tokens."""
        return (int(self.ids.min()), int(self.ids.max())) if len(self.ids) else (0, 0)


@final
class TokenSets:
    """The different tokens of ``n`` records, sorted by record.

    Attributes:
        rows, ids, parts: shape ``(s,)`` int64: the record, the token, and 1 where it has a label, else 0. A token that
            a record has with a label and without is there twice.
        rows_once, ids_once: the same without this distinction.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.n = len(tokens.lengths)
        lowest, highest = tokens.range()
        if max(-lowest, highest) >= _LARGEST_ID:
            raise ValueError(f"Expected token ids, got numbers from {lowest} to {highest}.")
        span = highest - lowest + 1
        codes = ((tokens.rows * span + (tokens.ids - lowest)) * 2 + tokens.parts).sort().values
        codes = codes[_first_of_each(codes)]
        both = codes >> 1
        self.rows = torch.div(both, span, rounding_mode="floor")
        self.ids, self.parts = both - self.rows * span + lowest, codes & 1
        once = _first_of_each(both)
        self.rows_once, self.ids_once = self.rows[once], self.ids[once]

    def counts(self, rows: Tensor) -> Tensor:
        """How often each record is in ``rows``, float64, but at least 1."""
        return torch.bincount(rows, minlength=self.n).clamp(min=1).double()


def _first_of_each(ordered: Tensor) -> Tensor:
    first = torch.ones(len(ordered), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return first


def _sums(values: Tensor, ends: Tensor) -> Tensor:
    """Sums of int64 values over records, exact modulo 2 ** 64."""
    upto = torch.cat([torch.zeros(1, dtype=torch.int64), values.cumsum(0)])[ends]
    return torch.diff(upto, prepend=torch.zeros(1, dtype=torch.int64))


def _joined(samples: Sequence[Sample], name: str) -> tuple[Tensor, Tensor]:
    """The numbers of all samples one after the other, and how many each sample has; int64."""
    joined, lengths = array("q"), array("q")
    for at, sample in enumerate(samples):
        values = _field(sample, name, at)
        before = len(joined)
        try:
            joined.extend(array("q", values))  # faster than one by one
        except (TypeError, OverflowError) as error:
            raise TypeError(
                f"Expected {name} as integers in one row (a list or a 1-D tensor), got {type(sample[name]).__name__} "
                f"in sample {at}: {error}."
            ) from error
        lengths.append(len(joined) - before)
    return _tensor(joined), _tensor(lengths)


def _field(sample: Any, name: str, at: int) -> Any:
    if name == "labels" and "labels" not in sample:
        name = "input_ids"  # no id is -100 but that of a placeholder, which has no label either
    try:
        values = sample[name]
    except (KeyError, TypeError, IndexError) as error:
        has = ", ".join(map(str, sample)) if hasattr(sample, "keys") else type(sample).__name__
        raise ValueError(f"Expected samples with input_ids, got one with {has}, sample {at}.") from error
    return values.tolist() if hasattr(values, "tolist") else values


def _tensor(values: array[int]) -> Tensor:
    # A tensor shares the array's memory, which the array keeps until both are gone.
    return torch.frombuffer(values, dtype=torch.int64) if len(values) else torch.empty(0, dtype=torch.int64)
