"""Target samples in endless batches, and padding of samples to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor

from ftw_optim._step.losses import IGNORED
from ftw_optim.integrations._trainers.dealing import check_rank, part_of
from ftw_optim.integrations._trainers.targets import shuffled
from ftw_optim.integrations.streaming._records import Source, reader_of
from ftw_optim.integrations.streaming._screening import Encode, Sample, Screening


@final
class TargetCycle:
    """Endless batches of target samples; each pass through the samples has an order of its own.

    A batch depends on its number and the seed alone, see :meth:`batch`. The iterator counts its batches, and the count
    is its whole state.

    Args:
        source: a source as of a :class:`CandidateStream`, of finite length. It is read and encoded once; records are
            skipped and counted as there.
        encode: the function that encodes a record, as of a :class:`CandidateStream`.
        batch_size: number of samples in a batch.
        seed: seed of the orders.
        rank: the number of this process, of ``ranks``; it gets its part of each batch.
        ranks: number of processes that share each batch.

    Raises:
        ValueError: the batch size is less than the number of ranks, or no record gives a sample.
    """

    def __init__(
        self, source: Source, encode: Encode, *, batch_size: int, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        check_rank(rank, ranks)
        if batch_size < ranks:
            raise ValueError(
                f"batch_size must be positive, and at least {ranks}, the number of ranks, got {batch_size}."
            )
        reader = reader_of("target", source)
        screening = Screening(encode, id_field=None, source_field=None)
        self.samples: list[Sample] = []
        index = 0
        while (record := reader.read()) is not None:
            if (sample := screening.sample(record, "target", index)) is not None:
                self.samples.append(sample)
            index += 1
        if not self.samples:
            raise ValueError(f"Expected target samples, got none from {index} records:\n{screening.table()}")
        self.batch_size, self.seed, self.rank, self.ranks = batch_size, seed, rank, ranks
        self.skipped = {reason: count for reasons in screening.skipped.values() for reason, count in reasons.items()}
        self._batches = 0
        self._orders: dict[int, list[int]] = {}

    def batch(self, number: int) -> list[Sample]:
        """The batch with this ``number``, counted from 0, such as the number of a step."""
        if number < 0:
            raise ValueError(f"Expected the number of a batch, 0 or more, got {number}.")
        first = number * self.batch_size
        places = part_of(range(first, first + self.batch_size), self.rank, self.ranks)
        return [self.samples[self._index(place)] for place in places]

    def _index(self, place: int) -> int:
        turn, at = divmod(place, len(self.samples))
        if turn not in self._orders:
            self._orders = {turn: shuffled(len(self.samples), f"{self.seed}/target/{turn}")}
        return self._orders[turn][at]

    def __iter__(self) -> TargetCycle:
        return self

    def __next__(self) -> list[Sample]:
        self._batches += 1
        return self.batch(self._batches - 1)

    def state_dict(self) -> dict[str, int]:
        """The number of batches given out, and the settings that must be equal on resume."""
        return {
            "batches": self._batches,
            "samples": len(self.samples),
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on after the batches that had been given out when :meth:`state_dict` was called.

        Raises:
            ValueError: the state is of a cycle with other samples, seed or batch size.
        """
        own = self.state_dict()
        for name in ("samples", "seed", "batch_size"):
            if state_dict.get(name) != own[name]:
                raise ValueError(
                    f"Expected the state of a cycle with {name} = {own[name]}, got {state_dict.get(name)}: the batches "
                    "would not be those of the run that is resumed."
                )
        self._batches = state_dict["batches"]


def pad(samples: Sequence[Sample], *, pad_token_id: int = 0, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch for a causal language model: ``input_ids``, ``attention_mask``, ``labels``, each ``(n, t)`` int64.

    Samples are padded on the right, with labels of -100.
    """
    rows = [
        [torch.as_tensor(cast("Any", sample[key]), dtype=torch.int64) for sample in samples]
        for key in ("input_ids", "labels")
    ]
    input_ids, labels = (
        torch.nn.utils.rnn.pad_sequence(row, batch_first=True, padding_value=value)
        for row, value in zip(rows, (pad_token_id, IGNORED), strict=True)
    )
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows[0]], batch_first=True)
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
