"""The forms a preconditioner takes. Each is a symmetric positive semi-definite map on gradients of one parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor


class Preconditioner(ABC):
    """``P`` in ``update = update_at_zero_gradient - P gradient``, in the unit of the parameter over the gradient."""

    @abstractmethod
    def apply(self, gradient: Tensor) -> Tensor:
        """``P gradient``; axes in front of the parameter's own, such as one for candidates, are batch axes."""


class Elementwise(Preconditioner):
    """A preconditioner that multiplies entry by entry."""

    @property
    @abstractmethod
    def factor(self) -> Tensor | float:
        """A number, or a tensor shaped like the parameter."""

    @final
    def apply(self, gradient: Tensor) -> Tensor:
        """``factor * gradient``."""
        return gradient * self.factor


@final
@dataclass(frozen=True, eq=False)
class Scalar(Elementwise):
    """``P = value``, as for SGD."""

    value: float

    @property
    def factor(self) -> float:
        """The number itself."""
        return self.value


@final
@dataclass(frozen=True, eq=False)
class Diagonal(Elementwise):
    """``P = diag(values)``, shaped like the parameter, as for Adam."""

    values: Tensor

    @property
    def factor(self) -> Tensor:
        """The diagonal."""
        return self.values


@final
@dataclass(frozen=True, eq=False)
class RankOne(Elementwise):
    """``P = diag(outer(rows, columns))`` of a matrix, ``(d_out,)`` and ``(d_in,)``, as for Adafactor."""

    rows: Tensor
    columns: Tensor

    @property
    def factor(self) -> Tensor:
        """The outer product."""
        return self.rows[:, None] * self.columns


@final
@dataclass(frozen=True, eq=False)
class Kronecker(Preconditioner):
    """``P G = left G right`` of a matrix, as for Shampoo; all factors symmetric positive semi-definite.

    Attributes:
        left: of the first axis, shape ``(d_out, d_out)``; None for the identity.
        right: of the last axis, shape ``(d_in, d_in)``; None for the identity.
        between: of the axes between them, as convolutions have; None for the identity. ``left`` is the axis before.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    between: tuple[Tensor | None, ...] = ()

    def apply(self, gradient: Tensor) -> Tensor:
        """``left gradient right``."""
        return along_axes(gradient, (self.left, *self.between, self.right))


@final
@dataclass(frozen=True, eq=False)
class RotatedDiagonal(Preconditioner):
    """``P G = left (values * (left' G right)) right'`` of a matrix: a diagonal in a rotated basis, as for SOAP.

    Attributes:
        left: orthogonal, of the first axis, shape ``(d_out, d_out)``; None for the identity.
        right: orthogonal, of the last axis, shape ``(d_in, d_in)``; None for the identity.
        values: shaped like the parameter, non-negative.
        between: orthogonal, of the axes between them; None for the identity.
    """

    left: Tensor | None
    right: Tensor | None
    values: Tensor
    between: tuple[Tensor | None, ...] = ()

    def apply(self, gradient: Tensor) -> Tensor:
        """Rotate, scale entry by entry, rotate back."""
        bases = (self.left, *self.between, self.right)
        rotated = along_axes(gradient, [None if basis is None else basis.T for basis in bases])
        return along_axes(self.values * rotated, bases)


def along_axes(gradient: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """``gradient`` with each matrix applied from the left along one of its last axes; None for the identity."""
    for axis, matrix in enumerate(matrices, start=-len(matrices)):
        if matrix is not None:
            gradient = (gradient.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return gradient


def root_of(preconditioner: Preconditioner) -> Preconditioner:
    """The map that makes the preconditioner when it is applied twice.

    Raises:
        NotImplementedError: it is of a kind of its own, of which only ``apply`` is known.
    """
    match preconditioner:
        case Scalar(value):
            return Scalar(value**0.5)
        case Diagonal(values):
            return Diagonal(values.sqrt())
        case RankOne(rows, columns):
            return RankOne(rows.sqrt(), columns.sqrt())
        case Kronecker(left, right, between):
            return Kronecker(_root(left), _root(right), tuple(map(_root, between)))
        case RotatedDiagonal(values=values):
            return replace(preconditioner, values=values.sqrt())
    raise NotImplementedError(
        f"Expected a preconditioner whose root is known, one of Scalar, Diagonal, RankOne, Kronecker and "
        f"RotatedDiagonal, got {type(preconditioner).__name__}: a sketch in the preconditioned metric needs the root. "
        'Use gram="exact", or let the rule return one of these.'
    )


def _root(matrix: Tensor | None) -> Tensor | None:
    """The symmetric root of a positive semi-definite matrix."""
    if matrix is None:
        return None
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.mT
    return root
