"""The sketched Gram matrix, for steps where the exact one costs too much: an unbiased estimate.

Every gradient is multiplied by the metric's power of ``P`` and reduced to a count sketch
(:mod:`~ftw_optim._gram.count_sketch`): inner products of the sketches are unbiased estimates of those of the gradients.
Where the map folds into factors and the layer is wide, no gradient is multiplied out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors
from ftw_optim._gram.blocks import Block, parts
from ftw_optim._gram.count_sketch import Hash
from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.spec import CONVOLVED, MATERIALISED, GramSpec
from ftw_optim._gram.ways import BYTE, rotated
from ftw_optim._preconditioners.maps import Preconditioner, Scalar

COPIES = 2
"""Independent halves of a sketch; their difference tells its error."""


@final
@dataclass(frozen=True, kw_only=True)
class Sketch:
    """The option to estimate the Gram matrix from ``dim`` numbers for each candidate: ``gram=Sketch(dim)``.

    Use it for many candidates, whose exact Gram matrix takes ``n ** 2`` products of whole gradients, and for
    micro-batches under ``combine="rerun"``, whose factors are dropped as soon as they are sketched. Gram matrix, cross
    products and target energy come from the same sketch, so together they are positive semi-definite. The sketch is
    drawn anew at each step from the optimizer's seed. Each product is unbiased, with a standard error of about
    ``(2 / dim) ** 0.5`` times the norms of its two gradients. ``selection.sketch`` holds the error as measured.

    Attributes:
        dim: numbers kept for each candidate; even.

    Source: Charikar, Chen and Farach-Colton (2002); Pham and Pagh (2013) for the sketch of an outer product.
    """

    dim: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 2 or self.dim % COPIES:
            raise ValueError(f"dim must be an even number, at least 2, got {self.dim!r}.")


@final
class SketchSums:
    """Sketches of all candidates and of the target, added up parameter by parameter; see :class:`GramSums`.

    The preconditioner is taken at the target gradient, not at the candidates' mean gradient as in :class:`GramSums`. So
    no candidate's sketch depends on another's, and candidates may come in any number of micro-batches.

    Args:
        spec: the inputs and options of the Gram matrix.
        accepted: mask of the candidates that are not rejected, bool (n,) on the CPU; the factors of others are zero.
        sketch: the size of the sketch.
        seed: seed of the random buckets and signs.
        counted: parameters whose share of the target is added elsewhere.
    """

    def __init__(
        self, spec: GramSpec, accepted: Tensor, *, sketch: Sketch, seed: int, counted: Iterable[str] = ()
    ) -> None:
        spec.refuse_other_ways(MATERIALISED, CONVOLVED)
        self._spec = spec
        self._size, self._seed = sketch.dim // COPIES, seed
        self._of_target = self._zeros(1)
        self._counted = set(counted)
        self._batches: list[dict[Metric, Tensor]] = []
        target = spec.target.values()
        norms = [torch.linalg.vector_norm(gradient).to(spec.device, spec.dtype) for gradient in target]
        count = sum(gradient.numel() for gradient in target)
        self._usual = torch.linalg.vector_norm(torch.stack(norms)) / count**0.5 if norms else None
        self.more(len(accepted))

    def more(self, n: int) -> None:
        """Begin a micro-batch of ``n`` further candidates, to which all later :meth:`add` calls belong."""
        self._batches.append(self._zeros(n))

    def _zeros(self, n: int) -> dict[Metric, Tensor]:
        shape = (COPIES, n, self._size)
        return {m: torch.zeros(shape, dtype=self._spec.dtype, device=self._spec.device) for m in self._spec.metrics}

    @torch.no_grad()
    def add(self, name: str, uses: Sequence[Factors]) -> str:
        """Add one scored parameter that the candidates reached; ``"convolved"`` if that was the way in all metrics."""
        block = self._spec.block(name, uses)
        if not block.rows * block.columns:
            return MATERIALISED  # a parameter without entries has no share
        target = self._spec.target.get(name)
        preconditioner = self._spec.preconditioner(name, block, self._reference(name, target))
        hashes = self._hashes(name, block)
        first, target = name not in self._counted, None if target is None else target.to(block.dtype)
        taken = set()
        for metric in self._spec.metrics:
            side = preconditioner.power(metric.power)
            taken.add(_add_block(self._batches[-1][metric], block, side, hashes, way=self._spec.way))
            if target is not None and first:
                _add_matrices(self._of_target[metric], _moved(target, block, side)[None], 0, hashes)
        self._counted.add(name)
        return CONVOLVED if taken == {CONVOLVED} else MATERIALISED

    def _reference(self, name: str, target: Tensor | None) -> Tensor:
        """The target gradient of a parameter; where that is zero, its root mean square over all parameters."""
        if target is None:
            target = torch.zeros(self._spec.shapes[name], dtype=self._spec.dtype, device=self._spec.device)
        return target if self._usual is None else torch.where(target.any(), target, self._usual.to(target))

    def _hashes(self, name: str, block: Block) -> list[Hash]:
        """The hashes of a parameter, one for each copy: the same in every micro-batch and order of parameters."""
        generator = torch.Generator().manual_seed(self._seed ^ zlib.crc32(name.encode()))
        return [
            Hash.drawn(block.rows, block.columns, self._size, generator, dtype=block.dtype, device=self._spec.device)
            for _ in range(COPIES)
        ]

    def products(self) -> dict[Metric, Products]:
        """The estimated products of all candidates added so far, by metric."""
        return {metric: estimated(*sketches) for metric, sketches in self.sketches().items()}

    def sketches(self) -> dict[Metric, tuple[Tensor, Tensor]]:
        """The sketches ``(copies, n, size)`` of all candidates added so far, the target's ``(copies, 1, size)``."""
        return {
            metric: (torch.cat([batch[metric] for batch in self._batches], dim=1), self._of_target[metric])
            for metric in self._spec.metrics
        }


