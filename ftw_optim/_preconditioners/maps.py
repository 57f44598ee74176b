"""The forms a preconditioner takes. Each is a symmetric positive semi-definite map on gradients of one parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

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
    """``P G = left G right`` of a matrix, as for Shampoo; both symmetric positive semi-definite.

    Attributes:
        left: shape ``(d_out, d_out)``; None for the identity.
        right: shape ``(d_in, d_in)``; None for the identity.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def apply(self, gradient: Tensor) -> Tensor:
        """``left gradient right``."""
        if self.left is not None:
            gradient = self.left @ gradient
        return gradient if self.right is None else gradient @ self.right


@final
@dataclass(frozen=True, eq=False)
class RotatedDiagonal(Preconditioner):
    """``P G = left (values * (left' G right)) right'`` of a matrix: a diagonal in a rotated basis, as for SOAP.

    Attributes:
        left: orthogonal, shape ``(d_out, d_out)``.
        right: orthogonal, shape ``(d_in, d_in)``.
        values: shape ``(d_out, d_in)``, non-negative.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def apply(self, gradient: Tensor) -> Tensor:
        """Rotate, scale entry by entry, rotate back."""
        return self.left @ (self.values * (self.left.T @ gradient @ self.right)) @ self.right.T
