"""Ways from the factors of one parameter to its share of the Gram matrix: the same result at different costs.

*Materialised*: the gradients are multiplied out, a range of rows at a time. The cost is linear in the positions; it is
the only way for an element-wise ``P`` without further structure. *Tokens*: ``<g_i, g_j>`` is the sum of
``<left, left> <right, right>`` over pairs of positions, and no gradient is formed. The cost is quadratic in the
positions, so it serves short contexts in wide layers. A ``P`` with structure is folded into the factors first:
``L G R`` has the factors ``L left`` and ``R' right``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket
from ftw_optim._factors.buffer import Buffer
from ftw_optim._gram.blocks import Block, parts
from ftw_optim._gram.inner_products import Products, inner
from ftw_optim._gram.metric import Metric, most_applied
from ftw_optim._gram.profiling import profiled
from ftw_optim._gram.spec import MATERIALISED, TOKENS
from ftw_optim._preconditioners.maps import Diagonal, Preconditioner, Scalar

BYTE = 10.0
"""The cost of moving a byte, in multiplications: memory limits the speed for a large layer's gradients."""


def add_parameter(
    sums: Mapping[Metric, Products],
    block: Block,
    target: Tensor | None,
    precondition: Callable[[Tensor], Preconditioner],
    mean: Tensor,
    *,
    way: str | None = None,
) -> str:
    """Add one parameter's share to the products, in the cheapest way unless one is given.

    Args:
        sums: the products to add to, by metric.
        block: the candidates' gradients.
        target: the target gradient of the parameter; None where it has none.
        precondition: ``mean candidate gradient -> P``.
        mean: the candidates' weights in that mean, shape ``(n,)``.
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
    # A candidate that is not finite is rejected later; until then its values must not reach a rule.
    preconditioner = precondition(reference.nan_to_num_(0.0, 0.0, 0.0))
    if block.is_matrix and (turned := preconditioner.basis()) is not None:
        left, right, preconditioner = turned
        block = some = block.turned(left, right)
        target, first = None if target is None else rotated(target, left, right), None
    factor = preconditioner.factor
    if factor is None:
        if block.is_matrix and preconditioner.folds:
            _add_pair(sums, block, target, preconditioner, first)
        else:
            _add_general(sums, block, target, preconditioner)
        return MATERIALISED
    tokens = preconditioner.folds and _takes_tokens(block, len(sums), way)
    if target is not None and (tokens or touched is not None):  # else it is among the products
        for metric, summed in sums.items():
            summed.add_energy(*metric.sides(_applied(preconditioner, target, most_applied(sums))))
    if tokens:
        _add_tokens(sums, block, target, preconditioner)
        return TOKENS
    matrix = None if target is None else target.reshape(block.rows, block.columns)
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor.to(block.dtype).reshape(block.rows, block.columns)
    if touched is not None:
        matrix = None if matrix is None else matrix[touched]
        factor = factor[touched] if isinstance(factor, Tensor) and factor.ndim else factor
    for start, stop in some.ranges():
        beside = None if matrix is None else matrix[start:stop]
        rows = first if first is not None else some.out(start, stop, beside=beside)
        part = factor[start:stop] if isinstance(factor, Tensor) and factor.ndim else factor
        _add_elementwise(sums, rows, block.count, part, whole=touched is None)
    return MATERIALISED


def add_bucket(
    sums: Mapping[Metric, Products],
    bucket: Bucket,
    targets: Sequence[Tensor | None],
    precondition: Callable[[Tensor], Scalar | Diagonal],
    mean: Tensor,
    *,
    scale: float,
    buffer: Buffer,
) -> None:
    """Add the shares of all parameters of a bucket to the products; their gradients are multiplied out together.

    Args:
        sums: the products to add to, by metric.
        bucket: the candidates' factors, multiplied by ``scale``.
        targets: the target gradient of each parameter; all None where they have none.
        precondition: ``mean candidate gradients (B, *shape) -> P``.
        mean: the candidates' weights in that mean, shape ``(n,)``.
        scale: the factor by which the losses were multiplied, which is divided out.
        buffer: memory for the gradients.
    """
    n, dtype = bucket.count, bucket.dtype
    given = [target for target in targets if target is not None]
    with profiled("materialise"):
        rows = bucket.materialise(buffer)
        if scale != 1.0:
            rows[:n].div_(scale)
    if given:
        torch.stack([target.to(dtype) for target in given], out=rows[n].view(len(given), *bucket.shape))
    references = (mean.to(rows) @ rows[:n]).view(len(targets), *bucket.shape)
    factor = precondition(references.nan_to_num_(0.0, 0.0, 0.0)).factor
    factor = factor.to(dtype).flatten() if isinstance(factor, Tensor) else factor
    _add_elementwise(sums, rows if given else rows[:n], n, factor, whole=True)


def _takes_tokens(block: Block, metrics: int, way: str | None) -> bool:
    """Whether to take the way *tokens*, provided that the map can be folded."""
    return tokens_are_cheaper(block, metrics) if way is None else way == TOKENS and block.is_matrix


def tokens_are_cheaper(block: Block, metrics: int) -> bool:
    """Whether *tokens* costs less than multiplying out the gradients, provided that the map can be folded."""
    if not block.is_matrix:
        return False
    n, rows, columns = block.count, block.rows, block.columns
    positions = sum(use.left.shape[1] for use in block.uses)
    size, product = block.dtype.itemsize, 2.0 * n * positions * rows * columns
    out = product + 2.0 * metrics * n * n * rows * columns + BYTE * size * n * rows * columns * (4 + 2 * metrics)
    pairs = float(n * positions) ** 2
    return product * (1 + metrics) + metrics * pairs * (2.0 * (rows + columns) + 2 * BYTE * size) < out


def _add_elementwise(
    sums: Mapping[Metric, Products], rows: Tensor, n: int, factor: Tensor | float, *, whole: bool
) -> None:
    """Add the products of ``n`` candidates, and of the target where ``rows`` holds it as the last entry.

    ``rows``, ``(n, some, columns)`` or ``(n + 1, some, columns)``, is overwritten: it is first ``g``, then ``R g``,
    then ``P g``, where ``P = R R``. ``whole`` says whether the ranges of rows cover the target, and so its energy.
    """
    root = factor.sqrt() if isinstance(factor, Tensor) else factor**0.5
    power = 0.0
    for metric in sorted(sums, key=lambda metric: metric.power):
        while power < metric.power:
            rows.mul_(root)
            power += 0.5
        sums[metric].add_square(rows.flatten(1), n, energy=whole)


def _add_tokens(
    sums: Mapping[Metric, Products], block: Block, target: Tensor | None, preconditioner: Preconditioner
) -> None:
    """Add sums over pairs of positions, some candidates at a time; the power of ``P`` is folded into the factors."""
    n, dtype = block.count, block.dtype
    left, right = block.sides()
    positions = left.shape[1]
    for metric, summed in sums.items():
        side = preconditioner.power(metric.power)
        one, other = (part.flatten(0, 1) for part in side.fold(left, right))
        for part in parts(n, 2 * n * positions * positions * dtype.itemsize, block.limit):
            some = slice(part.start * positions, part.stop * positions)
            pairs = one[some] @ one.T
            pairs *= other[some] @ other.T
            kernel = pairs.view(-1, positions, n, positions).sum((1, 3))
            summed.gram[part] += kernel.to(summed.gram)
        if target is not None:
            terms = (other @ side.apply(target).to(other).T) * one
            summed.cross_gram += terms.view(n, -1).sum(1).to(summed.cross_gram)


def _add_pair(
    sums: Mapping[Metric, Products],
    block: Block,
    target: Tensor | None,
    preconditioner: Preconditioner,
    first: Tensor | None,
) -> None:
    """Add the products under a map that is folded into the factors of a second block, a range of rows at a time."""
    blocks, most = [block], most_applied(sums)
    for _ in range(most):
        blocks.append(replace(blocks[-1].folded(preconditioner), buffer=Buffer()))
    targets = [None] * len(blocks) if target is None else _applied(preconditioner, target, most)
    whole = first is not None and block.at_once(len(blocks)) == block.rows
    for start, stop in block.ranges(len(blocks)):
        parts_of_target = [None if one is None else one[start:stop].flatten() for one in targets]
        plain = first[: block.count] if whole and first is not None else block.out(start, stop)
        rows = [plain.flatten(1), *(one.out(start, stop).flatten(1) for one in blocks[1:])]
        for metric, summed in sums.items():
            left, right = metric.sides(rows)
            left_target, right_target = metric.sides(parts_of_target)
            summed.add(left, right, None)
            summed.add_cross(right, left_target)
            if left_target is not None and right_target is not None:
                summed.add_energy(left_target, right_target)


def _add_general(
    sums: Mapping[Metric, Products], block: Block, target: Tensor | None, preconditioner: Preconditioner
) -> None:
    """Add the products under a map that mixes entries; it is applied to the gradients of some candidates at a time."""
    n, most = block.count, most_applied(sums)
    size = (most + 1) * block.rows * block.columns * block.dtype.itemsize
    fits = n * size <= block.limit
    ranges = [slice(0, n)] if fits else list(parts(n, 2 * size, block.limit))
    targets = None if target is None else [one.flatten() for one in _applied(preconditioner, target, most)]

    def rows_of(part: slice) -> list[Tensor]:
        plain = block.some(part).out(0, block.rows).view(-1, *block.shape)
        return [one.flatten(1) for one in _applied(preconditioner, plain, most)]

    for number, one in enumerate(ranges):
        rows = rows_of(one)
        rows = rows if fits else [rows[0].clone(), *rows[1:]]  # out of the buffer
        for metric, summed in sums.items():
            left, right = metric.sides(rows)
            if targets is not None:
                left_target, right_target = metric.sides(targets)
                summed.cross_gram[one] += inner(right, left_target[None])[:, 0].to(summed.cross_gram)
                if number == 0:
                    summed.add_energy(left_target, right_target)
            summed.gram[one, one] += inner(left, right).to(summed.gram)
        for other in ranges[number + 1 :]:
            others = rows_of(other)
            for metric, summed in sums.items():
                corner = inner(metric.sides(rows)[0], metric.sides(others)[1]).to(summed.gram)
                summed.gram[one, other] += corner
                summed.gram[other, one] += corner.T


def _applied(preconditioner: Preconditioner, gradients: Tensor, times: int) -> list[Tensor]:
    """``[g, P g, P P g, ...]``, with ``P`` applied up to so many times."""
    found = [gradients]
    for _ in range(times):
        found.append(preconditioner.apply(found[-1]).to(gradients))
    return found


def rotated(target: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left' target right``, where None stands for the identity."""
    target = target if left is None else left.T.to(target) @ target
    return target if right is None else target @ right.to(target)
