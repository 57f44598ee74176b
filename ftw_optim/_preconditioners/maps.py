"""The forms of a preconditioner: symmetric positive semi-definite maps on the gradients of one parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor


class Preconditioner(ABC):
    """``P`` in ``update = update_at_zero_gradient - P gradient``, in the unit of the parameter over the gradient.

    A form must define :meth:`apply`; the other methods are optional. With :meth:`power` it can be used in a sketch;
    with :meth:`fold` or :meth:`basis` it is applied to the factors of a layer, which is faster than to whole gradients.
    These names, ``factor``, ``folds`` and ``root`` are the library's: a form must not use them for attributes.
    """

    @abstractmethod
    def apply(self, gradient: Tensor) -> Tensor:
        """``P gradient``; axes in front of the parameter's own axes, such as one for candidates, are batch axes."""

    @property
    def factor(self) -> Tensor | float | None:
        """The factor of each entry of the gradient, a number or a tensor of its shape; None if ``P`` mixes entries."""
        return None

    def power(self, exponent: float) -> Preconditioner:
        """``P`` to a power that is not negative: ``power(0.5)``, applied twice, is ``P``.

        Raises:
            NotImplementedError: the form defines none but 0 and 1.
        """
        if exponent == 1.0:
            return self
        if exponent == 0.0:
            return Scalar(1.0)
        raise NotImplementedError(
            f"Expected a preconditioner whose root is known, one of Scalar, Diagonal, RankOne, Kronecker and "
            f"RotatedDiagonal, got {type(self).__name__}: a sketch in the preconditioned metric needs the root. Use "
            'gram="exact", give the form a method power(exponent), or let the rule return one of these.'
        )

    @final
    def root(self) -> Preconditioner:
        """The map that, applied twice, is this one: ``power(0.5)``."""
        return self.power(0.5)

    @final
    @property
    def folds(self) -> bool:
        """Whether the form defines :meth:`fold`."""
        return type(self).fold is not Preconditioner.fold

    def fold(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """New sides whose outer products are ``P outer(left, right)``.

        Args:
            left: shape ``(..., rows)``; the parameter is a matrix.
            right: shape ``(..., columns)``.
        """
        raise NotImplementedError

    def basis(self) -> tuple[Tensor | None, Tensor | None, Diagonal] | None:
        """Matrices ``left`` and ``right``, and the diagonal of ``P`` on ``left' G right``; None without such a form."""
        return None


class Elementwise(Preconditioner):
    """A preconditioner that multiplies each entry of the gradient by a factor."""

    @property
    @abstractmethod
    def factor(self) -> Tensor | float:
        """The factor of each entry, a number or a tensor of the parameter's shape."""

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

    def power(self, exponent: float) -> Scalar:
        """The number to this power."""
        return Scalar(self.value**exponent)

    def fold(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The left side times the number."""
        return left * self.value, right


@final
@dataclass(frozen=True, eq=False)
class Diagonal(Elementwise):
    """``P = diag(values)``, with ``values`` of the parameter's shape, as for Adam."""

    values: Tensor

    @property
    def factor(self) -> Tensor:
        """The diagonal ``values``."""
        return self.values

    def power(self, exponent: float) -> Diagonal:
        """Each entry to this power."""
        return Diagonal(self.values**exponent)


@final
@dataclass(frozen=True, eq=False)
class RankOne(Elementwise):
    """``P = diag(outer(rows, columns))`` for a matrix, ``rows`` (d_out,) and ``columns`` (d_in,), as for Adafactor."""

    rows: Tensor
    columns: Tensor

    @property
    def factor(self) -> Tensor:
        """The outer product of ``rows`` and ``columns``."""
        return self.rows[:, None] * self.columns

    def power(self, exponent: float) -> RankOne:
        """Both sides to this power."""
        return RankOne(self.rows**exponent, self.columns**exponent)

    def fold(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Each side times its own vector."""
        return left * self.rows.to(left), right * self.columns.to(right)


@final
@dataclass(frozen=True, eq=False)
class Kronecker(Preconditioner):
    """``P G = left G right`` for a matrix, as for Shampoo; all factors are symmetric positive semi-definite.

    Attributes:
        left: factor of the first axis, shape ``(d_out, d_out)``; None for the identity.
        right: factor of the last axis, shape ``(d_in, d_in)``; None for the identity.
        between: factors of the axes between them, as convolutions have, None for the identity. ``left`` then belongs to
            the axis before these.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    between: tuple[Tensor | None, ...] = ()

    def apply(self, gradient: Tensor) -> Tensor:
        """``left gradient right``."""
        return along_axes(gradient, (self.left, *self.between, self.right))

    def power(self, exponent: float) -> Kronecker:
        """Each matrix to this power."""
        left, *between, right = (_power(matrix, exponent) for matrix in (self.left, *self.between, self.right))
        return Kronecker(left, right, tuple(between))

    def fold(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Each side times its own matrix."""
        left = left if self.left is None else left @ self.left.T.to(left)
        return left, right if self.right is None else right @ self.right.to(right)


@final
@dataclass(frozen=True, eq=False)
class RotatedDiagonal(Preconditioner):
    """``P G = left (values * (left' G right)) right'`` for a matrix: a diagonal in a rotated basis, as for SOAP.

    Attributes:
        left: orthogonal matrix of the first axis, shape ``(d_out, d_out)``; None for the identity.
        right: orthogonal matrix of the last axis, shape ``(d_in, d_in)``; None for the identity.
        values: the diagonal, of the parameter's shape, not negative.
        between: orthogonal matrices of the axes between them; None for the identity.
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

    def power(self, exponent: float) -> RotatedDiagonal:
        """Each value to this power, in the same basis."""
        return replace(self, values=self.values**exponent)

    def basis(self) -> tuple[Tensor | None, Tensor | None, Diagonal]:
        """The two bases, and the values as a diagonal in them."""
        return self.left, self.right, Diagonal(self.values)


def along_axes(gradient: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """``gradient`` with each matrix applied from the left along one of its last axes; None for the identity."""
    for axis, matrix in enumerate(matrices, start=-len(matrices)):
        if matrix is not None:
            gradient = (gradient.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return gradient


def _power(matrix: Tensor | None, exponent: float) -> Tensor | None:
    """A symmetric positive semi-definite matrix to a power; None, the identity, stays None."""
    if matrix is None or exponent == 1.0:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    raised: Tensor = (vectors * values.clamp(min=0.0) ** exponent) @ vectors.mT
    return raised
