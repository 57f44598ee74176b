"""Groups of rows: candidates that are several rows of the model's input each, such as the two answers of a pair."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import certainly_small
from ftw_optim._factors.factors import Factors, PositionMap


@final
class RowGroups:
    """The candidates of the rows of the model's input.

    Args:
        candidates: shape ``(r,)`` int64, the candidate of each row, -1 for none.

    Attributes:
        rows: the number of rows.
    """

    def __init__(self, candidates: Tensor) -> None:
        self.candidates = candidates
        self.rows = len(candidates)
        self._index = torch.empty(0, 0, dtype=torch.int64)
        self._ragged = self._in_order = False

    def check(self, count: int) -> None:
        """Check the entries against the number of candidates, ``count``; this waits for the device.

        Raises:
            ValueError: an entry is below -1 or not below that number, or a candidate has no row.
        """
        candidates = self.candidates.cpu()
        named = sorted(set(candidates.tolist()))
        if [number for number in named if number != -1] != list(range(count)):
            got = f"{len(named)} different numbers from {named[0]} to {named[-1]}" if named else "no rows"
            raise ValueError(
                f"Expected sample_ids of rows with each number from 0 to {count - 1}, one less than the number of "
                f"losses, and -1 for none, got {got}."
            )
        self._index = PositionMap(candidates=candidates[None], count=count).gather_index()
        self._ragged = bool((self._index == self.rows).any())
        self._in_order = torch.equal(self._index.flatten(), torch.arange(self.rows))

    def spread(self, values: Tensor) -> Tensor:
        """The ``values`` (n,) of the candidates for their rows, shape ``(r,)``; zero for rows of none."""
        return torch.cat([values, values.new_zeros(1)])[self.candidates.to(values.device)]

    def grouped(self, factors: Factors) -> Factors:
        """The factors of candidates, with the positions of all of their rows, from factors of rows; after a check.

        Gradients that are multiplied out are added up. Small factors are put in the candidates' order, so that they may
        share a bucket; candidates with fewer rows than others get positions of zeros. Large ones stay where they are,
        with a map from positions to candidates: a copy of all of them would be one more set of activations.
        """
        if not (factors.whole or self._in_order or certainly_small(factors.bytes())):
            positions = self.candidates.to(factors.left.device)[:, None].expand(factors.left.shape[:2])
            return replace(factors, positions=PositionMap(candidates=positions, count=len(self._index)))
        if not factors.whole:
            right = None if factors.right is None else self._grouped(factors.right)
            return replace(factors, left=self._grouped(factors.left), right=right)
        assert factors.right is not None
        n, each = len(self._index), factors.right.shape[1:]
        right = self._grouped(factors.right).view(n, -1, *each).sum(1)
        return replace(factors, left=factors.left[:1].expand(n, -1), right=right)

    def _grouped(self, part: Tensor) -> Tensor:
        """A part of factors ``(r, t, ...)`` with the rows of a candidate behind each other, ``(n, c t, ...)``."""
        if not self._in_order:  # else no copy is needed
            index = self._index.flatten().to(part.device)
            part = torch.cat([part, part.new_zeros(1, *part.shape[1:])])[index] if self._ragged else part[index]
        n, rows = self._index.shape
        return part.reshape(n, rows * part.shape[1], *part.shape[2:])
