"""Positions that the library itself has chosen for a layer: there whose they are is known without being told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The positions of a token grid that a layer runs on.

    Attributes:
        index: their numbers in the grid, row by row, shape ``(r,)`` int64.
        grid: the shape ``(b, t)`` of the grid.
    """

    index: Tensor
    grid: tuple[int, int]

    def candidates(self, sample_ids: Tensor | None) -> Tensor:
        """The candidate of each chosen position, ``(1, r)``: its row, or what ``sample_ids`` of grid or rows say."""
        if sample_ids is not None and sample_ids.shape == self.grid:
            return sample_ids.flatten()[self.index.to(sample_ids.device)][None]
        if sample_ids is not None and sample_ids.shape == self.grid[:1]:
            return sample_ids[(self.index // self.grid[1]).to(sample_ids.device)][None]
        return (self.index // self.grid[1])[None] if sample_ids is None else sample_ids


_now: ContextVar[Chosen | None] = ContextVar("chosen positions", default=None)


def chosen_now() -> Chosen | None:
    """The positions that the layer which runs now was given; None where it runs on all."""
    return _now.get()


@contextmanager
def running_on(chosen: Chosen) -> Iterator[None]:
    """A block in which layers run on the chosen positions only."""
    token = _now.set(chosen)
    try:
        yield
    finally:
        _now.reset(token)
