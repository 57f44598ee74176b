"""Tables of which a candidate touches a few rows, as embeddings: these rows travel, and not the whole gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors

_NUMBERS_OF_AN_INDEX = 2
"""An index is as long as so many numbers in float32."""


def touched(uses: Sequence[Factors]) -> int | None:
    """The number of rows that each candidate touches at most, one counted as often as it is; None for no table."""
    if not uses or not all(use.indexed and not use.whole for use in uses):
        return None
    return sum(use.by_row().left.shape[1] for use in uses)


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as its rows travel.

    Attributes:
        places: the number of touched rows that each candidate has room for.
        columns: of the table.
        rows: of the table.
    """

    places: int
    columns: int
    rows: int

    @property
    def size(self) -> int:
        """The numbers that a candidate sends, without the indices."""
        return self.places * self.columns

    def write(self, uses: Sequence[Factors], place: Tensor, *, indices: bool) -> None:
        """Write candidates' touched rows into a place ``(n, size)``, or their indices into one ``(n, places)``."""
        own = [use.by_row() for use in uses]
        parts = [use.left if indices else use.right.flatten(1) for use in own if use.right is not None]
        joined = torch.cat(parts, dim=1)
        place[:, : joined.shape[1]] = joined

    def read(self, numbers: Tensor, indices: Tensor) -> Factors:
        """The factors of all candidates, from what was written."""
        return Factors(left=indices, right=numbers.view(len(numbers), self.places, self.columns), rows=self.rows)


def tables_of(told: Sequence[Mapping[str, int | None]], parameters: Mapping[str, Tensor]) -> dict[str, Table]:
    """The parameters that travel by rows: of no rank more than a table, and fewer numbers than the whole gradient.

    Args:
        told: by rank, what :func:`touched` says of each parameter that its candidates reached.
        parameters: the parameters, by name.
    """
    found = {}
    for name, parameter in parameters.items():
        counts = [one[name] for one in told if name in one]
        places = [count for count in counts if count is not None]
        if not places or len(places) < len(counts) or parameter.ndim != 2:
            continue
        rows, columns = parameter.shape
        table = Table(places=max(places), columns=columns, rows=rows)
        if table.places * (columns + _NUMBERS_OF_AN_INDEX) < rows * columns:
            found[name] = table
    return found
