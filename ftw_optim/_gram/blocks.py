"""Blocks: the candidates' gradients of one parameter, multiplied out in ranges of rows into reused memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.factors import Factors, materialise, weighted_sum
from ftw_optim._gram.profiling import profiled
from ftw_optim._preconditioners.maps import Preconditioner


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """The candidates' gradients of one parameter, seen as matrices and multiplied out a range of rows at a time.

    Attributes:
        uses: the uses of the parameter, with one row of positions for each candidate and the scale divided out.
        shape: the parameter's shape.
        limit: bytes of gradients that may be multiplied out at a time.
        buffer: the memory for these gradients.
    """

    uses: Sequence[Factors]
    shape: torch.Size
    limit: int
    buffer: Buffer

    @classmethod
    def of(cls, uses: Sequence[Factors], shape: torch.Size, *, scale: float, limit: int, buffer: Buffer) -> Block:
        """The block of a parameter's captured uses; only here is the ``scale`` of the losses divided out."""
        return cls(uses=[use.by_row().divided(scale) for use in uses], shape=shape, limit=limit, buffer=buffer)

    @property
    def count(self) -> int:
        """The number of candidates."""
        return self.uses[0].count

    @property
    def rows(self) -> int:
        """The number of rows of each gradient."""
        return self.uses[0].rows

    @property
    def columns(self) -> int:
        """The number of columns of each gradient."""
        return self.uses[0].columns

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic, at least float32."""
        return self.uses[0].dtype()

    @property
    def is_matrix(self) -> bool:
        """Whether a map can be folded into the factors: the parameter is a matrix with dense outer products only."""
        dense = all(not use.indexed and not use.whole and use.right is not None for use in self.uses)
        return dense and tuple(self.shape) == (self.rows, self.columns)

    def at_once(self, copies: int = 1) -> int:
        """The number of rows of all gradients and the target that fit into the limit ``copies`` times; at least 1."""
        return min(
            self.rows, max(1, self.limit // max(1, copies * (self.count + 1) * self.columns * self.dtype.itemsize))
        )

    def ranges(self, copies: int = 1) -> Iterator[tuple[int, int]]:
        """The ranges ``(start, stop)`` of rows that fit into the limit ``copies`` times, which cover all rows."""
        step = self.at_once(copies)
        for start in range(0, self.rows, step):
            yield start, min(self.rows, start + step)

    def out(self, start: int, stop: int, *, beside: Tensor | None = None) -> Tensor:
        """Multiply out rows ``start`` to ``stop`` of all gradients: ``(n, stop - start, columns)``.

        The result lies in the buffer and is overwritten by the next call.

        Args:
            start: the first row.
            stop: one past the last row.
            beside: the same rows of one further gradient, ``(stop - start, columns)``, which becomes the last entry of
                the then ``n + 1``.
        """
        with profiled("materialise"):
            first, size = self.uses[0], (stop - start) * self.columns
            memory = self.buffer.of((self.count + 1) * size, self.dtype, first.left.device)
            block = materialise(self.uses, start, stop, out=memory)
            if beside is None:
                return block
            whole = memory[: (self.count + 1) * size].view(-1, stop - start, self.columns)
            whole[-1].copy_(beside)
            return whole

    def mean(self, weights: Tensor) -> Tensor:
        """``sum_i weights[i] g_i``, shaped like the parameter, without forming any ``g_i``."""
        return weighted_sum(self.uses, weights, self.shape)

    def sides(self) -> tuple[Tensor, Tensor]:
        """The sides of all uses of a matrix, joined along ``t``: left ``(n, t, rows)``, right ``(n, t, columns)``."""
        left = torch.cat([use.left for use in self.uses], dim=1).to(self.dtype)
        return left, torch.cat([use.right for use in self.uses if use.right is not None], dim=1).to(self.dtype)

    def folded(self, preconditioner: Preconditioner) -> Block:
        """The block of the gradients ``P g``, for a matrix and a map that can be folded into factors."""
        return self._changed(preconditioner.fold)

    def turned(self, left: Tensor | None, right: Tensor | None) -> Block:
        """The block of the gradients ``left' g right``, for a matrix; None stands for the identity."""

        def turn(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
            rows = rows if left is None else rows @ left.to(rows)
            return rows, columns if right is None else columns @ right.to(columns)

        return self._changed(turn)

    def _changed(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Block:
        uses = []
        for use in self.uses:
            assert use.right is not None
            left, right = change(use.left.to(self.dtype), use.right.to(self.dtype))
            uses.append(replace(use, left=left, right=right))
        return replace(self, uses=uses)

    def compact(self) -> tuple[Block, Tensor | None]:
        """The block of the rows that one-hot factors touch, and their indices; None where dense factors touch all."""
        if not all(use.indexed and not use.whole for use in self.uses):
            return self, None
        touched = _distinct(torch.cat([use.left.flatten() for use in self.uses]), self.rows)
        uses = [
            replace(use, left=torch.searchsorted(touched, use.left.contiguous()), rows=len(touched))
            for use in self.uses
        ]
        return replace(self, uses=uses), touched

    def some(self, part: slice) -> Block:
        """The block of the candidates in ``part``."""
        uses = [
            replace(use, left=use.left[part], right=None if use.right is None else use.right[part]) for use in self.uses
        ]
        return replace(self, uses=uses)


def parts(n: int, size: int, limit: int) -> Iterator[slice]:
    """Ranges of the ``n`` candidates that each fit into ``limit`` bytes, at ``size`` bytes a candidate."""
    at_once = max(1, limit // max(1, size))
    for start in range(0, n, at_once):
        yield slice(start, min(n, start + at_once))


def _distinct(indices: Tensor, rows: int) -> Tensor:
    """The distinct indices, sorted; on an accelerator padded to a length that is known without synchronising."""
    ordered = indices.sort().values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    if indices.device.type == "cpu":
        return ordered[new]
    padded = ordered.new_full((min(rows, len(ordered)),), rows - 1)
    return padded.scatter_(0, new.cumsum(0) - 1, ordered)
