"""Factors, target gradient and preconditioner to the small Gram matrix, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors import Factors, materialise, weighted_sum
from ftw_optim._preconditioners.maps import Elementwise, Preconditioner

METRICS = ("preconditioned", "update", "euclidean")

DEFAULT_MEMORY_LIMIT = 256 * 2**20
"""Bytes of multiplied-out gradients that may exist at a time, unless the user says otherwise."""


@final
@dataclass(kw_only=True, eq=False)
class Products:
    """Inner products in one metric, summed over parameters: ``gram`` (n, n), ``cross_gram`` (n,), ``target_energy``."""

    gram: Tensor
    cross_gram: Tensor
    target_energy: Tensor

    @classmethod
    def zeros(cls, n: int, *, dtype: torch.dtype, device: torch.device) -> Products:
        """Nothing summed yet, for ``n`` candidates."""
        return cls(
            gram=torch.zeros(n, n, dtype=dtype, device=device),
            cross_gram=torch.zeros(n, dtype=dtype, device=device),
            target_energy=torch.zeros((), dtype=dtype, device=device),
        )

    def add(self, left: Tensor, right: Tensor, target: Tensor | None) -> None:
        """Add those of the candidates' rows ``left`` (n, d) with ``right`` (n, d) and with ``target`` (d,)."""
        self.gram += (left @ right.T).to(self.gram)
        if target is not None:
            self.cross_gram += (left @ target).to(self.cross_gram)

    def add_energy(self, left: Tensor, right: Tensor) -> None:
        """Add ``<left, right>`` to the target energy."""
        self.target_energy += torch.dot(left.flatten(), right.flatten()).to(self.target_energy)

    def on_host(self) -> Products:
        """On the CPU, in one copy."""
        n = len(self.cross_gram)
        # Symmetric to the last bit, whatever order the products were summed in.
        gram = (self.gram + self.gram.T) / 2
        flat = torch.cat([gram.flatten(), self.cross_gram, self.target_energy[None]]).cpu()
        return Products(gram=flat[: n * n].view(n, n), cross_gram=flat[n * n : -1], target_energy=flat[-1])


def products(
    found: Mapping[str, Sequence[Factors]],
    target: Mapping[str, Tensor],
    precondition: Callable[[str, Tensor], Preconditioner],
    accepted: Tensor,
    *,
    shapes: Mapping[str, torch.Size],
    metrics: Sequence[str],
    scale: float = 1.0,
    memory_limit: int | None = None,
) -> dict[str, Products]:
    """Inner products of all candidates with each other and with the target, in each of the ``metrics``.

    Args:
        found: factors of each scored parameter that the candidates reached, multiplied by ``scale``. Parameters they
            did not reach are left out, of the target energy too: the step does not move them.
        target: target gradient of each scored parameter.
        precondition: ``(name, mean candidate gradient) -> P``.
        accepted: bool (n,), on the CPU: candidates that are not rejected; the factors of the others are zero.
        shapes: of the parameters.
        metrics: some of :data:`METRICS`.
        scale: what the factors were multiplied by.
        memory_limit: bytes of multiplied-out gradients that may exist at a time.

    Returns:
        For each metric its products, on the CPU.
    """
    limit = DEFAULT_MEMORY_LIMIT if memory_limit is None else memory_limit
    first = next(iter(found.values()))[0]
    dtype = torch.float32
    for uses in found.values():
        for use in uses:
            dtype = torch.promote_types(dtype, use.dtype())
    sums = {metric: Products.zeros(len(accepted), dtype=dtype, device=first.left.device) for metric in metrics}
    mean = accepted.to(torch.float64) / accepted.sum()
    buffer = _Buffer()
    with torch.no_grad():
        for name, given in found.items():
            uses = [use.by_row() for use in given]
            _add_parameter(
                sums,
                uses,
                target.get(name),
                lambda reference, name=name: precondition(name, reference),  # type: ignore[misc]
                mean,
                shape=shapes[name],
                scale=scale,
                limit=limit,
                buffer=buffer,
            )
    return {metric: summed.on_host() for metric, summed in sums.items()}


