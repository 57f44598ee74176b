"""Which rank owns which parameter, and the exchange that brings it the gradients of all candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._ranks.ranks import BUCKET, Ranks


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that owns each parameter: the largest first, each to the rank with the least so far.

    Args:
        sizes: number of entries of each parameter.
        ranks: number of ranks.
    """
    loads = [0] * ranks
    found = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable: equal ones in their order
        owner = loads.index(min(loads))
        found[name] = owner
        loads[owner] += sizes[name]
    return {name: found[name] for name in sizes}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """The exchange of candidates' gradients: to each owner the gradients that all candidates have of its parameters.

    Attributes:
        ranks: the ranks.
        sizes: number of entries of each parameter, in an order that is the same on all ranks.
        rows: number of rows, candidates and others, of each rank.
        dtype: dtype of the numbers that are sent.
        device: where they lie.
    """

    ranks: Ranks
    sizes: Mapping[str, int]
    rows: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    def buckets(self, rows: int) -> Iterator[list[str]]:
        """The parameters in parts of :data:`BUCKET` bytes, by the numbers that a rank with so many ``rows`` sends."""
        item = self.dtype.itemsize * max(1, rows)
        bucket: list[str] = []
        size = 0
        for name, entries in self.sizes.items():
            if bucket and size + entries * item > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += entries * item
        if bucket:
            yield bucket

    def exchanged(
        self, names: Sequence[str], owner: Mapping[str, int], fill: Callable[[Mapping[str, Tensor]], None]
    ) -> dict[str, Tensor]:
        """The gradients of those of the parameters that this rank owns, of all rows, those of a rank together.

        Args:
            names: parameters, in order.
            owner: the rank that owns each.
            fill: writes this rank's gradients into places ``(rows, entries)``, by name, which are zero.

        Returns:
            Gradients ``(rows of all ranks, entries)`` by name; views of one tensor.
        """
        ranks, own_rows = self.ranks, self.rows[self.ranks.own]
        of = [[name for name in names if owner[name] == rank] for rank in range(ranks.count)]
        widths = [sum(self.sizes[name] for name in some) for some in of]
        values = torch.zeros(own_rows * sum(widths), dtype=self.dtype, device=self.device)
        parts = torch.split(values, [own_rows * width for width in widths])
        places = {
            name: place
            for some, part, width in zip(of, parts, widths, strict=True)
            for name, place in self._columns(part.view(own_rows, width), some).items()
        }
        fill(places)
        width = widths[ranks.own]
        found = ranks.exchanged(values, [part.numel() for part in parts], [rows * width for rows in self.rows])
        return self._columns(found.view(-1, width) if width else found.view(sum(self.rows), 0), of[ranks.own])

    def _columns(self, rows: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return dict(zip(names, torch.split(rows, [self.sizes[name] for name in names], dim=1), strict=True))
