"""Ways from the factors of one parameter to its share of the Gram matrix; all give the same number, some sooner.

*Multiplied out*, a range of rows at a time: linear in the positions, and the only way for an element-wise ``P`` of no
further structure. *Tokens*: ``<g_i, g_j>`` as the sum over pairs of positions of ``<left, left> <right, right>``,
without any gradient; quadratic in the positions, so for short contexts in wide layers. A ``P`` with structure is folded
into the factors first: ``L G R`` has the factors ``L left`` and ``R' right``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from ftw_optim._factors import Factors, materialise, weighted_sum
from ftw_optim._preconditioners.maps import Diagonal, Elementwise, Kronecker, Preconditioner, RankOne, RotatedDiagonal
from ftw_optim._products import Products, inner

Side = TypeVar("Side")

BYTE = 10.0
"""What moving a byte costs, in multiplications: memory is what a large layer's gradients wait for."""


@final
class Buffer:
    """Memory for multiplied-out gradients, reused from layer to layer: fresh pages cost more than arithmetic."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffer, ()  # copies and pickles are empty

    def of(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At least ``numel`` entries; what they held before is lost."""
        memory = self._memory
        if memory is None or memory.numel() < numel or memory.dtype != dtype or memory.device != device:
            self._memory = memory = None  # free the old one first
            memory = self._memory = torch.empty(numel, dtype=dtype, device=device)
        return memory


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """The candidates' gradients of one parameter, seen as matrices and multiplied out a range of rows at a time.

    Attributes:
        uses: with one row of positions for each candidate.
        shape: of the parameter.
        scale: what the factors were multiplied by.
        limit: bytes that may be multiplied out at a time.
        buffer: their memory.
    """

    uses: Sequence[Factors]
    shape: torch.Size
    scale: float
    limit: int
    buffer: Buffer

    @property
    def count(self) -> int:
        """How many candidates."""
        return self.uses[0].count

    @property
    def rows(self) -> int:
        """Of each gradient."""
        return self.uses[0].rows

    @property
    def columns(self) -> int:
        """Of each gradient."""
        return self.uses[0].columns

    @property
    def dtype(self) -> torch.dtype:
        """To compute in."""
        return self.uses[0].dtype()

    @property
    def dense(self) -> bool:
        """Whether all uses are outer products of whole rows, into which a map can be folded."""
        return all(not use.indexed and not use.whole and use.right is not None for use in self.uses)

    def at_once(self, copies: int = 1) -> int:
        """How many rows fit into the limit, ``copies`` times."""
        return min(self.rows, max(1, self.limit // max(1, copies * self.count * self.columns * self.dtype.itemsize)))

    def ranges(self, copies: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of rows that fit."""
        step = self.at_once(copies)
        for start in range(0, self.rows, step):
            yield start, min(self.rows, start + step)

    def out(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of all gradients, ``(n, stop - start, columns)``, until the next call."""
        first = self.uses[0]
        memory = self.buffer.of(self.count * (stop - start) * self.columns, self.dtype, first.left.device)
        block = materialise(self.uses, start, stop, out=memory)
        return block if self.scale == 1.0 else block.div_(self.scale)

    def mean(self, weights: Tensor) -> Tensor:
        """``sum_i weights[i] g_i``, shaped like the parameter, without forming any ``g_i``."""
        return weighted_sum(self.uses, weights / self.scale, self.shape)

    def folded(self, left: Tensor | None, right: Tensor | None) -> Block:
        """The block of ``left g right``, where ``dense``; None for the identity."""
        uses = []
        for use in self.uses:
            assert use.right is not None
            of_rows, of_columns = use.left.to(self.dtype), use.right.to(self.dtype)
            uses.append(
                replace(
                    use,
                    left=of_rows if left is None else of_rows @ left.T.to(self.dtype),
                    right=of_columns if right is None else of_columns @ right.to(self.dtype),
                )
            )
        return replace(self, uses=uses)

    def compact(self) -> tuple[Block, Tensor | None]:
        """Only the rows that one-hot factors touch, and which these are; None where dense ones touch all."""
        if not all(use.indexed and not use.whole for use in self.uses):
            return self, None
        touched = _distinct(torch.cat([use.left.flatten() for use in self.uses]), self.rows)
        uses = [
            replace(use, left=torch.searchsorted(touched, use.left.contiguous()), rows=len(touched))
            for use in self.uses
        ]
        return replace(self, uses=uses), touched


def add_parameter(
    sums: Mapping[str, Products],
    block: Block,
    target: Tensor | None,
    precondition: Callable[[Tensor], Preconditioner],
    mean: Tensor,
) -> None:
    """Add one parameter's share, in whichever way costs least.

    Args:
        sums: by metric.
        block: the candidates' gradients.
        target: gradient of the parameter; None: it has none.
        precondition: ``mean candidate gradient -> P``.
        mean: weights of the mean, shape ``(n,)``.
    """
    some, touched = block.compact()
    first = None
    if not tokens_are_cheaper(block, len(sums)) and touched is None and block.at_once() == block.rows:
        first = block.out(0, block.rows)  # one pass serves the reference and the products
        reference = (mean.to(first) @ first.flatten(1)).reshape(block.shape)
    else:
        reference = block.mean(mean)
    # Of a candidate that is not finite nothing will be kept; until that is known, no rule is to meet it.
    preconditioner = precondition(reference.nan_to_num_(0.0, 0.0, 0.0))
    target = None if target is None else target.to(block.dtype)
    if isinstance(preconditioner, Kronecker | RotatedDiagonal) and is_matrix(block):
        left, right = preconditioner.left, preconditioner.right
        if isinstance(preconditioner, Kronecker):
            _add_pair(sums, block, block.folded(left, right), target, preconditioner, first)
            return
        block = some = block.folded(None if left is None else left.T, right)
        target = None if target is None else rotated(target, left, right)
        preconditioner, first = Diagonal(preconditioner.values), None
    if not isinstance(preconditioner, Elementwise):
        _add_general(sums, block, target, preconditioner)
        return
    matrix = None if target is None else target.reshape(block.rows, block.columns)
    factor = preconditioner.factor
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor.to(block.dtype).reshape(block.rows, block.columns)
    if matrix is not None:
        for metric, energy in sums.items():
            energy.add_energy(matrix, _times(matrix, factor, metric))
    if tokens_are_cheaper(block, len(sums)) and (isinstance(preconditioner, RankOne) or not isinstance(factor, Tensor)):
        _add_tokens(sums, block, matrix, preconditioner)
        return
    if touched is not None:
        matrix = None if matrix is None else matrix[touched]
        factor = factor[touched] if isinstance(factor, Tensor) and factor.ndim else factor
    for start, stop in some.ranges():
        rows = first if first is not None else some.out(start, stop)
        part = None if matrix is None else matrix[start:stop]
        _add_elementwise(sums, rows, part, factor[start:stop] if isinstance(factor, Tensor) and factor.ndim else factor)


def tokens_are_cheaper(block: Block, metrics: int) -> bool:
    """Whether pairs of positions cost less than gradients multiplied out, if the map can be folded."""
    if not is_matrix(block):
        return False
    n, rows, columns = block.count, block.rows, block.columns
    positions = sum(use.left.shape[1] for use in block.uses)
    size, product = block.dtype.itemsize, 2.0 * n * positions * rows * columns
    out = product + 2.0 * metrics * n * n * rows * columns + BYTE * size * n * rows * columns * (4 + 2 * metrics)
    pairs = float(n * positions) ** 2
    return product * (1 + metrics) + metrics * pairs * (2.0 * (rows + columns) + 2 * BYTE * size) < out


def is_matrix(block: Block) -> bool:
    """Whether a matrix can be folded in on either side of the parameter."""
    return block.dense and tuple(block.shape) == (block.rows, block.columns)


def _add_elementwise(
    sums: Mapping[str, Products], block: Tensor, target: Tensor | None, factor: Tensor | float
) -> None:
    """Products of ``block`` (n, rows, columns), which is overwritten: <g, g>, then <Rg, Rg>, then <Pg, Pg>, P = R R."""
    flat = block.flatten(1)

    def add(metric: str) -> None:
        if metric in sums:
            sums[metric].add(flat, flat, None if target is None else target.flatten())

    root = factor.sqrt() if isinstance(factor, Tensor) else factor**0.5
    add("euclidean")
    if sums.keys() <= {"euclidean"}:
        return
    block.mul_(root)
    target = None if target is None else target * root
    add("preconditioned")
    if "update" in sums:
        block.mul_(root)
        target = None if target is None else target * root
        add("update")


def _add_tokens(sums: Mapping[str, Products], block: Block, target: Tensor | None, preconditioner: Elementwise) -> None:
    """Over pairs of positions, a range of candidates at a time, with the map or its root folded into the factors."""
    n, dtype = block.count, block.dtype
    left, right = sides(block)
    positions = left.shape[1]
    for metric, summed in sums.items():
        power = {"euclidean": 0.0, "preconditioned": 0.5, "update": 1.0}[metric]
        if isinstance(preconditioner, RankOne):
            rows, columns = (part.to(dtype) ** power for part in (preconditioner.rows, preconditioner.columns))
            one, other = left * rows, right * columns
            goal = None if target is None else target * rows[:, None] * columns
        else:
            share = float(preconditioner.factor) ** power
            one, other = left * share, right
            goal = None if target is None else target * share
        one = one / block.scale
        flat_one, flat_other = one.flatten(0, 1), other.flatten(0, 1)
        for part in parts(n, 2 * n * positions * positions * dtype.itemsize, block.limit):
            pairs = one[part].flatten(0, 1) @ flat_one.T
            pairs *= other[part].flatten(0, 1) @ flat_other.T
            kernel = pairs.view(-1, positions, n, positions).sum((1, 3))
            summed.gram[part] += kernel.to(summed.gram)
        if goal is not None:
            terms = (flat_other @ goal.T) * flat_one
            summed.cross_gram += terms.view(n, -1).sum(1).to(summed.cross_gram)


def _add_pair(
    sums: Mapping[str, Products],
    block: Block,
    moved: Block,
    target: Tensor | None,
    preconditioner: Preconditioner,
    first: Tensor | None,
) -> None:
    """Under a map that is folded into a second block: ``<g, P g>`` a range of rows at a time."""
    moved = replace(moved, buffer=Buffer())
    moved_target = None if target is None else preconditioner.apply(target)
    whole = first is not None and block.at_once(copies=2) == block.rows
    for start, stop in block.ranges(copies=2):
        rows = (first if whole and first is not None else block.out(start, stop)).flatten(1)
        part, moved_part = (None if t is None else t[start:stop].flatten() for t in (target, moved_target))
        moved_rows = moved.out(start, stop).flatten(1)
        for metric, summed in sums.items():
            (left, left_target), (right, right_target) = _sides(metric, (rows, part), (moved_rows, moved_part))
            summed.add(left, right, None)
            summed.add_cross(right, left_target)
            if left_target is not None and right_target is not None:
                summed.add_energy(left_target, right_target)


def _add_general(
    sums: Mapping[str, Products], block: Block, target: Tensor | None, preconditioner: Preconditioner
) -> None:
    """Under a map that mixes entries: it is applied to every candidate's gradient, some candidates at a time."""
    n, size = block.count, block.rows * block.columns * block.dtype.itemsize
    fits = 2 * n * size <= block.limit
    ranges = [slice(0, n)] if fits else list(parts(n, 4 * size, block.limit))
    flat_target = None if target is None else target.flatten()
    moved_target = None if target is None else preconditioner.apply(target).flatten()

    def both(part: slice) -> tuple[Tensor, Tensor]:
        rows = some_of(block, part).out(0, block.rows)
        return rows.flatten(1), preconditioner.apply(rows.view(-1, *block.shape)).flatten(1).to(rows)

    for number, one in enumerate(ranges):
        rows, moved = both(one)
        rows = rows if fits else rows.clone()  # out of the buffer
        for metric, summed in sums.items():
            (left, left_target), (right, right_target) = _sides(metric, (rows, flat_target), (moved, moved_target))
            if left_target is not None and right_target is not None:
                summed.cross_gram[one] += inner(right, left_target[None])[:, 0].to(summed.cross_gram)
                if number == 0:
                    summed.add_energy(left_target, right_target)
            summed.gram[one, one] += inner(left, right).to(summed.gram)
        for other in ranges[number + 1 :]:
            others, others_moved = both(other)
            for metric, summed in sums.items():
                left, _ = _sides(metric, rows, moved)
                _, right = _sides(metric, others, others_moved)
                corner = inner(left, right).to(summed.gram)
                summed.gram[one, other] += corner
                summed.gram[other, one] += corner.T


def parts(n: int, size: int, limit: int) -> Iterator[slice]:
    """Ranges of ``n`` candidates that fit into ``limit`` bytes at ``size`` each."""
    at_once = max(1, limit // max(1, size))
    for start in range(0, n, at_once):
        yield slice(start, min(n, start + at_once))


def sides(block: Block) -> tuple[Tensor, Tensor]:
    """Left and right of all uses of a block that is :attr:`Block.dense`, one after another: (n, t, rows | columns)."""
    left = torch.cat([use.left for use in block.uses], dim=1).to(block.dtype)
    return left, torch.cat([use.right for use in block.uses if use.right is not None], dim=1).to(block.dtype)


def some_of(block: Block, part: slice) -> Block:
    """The block of some candidates."""
    uses = [
        replace(use, left=use.left[part], right=None if use.right is None else use.right[part]) for use in block.uses
    ]
    return replace(block, uses=uses)


def _sides(metric: str, plain: Side, moved: Side) -> tuple[Side, Side]:
    """What stands on either side of an inner product in a metric."""
    return moved if metric == "update" else plain, plain if metric == "euclidean" else moved


def rotated(target: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left' target right``."""
    target = target if left is None else left.T.to(target) @ target
    return target if right is None else target @ right.to(target)


def _times(matrix: Tensor, factor: Tensor | float, metric: str) -> Tensor:
    """``matrix`` under the map of the metric."""
    if metric == "euclidean":
        return matrix
    return matrix * factor if metric == "preconditioned" else matrix * factor * factor


def _distinct(indices: Tensor, rows: int) -> Tensor:
    """The distinct ones, sorted; on an accelerator padded to a length that is known without asking it."""
    ordered = indices.sort().values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    if indices.device.type == "cpu":
        return ordered[new]
    padded = ordered.new_full((min(rows, len(ordered)),), rows - 1)
    return padded.scatter_(0, new.cumsum(0) - 1, ordered)
