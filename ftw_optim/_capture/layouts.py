"""Layouts: which axis of a layer's inputs is the candidates' axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from ftw_optim._layers.registry import LayerRule

TIME_FIRST = "time first"


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of the candidates in one call of a layer.

    Attributes:
        reading: the layout in words; the self-check vouches for one reading of one layer.
        expand: number of rows to expand the output to, where the input has no row or one row for all candidates.
        trouble: what was expected in place of an input whose candidates cannot be told apart. It is an error only once
            a gradient arrives: some layers run without effect on the losses, as DoRA's do for the norm of a weight.
    """

    reading: str
    expand: int | None = None
    trouble: str | None = None


_ROWS = Layout(reading="rows")


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """The candidates as the model's input shows them: ``n`` rows of ``positions``, or packed by ``sample_ids``."""

    n: int | None
    positions: int | None
    sample_ids: Tensor | None = None

    def layout(self, x: Tensor, rule: LayerRule | None) -> Layout:
        """The layout of the candidates in ``x``, the first input of a layer that is captured by ``rule``."""
        if self.sample_ids is not None:
            return self._packed(x)
        if self.n is None:  # the closure calls a part of the model: the losses will tell
            return _ROWS
        if rule is not None and rule.own_layout:
            return Layout(reading=rule.name)
        index = not x.is_floating_point()
        if index and x.ndim == 1 and x.shape[0] == self.positions and not (self.n == self.positions and _labels(x)):
            return Layout(reading="positions", expand=self.n)
        if x.ndim > 1 or (index and x.ndim == 1):
            return self._rows(x, index=index, channels_second=rule is not None and rule.channels_second)
        return Layout(reading="unknown", trouble=f"the {self.n} candidates first")

    def _rows(self, x: Tensor, *, index: bool, channels_second: bool) -> Layout:
        n, rows = self.n, x.shape[0]
        assert n is not None
        if rows == n:
            return _ROWS
        if n > 1 and rows and x.ndim > 2 and x.shape[1] == n and not channels_second and self._is_time(rows, n):
            return Layout(reading=TIME_FIRST, trouble=f"the {n} candidates first, not the time (batch_first=True)")
        if rows == 1 and x.ndim > 1:
            return Layout(reading="one row for all", expand=n)
        if index and x.ndim == 2 and rows == x.shape[1]:
            return Layout(reading="unknown", trouble=f"the {n} candidates first, not pairs of positions")
        if rows % n == 0:
            return Layout(reading="folded")
        return Layout(reading="unknown", trouble=f"the {n} candidates (or 1, for all of them) first")

    def _is_time(self, rows: int, n: int) -> bool:
        """Whether a first axis of this many ``rows``, before an axis of ``n`` entries, is the time and not candidates.

        It is where there are as many rows as positions, where a single row meets ``n`` entries that are no positions,
        or where ``n`` does not divide the rows, so that they cannot be windows of the ``n`` candidates.
        """
        return rows == self.positions or (n != self.positions if rows == 1 else rows % n != 0)

    def _packed(self, x: Tensor) -> Layout:
        assert self.sample_ids is not None
        grid = self.sample_ids.shape
        if x.shape[:2] == grid:
            return Layout(reading="sample_ids")
        if x.ndim and x.shape[0] == grid.numel():
            return Layout(reading="sample_ids, folded")
        return Layout(reading="unknown", trouble=f"the grid of sample_ids, {tuple(grid)}, first")


def _labels(index: Tensor) -> bool:
    """Whether indices are not consecutive, as positions are; asked only where there are ``n`` positions."""
    return bool((index.diff() != 1).any())