def _add_parameter(
    sums: Mapping[str, Products],
    uses: list[Factors],
    target: Tensor | None,
    precondition: Callable[[Tensor], Preconditioner],
    mean: Tensor,
    *,
    shape: torch.Size,
    scale: float,
    limit: int,
    buffer: _Buffer,
) -> None:
    rows, columns, dtype, n = uses[0].rows, uses[0].columns, uses[0].dtype(), uses[0].count
    compact = _touched_rows(uses)
    height = rows if compact is None else len(compact)
    at_once = max(1, limit // max(1, n * columns * dtype.itemsize))

    block = None
    if compact is None and at_once >= rows:
        # One pass serves the reference and the products.
        block = buffer.block(uses, 0, rows, scale)
        weights = mean.to(block)
        reference = (weights @ block.flatten(1)).reshape(shape)
    else:
        reference = weighted_sum(uses, mean / scale, shape)
    preconditioner = precondition(reference)

    matrix = None if target is None else target.to(dtype).reshape(rows, columns)
    if not isinstance(preconditioner, Elementwise):
        if block is None:
            block = materialise(uses, 0, rows).div_(scale)
        _add_general(sums, block, matrix, preconditioner, shape)
        return

    factor = preconditioner.factor
    spread = factor.to(dtype).reshape(rows, columns) if isinstance(factor, Tensor) and factor.ndim else factor
    if matrix is not None:
        for metric, energy in sums.items():
            energy.add_energy(matrix, _times(matrix, spread, metric))
    if compact is not None:
        uses = [replace(use, left=torch.searchsorted(compact, use.left.contiguous()), rows=height) for use in uses]
        matrix = None if matrix is None else matrix[compact]
        spread = spread[compact] if isinstance(spread, Tensor) and spread.ndim else spread
    for start in range(0, height, at_once):
        stop = min(height, start + at_once)
        if block is None or (start, stop) != (0, height):
            block = buffer.block(uses, start, stop, scale)
        part = None if matrix is None else matrix[start:stop]
        piece = spread[start:stop] if isinstance(spread, Tensor) and spread.ndim else spread
        _add_elementwise(sums, block, part, piece)
        block = None


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


def _add_general(
    sums: Mapping[str, Products],
    block: Tensor,
    target: Tensor | None,
    preconditioner: Preconditioner,
    shape: torch.Size,
) -> None:
    """Products under a preconditioner that mixes entries: ``P`` is applied to every candidate's gradient."""
    flat = block.flatten(1)
    moved = preconditioner.apply(block.view(-1, *shape)).flatten(1).to(flat)
    moved_target = None if target is None else preconditioner.apply(target.view(shape)).flatten().to(flat)
    for metric, summed in sums.items():
        left = moved if metric == "update" else flat
        right = flat if metric == "euclidean" else moved
        left_target = moved_target if metric == "update" or target is None else target.flatten()
        summed.add(left, right, None)
        if left_target is not None:
            summed.cross_gram += (right @ left_target).to(summed.cross_gram)
            assert target is not None
            assert moved_target is not None
            summed.add_energy(left_target, target.flatten() if metric == "euclidean" else moved_target)


def _times(matrix: Tensor, factor: Tensor | float, metric: str) -> Tensor:
    """``matrix`` under the map of the metric."""
    if metric == "euclidean":
        return matrix
    return matrix * factor if metric == "preconditioned" else matrix * factor * factor


def _touched_rows(uses: Sequence[Factors]) -> Tensor | None:
    """The rows that one-hot factors touch, sorted; None where a dense factor touches all of them."""
    if not all(use.indexed and not use.whole for use in uses):
        return None
    touched: Tensor = torch.cat([use.left.flatten() for use in uses]).unique()  # type: ignore[no-untyped-call]
    return touched


class _Buffer:
    """Memory for multiplied-out gradients, reused for each parameter: fresh pages cost more than arithmetic."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def block(self, uses: Sequence[Factors], start: int, stop: int, scale: float) -> Tensor:
        """Rows ``start`` to ``stop`` of all candidates' gradients, divided by ``scale``."""
        first = uses[0]
        numel = first.count * (stop - start) * first.columns
        memory = self._memory
        if memory is None or memory.numel() < numel or memory.dtype != first.dtype():
            self._memory = memory = None  # free the old one first
            memory = self._memory = torch.empty(numel, dtype=first.dtype(), device=first.left.device)
        block = materialise(uses, start, stop, out=memory)
        return block if scale == 1.0 else block.div_(scale)
