"""Ways from the factors of one parameter to its share of the Gram matrix; all give the same number, some sooner.

*Multiplied out*, a range of rows at a time: linear in the positions, and the only way for an element-wise ``P`` of no
further structure. *Tokens*: ``<g_i, g_j>`` as the sum over pairs of positions of ``<left, left> <right, right>``,
without any gradient; quadratic in the positions, so for short contexts in wide layers. A ``P`` with structure is folded
into the factors first: ``L G R`` has the factors ``L left`` and ``R' right``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ftw_optim._gram.blocks import Block, Buffer, is_matrix, parts, sides, some_of
from ftw_optim._gram.inner_products import Products, inner
from ftw_optim._preconditioners.maps import Diagonal, Elementwise, Kronecker, Preconditioner, RankOne, RotatedDiagonal

Side = TypeVar("Side")

Observe = Callable[[str, Block, Tensor, Preconditioner], None]
"""Told of each parameter that is added: its name, its gradients, the reference, and the ``P`` taken at that."""

MATERIALISED, TOKENS, CONVOLVED = "materialised", "tokens", "convolved"
"""Ways: gradients multiplied out; pairs of positions; and, in a sketch, both sides apart."""

BYTE = 10.0
"""What moving a byte costs, in multiplications: memory is what a large layer's gradients wait for."""


def add_parameter(
    sums: Mapping[str, Products],
    block: Block,
    target: Tensor | None,
    precondition: Callable[[Tensor], Preconditioner],
    mean: Tensor,
    *,
    way: str | None = None,
) -> str:
    """Add one parameter's share, in whichever way costs least.

    Args:
        sums: by metric.
        block: the candidates' gradients.
        target: gradient of the parameter; None: it has none.
        precondition: ``mean candidate gradient -> P``.
        mean: weights of the mean, shape ``(n,)``.
        way: :data:`TOKENS`, where gradient and ``P`` allow it, or :data:`MATERIALISED`; None: the cheaper one.

    Returns:
        The way that was taken.
    """
    some, touched = block.compact()
    target = None if target is None else target.to(block.dtype)
    first = None
    if not _takes_tokens(block, len(sums), way) and touched is None and block.at_once() == block.rows:
        # One pass serves the reference and the products.
        beside = None if target is None else target.reshape(block.rows, block.columns)
        first = block.out(0, block.rows, beside=beside)
        reference = (mean.to(first) @ first[: block.count].flatten(1)).reshape(block.shape)
    else:
        reference = block.mean(mean)
    # Of a candidate that is not finite nothing will be kept; until that is known, no rule is to meet it.
    preconditioner = precondition(reference.nan_to_num_(0.0, 0.0, 0.0))
    if isinstance(preconditioner, Kronecker | RotatedDiagonal) and is_matrix(block):
        left, right = preconditioner.left, preconditioner.right
        if isinstance(preconditioner, Kronecker):
            _add_pair(sums, block, block.folded(left, right), target, preconditioner, first)
            return MATERIALISED
        block = some = block.folded(None if left is None else left.T, right)
        target = None if target is None else rotated(target, left, right)
        preconditioner, first = Diagonal(preconditioner.values), None
    if not isinstance(preconditioner, Elementwise):
        _add_general(sums, block, target, preconditioner)
        return MATERIALISED
    matrix = None if target is None else target.reshape(block.rows, block.columns)
    factor = preconditioner.factor
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor.to(block.dtype).reshape(block.rows, block.columns)
    if matrix is not None:
        for metric, energy in sums.items():
            energy.add_energy(matrix, _times(matrix, factor, metric))
    folds = isinstance(preconditioner, RankOne) or not isinstance(factor, Tensor)
    if folds and _takes_tokens(block, len(sums), way):
        _add_tokens(sums, block, matrix, preconditioner)
        return TOKENS
    if touched is not None:
        matrix = None if matrix is None else matrix[touched]
        factor = factor[touched] if isinstance(factor, Tensor) and factor.ndim else factor
    for start, stop in some.ranges():
        beside = None if matrix is None else matrix[start:stop]
        rows = first if first is not None else some.out(start, stop, beside=beside)
        part = factor[start:stop] if isinstance(factor, Tensor) and factor.ndim else factor
        _add_elementwise(sums, rows, block.count, part)
    return MATERIALISED


def check_way(way: str | None, known: Collection[str]) -> None:
    """Raise unless the way is None or one of the known ones.

    Raises:
        ValueError: it is another.
    """
    if way is not None and way not in known:
        raise ValueError(f"way must be None or one of {', '.join(map(repr, known))}, got {way!r}.")


def _takes_tokens(block: Block, metrics: int, way: str | None) -> bool:
    """Whether pairs of positions are to be formed, if the map can be folded."""
    return tokens_are_cheaper(block, metrics) if way is None else way == TOKENS and is_matrix(block)


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


def _add_elementwise(sums: Mapping[str, Products], rows: Tensor, n: int, factor: Tensor | float) -> None:
    """Products of ``n`` candidates and the target behind them, which are overwritten.

    Those of ``g``, then of ``R g``, then of ``P g``, where ``P = R R``.
    """
    flat = rows.flatten(1)
    root = factor.sqrt() if isinstance(factor, Tensor) else factor**0.5
    left = set(sums)
    for metric in ("euclidean", "preconditioned", "update"):
        if metric in left:
            sums[metric].add_square(flat, n)
            left.remove(metric)
        if not left:
            return
        rows.mul_(root)


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
        rows = (first[: block.count] if whole and first is not None else block.out(start, stop)).flatten(1)
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
