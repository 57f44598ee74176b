"""Factors of small gradients, and a preconditioner of every form that fits them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ftw_optim import Diagonal, Factors, Kronecker, Preconditioner, RankOne, RotatedDiagonal, Scalar


def random_factors(kind: str, *, grid: tuple[int, int], rows: int, columns: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if kind == "dense":
        return Factors(left=normal(*grid, rows), right=normal(*grid, columns))
    if kind == "one-hot":
        ids = torch.randint(rows, grid, generator=generator)
        return Factors(left=ids, right=normal(*grid, columns), rows=rows)
    return Factors(left=normal(*grid, rows))


ROWS, COLUMNS, N = 6, 4, 3


def positive(size: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return root @ root.T


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) + 0.1


class Mixing(Preconditioner):
    """A dense map on all entries."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def apply(self, gradient: Tensor) -> Tensor:
        return (gradient.reshape(*gradient.shape[:-2], -1) @ self.matrix).reshape(gradient.shape)


MAPS: dict[str, Callable[[torch.Generator], Preconditioner]] = {
    "scalar": lambda g: Scalar(0.3),
    "diagonal": lambda g: Diagonal(uniform(ROWS, COLUMNS)),
    "rank one": lambda g: RankOne(uniform(ROWS), uniform(COLUMNS)),
    "kronecker": lambda g: Kronecker(positive(ROWS, g), positive(COLUMNS, g)),
    "kronecker, right alone": lambda g: Kronecker(right=positive(COLUMNS, g)),
    "of a kind of its own": lambda g: Mixing(positive(ROWS * COLUMNS, g)),
    "rotated, left alone": lambda g: RotatedDiagonal(
        torch.linalg.qr(positive(ROWS, g))[0], None, uniform(ROWS, COLUMNS)
    ),
    "rotated": lambda g: RotatedDiagonal(
        torch.linalg.qr(positive(ROWS, g))[0],
        torch.linalg.qr(positive(COLUMNS, g))[0],
        uniform(ROWS, COLUMNS),
    ),
}
"""Maps of a matrix (6, 4) in float64; a new form of ``P`` has its line here."""

ROOTLESS = {"of a kind of its own"}
"""The maps that have no root, and so no sketch in the preconditioned metric."""

USES: dict[str, list[Factors]] = {
    "one position": [random_factors("dense", grid=(N, 1), rows=ROWS, columns=COLUMNS, seed=6)],
    "two uses": [
        random_factors("dense", grid=(N, 1), rows=ROWS, columns=COLUMNS, seed=7),
        random_factors("dense", grid=(N, 1), rows=ROWS, columns=COLUMNS, seed=8),
    ],
    "dense": [random_factors("dense", grid=(N, 5), rows=ROWS, columns=COLUMNS, seed=1)],
    "embedding": [random_factors("one-hot", grid=(N, 2), rows=ROWS, columns=COLUMNS, seed=2)],
    "tied": [
        random_factors("one-hot", grid=(N, 5), rows=ROWS, columns=COLUMNS, seed=3),
        random_factors("dense", grid=(N, 5), rows=ROWS, columns=COLUMNS, seed=4),
        random_factors("dense", grid=(N, 2), rows=ROWS, columns=COLUMNS, seed=5),
    ],
}
