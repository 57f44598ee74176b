"""Factorized gradients: the contribution of one use of a parameter to each candidate's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PositionMap:
    """A map from positions to candidates, where the rows of a batch are not the candidates.

    Attributes:
        candidates: shape ``(b, t)`` int64, the candidate of each position, -1 for none.
        count: the number of candidates.
    """

    candidates: Tensor
    count: int

    def repeated(self, times: int) -> PositionMap:
        """The map with each position repeated ``times`` times in a row, such as for the heads of a token."""
        return self if times == 1 else replace(self, candidates=self.candidates.repeat_interleave(times, dim=1))

    def gather_index(self) -> Tensor:
        """The flat indices of each candidate's positions in order, shape ``(n, longest)``, padded with ``b * t``."""
        candidates = self.candidates.flatten()
        order = candidates.argsort(stable=True)
        owner = candidates[order]
        order, owner = order[owner >= 0], owner[owner >= 0]
        lengths = owner.bincount(minlength=self.count)
        slot = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
        index = order.new_full((self.count, int(lengths.max())), candidates.numel())
        index[owner, slot] = order
        return index


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """The gradients of one parameter, one for each candidate, as sums of outer products, not multiplied out.

    ``g_i = sum_p outer(left[p], right[p])`` over the positions ``p`` of candidate ``i``, reshaped to the parameter.
    For a Linear layer ``left`` holds the output gradients and ``right`` the activations; where a weight is stored
    transposed, it is the other way round.

    Attributes:
        left: shape ``(b, t, rows)``; or ``(b, t)`` int64, each entry the index of a one-hot row. In place of ``t``
            there may be no axis or several axes, which become one.
        right: shape ``(b, t, columns)``, with ``t`` as in ``left``; or None for a single column of ones, so that
            ``g_i`` is a plain sum.
        rows: number of rows of the parameter, needed where ``left`` holds indices.
        positions: the candidate of each position; None where row ``i`` of the batch is candidate ``i``.
        whole: whether ``right`` holds the gradients multiplied out, row by row; see :meth:`explicit`.
        terms: norm of the terms that were summed to get these factors; None where nothing was summed before. It serves
            only to bound rounding errors.
    """

    left: Tensor
    right: Tensor | None = None
    rows: int = 0
    positions: PositionMap | None = None
    whole: bool = False
    terms: Tensor | None = None

    def __post_init__(self) -> None:
        indexed = not self.left.is_floating_point()
        if self.left.ndim != 3 - indexed:
            object.__setattr__(self, "left", _one_axis(self.left, behind=0 if indexed else 1))
        if self.right is not None and self.right.ndim != 3:
            object.__setattr__(self, "right", _one_axis(self.right, behind=1))
        if self.left.ndim != (2 if indexed else 3) or (indexed and (self.right is None or self.rows < 1)):
            raise ValueError(
                "Expected left of shape (b, t, rows), or (b, t) int64 together with right and rows; got left "
                f"{tuple(self.left.shape)} {self.left.dtype}, right "
                f"{None if self.right is None else tuple(self.right.shape)}, rows {self.rows}."
            )
        if self.right is not None and self.right.shape[:2] != self.left.shape[:2]:
            raise ValueError(
                f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)} differ in their first two axes."
            )
        if not indexed:
            object.__setattr__(self, "rows", self.left.shape[2])

    @classmethod
    def explicit(cls, gradients: Tensor, parameter: Tensor, *, terms: Tensor | None = None) -> Factors:
        """Factors that hold candidates' gradients ``(n, *shape)`` multiplied out, with the rows of the parameter."""
        n = len(gradients)
        if parameter.ndim < 2 or not parameter.numel() or gradients[0].numel() != parameter.numel():
            return cls(left=gradients.reshape(n, 1, gradients[0].numel()), terms=terms)
        rows = parameter.shape[0]
        index = torch.arange(rows, device=gradients.device).expand(n, rows)
        return cls(left=index, right=gradients.reshape(n, rows, -1), rows=rows, whole=True, terms=terms)

    def as_sum(self) -> Factors:
        """Gradients multiplied out as a plain sum of one term, with as many rows as entries; others as they are."""
        if not self.whole:
            return self
        assert self.right is not None
        return replace(self, left=self.right.flatten(1), right=None, whole=False)

    def folded(self, count: int) -> Factors:
        """The factors with one row for each of ``count`` candidates, where each had several consecutive rows."""
        rows = self.left.shape[0]
        if rows == count or rows % count:
            return self

        def fold(part: Tensor) -> Tensor:
            positions = rows // count * part.shape[1]
            return part.reshape(count, positions, *part.shape[2:])

        return replace(self, left=fold(self.left), right=None if self.right is None else fold(self.right), whole=False)

    @property
    def count(self) -> int:
        """The number of candidates."""
        return self.left.shape[0] if self.positions is None else self.positions.count

    @property
    def columns(self) -> int:
        """The number of columns of the gradients, seen as matrices; 1 for a plain sum."""
        return 1 if self.right is None else self.right.shape[2]

    @property
    def indexed(self) -> bool:
        """Whether ``left`` holds row indices."""
        return not self.left.is_floating_point()

    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: that of the factors, float32 at least."""
        dtype = torch.float32
        for part in (self.left, self.right):
            if part is not None and part.dtype != dtype and part.is_floating_point():
                dtype = torch.promote_types(dtype, part.dtype)
        return dtype

    def bytes(self) -> int:
        """The memory of the factors, in bytes."""
        left = 0 if self.whole else self.left.nbytes
        return left if self.right is None else left + self.right.nbytes

    def multiplications(self) -> int:
        """The number of multiplications that multiply out one candidate's gradient."""
        return 0 if self.indexed or self.right is None else self.left.shape[1:].numel() * self.columns

    def by_row(self) -> Factors:
        """The factors with one row of positions for each candidate, padded with zeros."""
        if self.positions is None:
            return self
        index = self.positions.gather_index()

        def regroup(part: Tensor) -> Tensor:
            flat = part.flatten(0, 1)
            return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[index]

        right = None if self.right is None else regroup(self.right)
        return replace(self, left=regroup(self.left), right=right, positions=None, whole=False)

    def divided(self, scale: float) -> Factors:
        """The gradients divided by ``scale``: one side is divided, in :meth:`dtype`; the other one is shared."""
        if scale == 1.0:
            return self
        if self.indexed or self.whole or (self.right is not None and self.columns < self.rows):
            assert self.right is not None
            return replace(self, right=self.right.to(self.dtype()) / scale)
        return replace(self, left=self.left.to(self.dtype()) / scale)

    def spread(self, weights: Tensor) -> Tensor:
        """The ``weights`` (n,) of the candidates, spread to their positions: broadcastable to ``(b, t)``."""
        if self.positions is None:
            return weights[:, None]
        padded = torch.cat([weights, weights.new_zeros(1)])  # index -1 reads the zero
        return padded[self.positions.candidates]

    def magnitude(self, weights: Tensor) -> Tensor:
        """The root of the sum of the squared, weighted terms: the rounding error of their sum is proportional to it."""
        square = self.spread(weights).to(self.dtype()).square()
        for part in (self.left, self.right):
            if part is not None and part.is_floating_point():
                square = square * part.to(self.dtype()).square().sum(dim=2)
        return square.sum().sqrt()

    def rounding(self, weights: Tensor, precision: float) -> Tensor:
        """A bound on the rounding error in the weighted sum that stems from terms summed before, which may cancel.

        Args:
            weights: shape ``(n,)``.
            precision: eps of the coarsest dtype that was computed in.

        Returns:
            A scalar; zero where nothing was summed before.
        """
        if self.terms is None or not len(weights):
            return torch.zeros((), device=self.left.device)
        return 2 * precision * self.terms * weights.abs().max().to(self.terms)

    def without(self, rejected: Tensor) -> Factors:
        """The factors with zeros for the ``rejected`` candidates, bool ``(n,)``."""
        drop = self.spread(rejected.to(self.left.device))[..., None]
        zero = torch.zeros((), device=self.left.device)
        right = None if self.right is None else torch.where(drop, zero.to(self.right.dtype), self.right)
        left = self.left if self.indexed else torch.where(drop, zero.to(self.left.dtype), self.left)
        return replace(self, left=left, right=right)

    def finite(self) -> Tensor:
        """Mask of the candidates whose factors are all finite: bool, shape ``(n,)``."""
        grid = torch.zeros(self.left.shape[:2], dtype=self.dtype(), device=self.left.device)
        for part in (self.left, self.right):
            if part is not None and part.is_floating_point():
                # A sum is finite only if every term is; one read, no boolean copy of the factors.
                grid = grid + part.sum(dim=2, dtype=grid.dtype)
        if self.positions is None:
            return grid.isfinite().all(dim=1)
        bad = torch.zeros(self.count + 1, dtype=torch.bool, device=grid.device)
        bad.index_put_((self.positions.candidates.flatten(),), ~grid.isfinite().flatten(), accumulate=True)
        return ~bad[:-1]


