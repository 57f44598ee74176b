"""Count sketches of matrices, which are given dense, by rows, or as factors.

A count sketch adds every entry of a matrix, with a random sign, to one of ``size`` buckets. The bucket of an entry is
the sum of one for its row and one for its column, the sign the product of two signs. So a sum of outer products need
not be multiplied out: the sketch of an outer product is the circular convolution of the sketches of its sides.

Source: Charikar, Chen and Farach-Colton (2002); Pham and Pagh (2013) for the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Hash:
    """The bucket and the sign of each entry of a matrix, combined from those of its row and its column.

    Rows share a bucket only where there are more rows than buckets; the same holds for columns. Otherwise two entries
    of one row or one column never share a bucket, and the error is that of entirely random buckets and signs.
    """

    rows: Tensor
    columns: Tensor
    row_signs: Tensor
    column_signs: Tensor
    size: int

    @classmethod
    def drawn(
        cls,
        rows: int,
        columns: int,
        size: int,
        generator: torch.Generator,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Hash:
        """A random hash; it is drawn on the CPU, so that it is the same on every device."""

        def buckets(count: int) -> Tensor:
            return (torch.randperm(max(count, size), generator=generator)[:count] % size).to(device)

        def signs(count: int) -> Tensor:
            return (1 - 2 * torch.randint(2, (count,), generator=generator)).to(device=device, dtype=dtype)

        return cls(
            rows=buckets(rows),
            columns=buckets(columns),
            row_signs=signs(rows),
            column_signs=signs(columns),
            size=size,
        )

    def signs(self, start: int, stop: int) -> Tensor:
        """The signs of the entries in rows ``start`` to ``stop``, shape ``(stop - start, columns)``."""
        return self.row_signs[start:stop, None] * self.column_signs

    def add_signed(self, sums: Tensor, matrices: Tensor, start: int) -> None:
        """Add the rows from ``start`` on of n matrices, ``(n, some, columns)``, already multiplied by their signs."""
        bucket = (self.rows[start : start + matrices.shape[1], None] + self.columns) % self.size
        sums.index_add_(1, bucket.flatten(), matrices.flatten(1).to(sums))

    def add_rows(self, sums: Tensor, index: Tensor, values: Tensor) -> None:
        """Add single rows of n matrices: row ``values`` (n, t, columns) at the row number ``index`` (n, t)."""
        signed = values * (self.row_signs[index][..., None] * self.column_signs)
        bucket = (self.rows[index][..., None] + self.columns) % self.size
        bucket += torch.arange(0, sums.numel(), self.size, device=sums.device)[:, None, None]
        flat = torch.zeros_like(sums).flatten()
        flat.index_add_(0, bucket.flatten(), signed.flatten().to(sums))
        sums += flat.view_as(sums)

    def add_outer(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the sums over positions of the outer products of ``left`` (n, t, rows) and ``right`` (n, t, columns)."""
        one, other = self._spectrum(left * self.row_signs, self.rows), right * self.column_signs
        one *= self._spectrum(other, self.columns)
        sums += torch.fft.irfft(one.sum(dim=1), n=self.size).to(sums)

    def _spectrum(self, side: Tensor, bucket: Tensor) -> Tensor:
        n, t, _ = side.shape
        spread = side.new_zeros(n * t, self.size).index_add_(1, bucket, side.flatten(0, 1))
        spectrum: Tensor = torch.fft.rfft(spread.view(n, t, self.size))
        return spectrum
