"""Records that are found by number, as a proposal sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.interface import Proposal, Sample, chosen_positions

_KEPT_FEATURES = 1 << 30  # bytes: of a larger data set, features are computed whenever a record is on offer


@final
class KnownRecords:
    """The records as a proposal sees them: as features where it has such, which are kept, else as samples.

    Args:
        data: with a length, found by number.
        proposal: sees them.
        encode: makes of a record the sample that the proposal sees; None: the record is one.
    """

    def __init__(self, data: Any, proposal: Proposal, encode: Callable[[Any], Sample] | None) -> None:
        self._data, self._encode = data, encode
        self._proposal: Any = proposal
        self._features: Tensor | None = None
        if hasattr(proposal, "features"):
            width = proposal.features(self._of([0])).shape[1]
            if len(data) * width * 4 <= _KEPT_FEATURES:
                # The system gives memory to those rows that are written.
                self._features = torch.empty(len(data), width)
                self._known = torch.zeros(len(data), dtype=torch.bool)

    def propose(self, numbers: Tensor, count: int) -> list[int]:
        """The positions of those records that the proposal chose."""
        if self._features is None:
            found = self._proposal.propose(self._of(numbers.tolist()), count)
        else:
            found = self._proposal.propose(numbers, count, features=self._features_of(numbers))
        return chosen_positions(found, min(count, len(numbers)), len(numbers))

    def observe(self, numbers: Sequence[int], selection: Selection) -> None:
        """Let the proposal learn."""
        if self._features is None:
            self._proposal.observe(self._of(numbers), selection)
        else:
            at = torch.tensor(numbers, dtype=torch.int64)
            self._proposal.observe(numbers, selection, features=self._features_of(at))

    def _features_of(self, numbers: Tensor) -> Tensor:
        assert self._features is not None
        missing = numbers[~self._known[numbers]]
        if len(missing):
            self._features[missing] = self._proposal.features(self._of(missing.tolist()))
            self._known[missing] = True
        return self._features[numbers]

    def _of(self, numbers: Sequence[int]) -> list[Sample]:
        # What fetches many records at once, as datasets do, is asked for all of them.
        many = getattr(self._data, "__getitems__", None)
        records = [self._data[number] for number in numbers] if many is None else many(list(numbers))
        return records if self._encode is None else [self._encode(record) for record in records]