def _one_axis(values: Tensor, *, behind: int) -> Tensor:
    """``values`` with one axis of positions between the first axis and the last ``behind`` ones."""
    if values.ndim == 1 + behind:
        return values.unsqueeze(1)
    return values.flatten(1, values.ndim - 1 - behind) if values.ndim > 2 + behind else values


def weighted_sum(uses: Sequence[Factors], weights: Tensor, shape: torch.Size) -> Tensor:
    """``sum_i weights[i] g_i`` over all uses of one parameter, without forming any single ``g_i``.

    Args:
        uses: one or more uses of the same parameter.
        weights: shape ``(n,)``. Candidates of weight zero are not read, so the cost grows with the number of others.
        shape: the parameter's shape.

    Returns:
        The weighted sum in that shape, in the dtype of the factors' arithmetic.
    """
    dtype, device = uses[0].dtype(), uses[0].left.device
    chosen = weights.nonzero()[:, 0]  # on the CPU: no synchronisation
    everyone = len(chosen) == len(weights)
    weights = weights.to(device=device, dtype=dtype)
    total: Tensor | None = None
    for use in uses:
        if use.whole:
            assert use.right is not None
            some = slice(None) if everyone else chosen.to(device)
            part = torch.einsum("n,nrc->rc", weights[some], use.right[some].to(dtype)).reshape(shape)
            total = part if total is None else total.add_(part)
            continue
        left, right, share = use.left, use.right, use.spread(weights)
        if use.positions is None and not everyone:
            index = chosen.to(device)
            left, share = left[index], share[index]
            right = None if right is None else right[index]
        left = left.flatten(0, 1)
        share = share.expand(-1, use.left.shape[1]).reshape(-1, 1)
        if use.indexed:
            assert right is not None
            part = torch.zeros(use.rows, use.columns, dtype=dtype, device=device)
            part.index_add_(0, left, right.flatten(0, 1).to(dtype) * share)
        elif right is None:
            part = share[:, 0] @ left.to(dtype)
        elif left.shape[1] <= right.shape[2]:
            part = (left.to(dtype) * share).T @ right.flatten(0, 1).to(dtype)
        else:
            part = left.to(dtype).T @ (right.flatten(0, 1).to(dtype) * share)
        part = part.reshape(shape)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def materialise(uses: Sequence[Factors], start: int, stop: int, *, out: Tensor | None = None) -> Tensor:
    """Multiply out rows ``start`` to ``stop`` of every candidate's gradient.

    Args:
        uses: one or more uses of the same parameter, each with one row of positions for each candidate
            (:meth:`Factors.by_row`).
        start: the first row.
        stop: one past the last row.
        out: a flat buffer that is large enough, to use in place of fresh memory.

    Returns:
        Shape ``(n, stop - start, columns)``, in the dtype of the factors' arithmetic.
    """
    first = uses[0]
    dtype, device, columns = first.dtype(), first.left.device, first.columns
    size = (first.count, stop - start, columns)
    numel = size[0] * size[1] * size[2]
    block = out[:numel].view(size) if out is not None else torch.empty(size, dtype=dtype, device=device)
    filled = False
    # Dense uses first: their product overwrites the buffer, so that it need not be cleared.
    for use in sorted(uses, key=lambda use: use.indexed and not use.whole):
        if use.whole:
            assert use.right is not None
            values = use.right[:, start:stop].to(dtype)
            block.add_(values) if filled else block.copy_(values)
        elif use.indexed:
            assert use.right is not None
            if not filled:
                block.zero_()
            inside = (use.left >= start) & (use.left < stop)
            row = (use.left - start).clamp(0, stop - start - 1)
            row = row + torch.arange(use.count, device=device)[:, None] * (stop - start)
            values = use.right.to(dtype) * inside[..., None]
            block.view(-1, columns).index_add_(0, row.flatten(), values.flatten(0, 1))
        elif use.right is None:
            values = use.left[:, :, start:stop].sum(dim=1, dtype=dtype)[..., None]
            block.add_(values) if filled else block.copy_(values)
        else:
            left = use.left[:, :, start:stop].to(dtype).transpose(1, 2)
            right = use.right.to(dtype)
            torch.baddbmm(block, left, right, out=block) if filled else torch.bmm(left, right, out=block)
        filled = True
    return block


def projection(uses: Sequence[Factors], weights: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``left @ (sum_i weights[i] g_i) @ right`` from the factors, and the size its rounding error is proportional to.

    Args:
        uses: one or more uses of the same parameter.
        weights: shape ``(n,)``.
        left: shape ``(rows,)``.
        right: shape ``(columns,)``.

    Returns:
        Two scalars: the projection; and the root of the sum of its squared terms, below which a sum with heavy
        cancellation carries no information.
    """
    totals, squares = [], []
    for use in uses:
        rows = left[use.left] if use.indexed else use.left.to(left.dtype) @ left
        columns = right[0] if use.right is None else use.right.to(left.dtype) @ right
        terms = rows * columns * use.spread(weights.to(left))
        totals.append(terms.sum())
        squares.append(torch.linalg.vector_norm(terms))
    if len(uses) == 1:
        return totals[0], squares[0]
    return torch.stack(totals).sum(), torch.linalg.vector_norm(torch.stack(squares))