def estimated(rows: Tensor, target: Tensor) -> Products:
    """The products of gradients of which these are the sketches, see :meth:`SketchSums.sketches`."""
    both, n = torch.cat([rows, target], dim=1), rows.shape[1]
    halves = both @ both.mT
    whole = halves.mean(dim=0)
    return Products(
        gram=whole[:n, :n], cross_gram=whole[:n, n], target_energy=whole[n, n], error=_relative_error(halves)
    )


def _relative_error(halves: Tensor) -> Tensor:
    """The relative standard error of the mean of two estimates (2, n, n), as root mean square over the entries.

    Each entry is taken relative to the norms of its two gradients.
    """
    norms = halves.mean(dim=0).diagonal().sqrt()
    apart = (halves[0] - halves[1]) / 2 / (norms[:, None] * norms)
    measured = norms.isfinite()
    some = apart.isfinite() & measured & measured[:, None]
    return (torch.where(some, apart, 0.0).square().sum() / some.sum().clamp(min=1)).sqrt()


def _add_block(
    sums: Tensor, block: Block, side: Preconditioner, hashes: Sequence[Hash], *, way: str | None = None
) -> str:
    """Add the sketches of ``side`` applied to each gradient of the block: ``sums`` (copies, n, size).

    Args:
        sums: the sketches, which are added to.
        block: the candidates' gradients.
        side: the map that is applied to them.
        hashes: one hash for each copy.
        way: :data:`CONVOLVED`, where gradient and map allow it, or :data:`MATERIALISED`; None: the cheaper one.

    Returns:
        The way that was taken; one-hot factors count as multiplied out.
    """
    if block.is_matrix and (turned := side.basis()) is not None:
        left, right, side = turned
        block = block.turned(left, right)
    factor = side.factor
    if factor is None and block.is_matrix and side.folds:
        block, side, factor = block.folded(side), Scalar(1.0), 1.0
    if factor is None:
        for part in parts(block.count, 2 * block.rows * block.columns * block.dtype.itemsize, block.limit):
            moved = side.apply(block.some(part).out(0, block.rows).view(-1, *block.shape))
            _add_matrices(sums[:, part], moved.reshape(-1, block.rows, block.columns).to(block.dtype), 0, hashes)
        return MATERIALISED
    if side.folds and block.is_matrix and _convolves(block, hashes[0].size, way):
        _add_outer(sums, block, side, hashes)
        return CONVOLVED
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor.to(block.dtype).reshape(block.rows, block.columns)
    for use in block.uses:
        if use.indexed and not use.whole:
            _add_indexed(sums, use, block, factor, hashes)
    dense = [use for use in block.uses if use.whole or not use.indexed]
    if dense:
        block = replace(block, uses=dense)
        for start, stop in block.ranges(copies=2):
            rows = block.out(start, stop)
            rows *= factor[start:stop] if isinstance(factor, Tensor) and factor.ndim else factor
            _add_matrices(sums, rows, start, hashes)
    return MATERIALISED


