"""Layouts: which axis of a layer's inputs is the candidates' axis."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._capture.chosen import chosen_now
from ftw_optim._capture.sample_ids import SampleIds
from ftw_optim._layers.registry import LayerRule

POSITIONS = "positions"
TIME_FIRST = "time first"
FOLDED = "folded"


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of the candidates in one call of a layer.

    Attributes:
        reading: the layout in words; the self-check vouches for one reading of one layer.
        expand: number of rows to expand the output to, where the input has no row or one row for all candidates.
        trouble: what was expected in place of an input whose candidates cannot be told apart. It is an error only once
            a gradient arrives: some layers run without effect on the losses, as DoRA's do for the norm of a weight.
        sample_ids: the candidate of each row or position; None where the rows are the candidates', in order.
        loose: whether the rows may have been chosen inside the model, in a different way at every step: that they are
            the candidates', in order and in equal parts, has to be proved each time.
    """

    reading: str
    expand: int | None = None
    trouble: str | None = None
    sample_ids: Tensor | None = None
    loose: bool = False


_ROWS = Layout(reading="rows")
_LOOSE_ROWS = Layout(reading="rows", loose=True)


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """The candidates as the model's inputs show them: ``n`` rows of ``positions``, or packed by ``sample_ids``.

    Attributes:
        n: the number of rows, which are the candidates unless they are grouped; None where no input shows it.
        positions: the number of positions of a row; None where rows have none.
        deep: whether a row has positions that a model may choose among.
        sample_ids: the candidates of rows or positions, as the user gave them.
        counts: all numbers of candidates that the inputs allow.
    """

    n: int | None = None
    positions: int | None = None
    deep: bool = True
    sample_ids: SampleIds | None = None
    counts: Collection[int] = ()

    def layout(self, x: Tensor, rule: LayerRule | None, layer: str = "") -> Layout:
        """The layout of the candidates in ``x``, the first input of a ``layer`` that is captured by ``rule``."""
        ids = self.ids(layer)
        if ids is not None:
            return packed(x, ids)
        if self.n is None:  # the closure calls a part of the model: the losses will tell
            return _LOOSE_ROWS if x.ndim < 3 else _ROWS
        if rule is not None and rule.own_layout:
            return Layout(reading=rule.name)
        index = not x.is_floating_point()
        if index and x.ndim == 1 and x.shape[0] == self.positions and not (self.n == self.positions and _labels(x)):
            return Layout(reading=POSITIONS, expand=self.n)
        if x.ndim > 1 or (index and x.ndim == 1):
            return self._rows(x, index=index, channels_second=rule is not None and rule.channels_second)
        return Layout(reading="unknown", trouble=f"the {self.n} candidates first")

    def ids(self, layer: str) -> Tensor | None:
        """The candidates of the rows that a ``layer`` has just run on; None where they are rows of the input."""
        ids, chosen = None if self.sample_ids is None else self.sample_ids.of(layer), chosen_now()
        if chosen is None:
            return ids
        if ids is None and self.sample_ids is not None and self.sample_ids.groups is not None:
            ids = self.sample_ids.groups.candidates
        return chosen.candidates(ids)

    def _rows(self, x: Tensor, *, index: bool, channels_second: bool) -> Layout:
        n, rows = self.n, x.shape[0]
        assert n is not None
        if rows == n:
            return _LOOSE_ROWS if self.deep and x.ndim < 3 - index and not _is_view_of_rows(x, n) else _ROWS
        if n > 1 and rows and x.ndim > 2 and x.shape[1] == n and not channels_second and self._is_time(rows, n):
            return Layout(reading=TIME_FIRST, trouble=f"the {n} candidates first, not the time (batch_first=True)")
        if rows == 1 and x.ndim > 1:
            return Layout(reading="one row for all", expand=n)
        if index and x.ndim == 2 and rows == x.shape[1]:
            return Layout(reading="unknown", trouble=f"the {n} candidates first, not pairs of positions")
        if rows % n == 0:
            return Layout(reading=FOLDED, loose=n > 1 and not _is_view_of_rows(x, n))
        return Layout(reading="unknown", trouble=f"the {n} candidates (or 1, for all of them) first")

    def _is_time(self, rows: int, n: int) -> bool:
        """Whether a first axis of this many ``rows``, before an axis of ``n`` entries, is the time and not candidates.

        It is where there are as many rows as positions, where a single row meets ``n`` entries that are no positions,
        or where ``n`` does not divide the rows, so that they cannot be windows of the ``n`` candidates.
        """
        return rows == self.positions or (n != self.positions if rows == 1 else rows % n != 0)


def packed(x: Tensor, ids: Tensor) -> Layout:
    """The layout of ``x``, whose rows or positions belong to the candidates ``ids``."""
    if x.shape[: ids.ndim] == ids.shape:
        return Layout(reading="sample_ids", sample_ids=ids)
    if x.ndim and x.shape[0] == ids.numel():
        return Layout(reading="sample_ids, folded", sample_ids=ids.flatten())
    chosen = ids[ids >= 0]
    if x.ndim and x.shape[0] == len(chosen):
        return Layout(reading="sample_ids, without padding", sample_ids=chosen)
    if x.shape[:2] == (1, len(chosen)):
        return Layout(reading="sample_ids, without padding", sample_ids=chosen[None])
    expected = f"the grid of sample_ids, {tuple(ids.shape)}, first (or its {len(chosen)} positions from 0 upwards)"
    return Layout(reading="unknown", trouble=expected)


def _is_view_of_rows(x: Tensor, n: int) -> bool:
    """Whether all entries of ``x`` are those of a tensor with ``n`` rows, in its order, or one position of each row."""
    base, node = x._base, x.grad_fn
    if base is not None and base.ndim and base.shape[0] == n and base.is_contiguous():
        if base.numel() == x.numel() and x.is_contiguous():
            return True
        if x.ndim == base.ndim - 1 and x.stride(0) == base.stride(0) and x.shape[0] == n:
            return True
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    if not sizes or sizes[0] != n:
        return False
    name = type(node).__name__
    if name.startswith("SelectBackward"):
        return bool(getattr(node, "_saved_dim", 0) != 0)
    return name.startswith(_WHOLE) and torch.Size(sizes).numel() == x.numel()


_WHOLE = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward")


def _labels(index: Tensor) -> bool:
    """Whether indices are not consecutive, as positions are; asked only where there are ``n`` positions."""
    return bool((index.diff() != 1).any())