def _moved(target: Tensor, block: Block, side: Preconditioner) -> Tensor:
    """The target gradient, moved by ``side`` as :func:`_add_block` moves the candidates': (rows, columns)."""
    if block.is_matrix and (turned := side.basis()) is not None:
        left, right, diagonal = turned
        return diagonal.values.to(target) * rotated(target, left, right)
    return side.apply(target).reshape(block.rows, block.columns)


def _convolves(block: Block, size: int, way: str | None) -> bool:
    """Whether the two sides of the factors are to be sketched separately; asked where the map folds into them."""
    return _convolving_is_cheaper(block, size) if way is None else way == CONVOLVED


def _convolving_is_cheaper(block: Block, size: int) -> bool:
    """Whether sketching both sides costs less, in multiplications, than multiplying out the gradients."""
    n, rows, columns = block.count, block.rows, block.columns
    positions = sum(use.left.shape[1] for use in block.uses)
    byte = BYTE * block.dtype.itemsize
    out = n * rows * columns * (positions + (2 + COPIES) * byte)
    # Two transforms a position, each about 2.5 size log2(size), and every pass over memory; measured, twice as much.
    passes = 5.0 * size * math.log2(size) + byte * (6 * size + rows + columns)
    transforms = 2.0 * COPIES * n * positions * passes
    return transforms < out


def _add_matrices(sums: Tensor, matrices: Tensor, start: int, hashes: Sequence[Hash]) -> None:
    """Add the sketches of the rows from ``start`` on, ``(n, some, columns)``; ``matrices`` is overwritten."""
    signs: Tensor | None = None
    for into, one in zip(sums, hashes, strict=True):
        new = one.signs(start, start + matrices.shape[1])
        matrices.mul_(new if signs is None else new * signs)  # in place: fresh pages cost more than arithmetic
        one.add_signed(into, matrices, start)
        signs = new


def _add_outer(sums: Tensor, block: Block, side: Preconditioner, hashes: Sequence[Hash]) -> None:
    """Add the sketches of factors without multiplying them out; the map is folded into the factors first."""
    left, right = side.fold(*block.sides())
    at_once = 6 * left.shape[1] * hashes[0].size * block.dtype.itemsize
    for part in parts(block.count, at_once, block.limit):
        for into, one in zip(sums[:, part], hashes, strict=True):
            one.add_outer(into, left[part], right[part])


def _add_indexed(sums: Tensor, use: Factors, block: Block, factor: Tensor | float, hashes: Sequence[Hash]) -> None:
    """Add the sketches of one-hot factors, position by position."""
    assert use.right is not None
    at_once = 6 * use.right[0].numel() * block.dtype.itemsize
    for part in parts(block.count, at_once, block.limit):
        index, values = use.left[part], use.right[part].to(block.dtype)
        values = values * (factor[index] if isinstance(factor, Tensor) and factor.ndim else factor)
        for into, one in zip(sums[:, part], hashes, strict=True):
            one.add_rows(into, index, values)
