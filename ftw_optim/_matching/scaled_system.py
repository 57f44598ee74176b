"""The system of a matching problem, checked and scaled for the solver."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


@final
class ScaledSystem:
    """A Gram matrix and products with a target, all candidates scaled to length one and the target to at most one.

    So every threshold of a solver is a number without unit, and powers of two pass through without rounding. A
    candidate of no length has a row, a product and a weight of zero.

    Args:
        gram: shape ``(n, n)``.
        cross_gram: shape ``(n,)``.
        tol: as in :func:`solve_nnls`.
        eps: relative precision in which ``gram`` was accumulated; that of its dtype unless given.
        target_energy: squared length of the target, where known. Rounding errors in ``cross_gram`` are proportional to
            that length, not to ``cross_gram``: where the target is almost orthogonal to all candidates,
            ``cross_gram`` is nothing but rounding.

    Attributes:
        matrix: ``[gram | cross_gram]``, scaled; shape ``(n, n + 1)``, float64, on the CPU.
        tolerance: for each candidate, the scaled slack that counts as none.
        rounding: the rounding error of a scaled entry.

    Raises:
        ValueError: the shapes disagree, an entry is not finite or ``tol`` is not in (0, 1).
        TypeError: ``gram`` or ``cross_gram`` is not of a floating-point dtype.
    """

    def __init__(
        self,
        gram: Tensor,
        cross_gram: Tensor,
        *,
        tol: float = 1e-10,
        eps: float | None = None,
        target_energy: float = 0.0,
    ) -> None:
        _check_form(gram, cross_gram, tol)
        n = len(cross_gram)
        # Products of float32 gradients were seen off by some 3 eps; our own sums add float64 rounding.
        self.rounding = 8 * (torch.finfo(gram.dtype).eps if eps is None else eps) + n * EPS
        self._gram, self._cross_gram = gram.detach().cpu(), cross_gram.detach().cpu()
        products: list[float] = self._cross_gram.tolist()
        # In place: fresh pages cost more than the arithmetic.
        self.matrix = torch.empty(n, n + 1, dtype=torch.float64)
        torch.cat([self._gram, self._cross_gram[:, None]], 1, out=self.matrix)
        diagonal: list[float] = self._gram.diagonal().tolist()
        self._lengths = [math.sqrt(square) if square > 0 else math.inf for square in diagonal]
        largest = max(map(abs, products), default=0.0)
        largest_scaled = max(
            (abs(one / length) for one, length in zip(products, self._lengths, strict=True)), default=0.0
        )
        self._unit = max(largest_scaled, max(target_energy, 0.0) ** 0.5) or 1.0
        self.tolerance = [tol * min(largest / length, largest_scaled) / self._unit for length in self._lengths]
        self.matrix.div_(torch.tensor(self._lengths, dtype=torch.float64)[:, None])
        self.matrix.div_(torch.tensor([*self._lengths, self._unit], dtype=torch.float64))
        if not math.isfinite(self.matrix.sum()):
            _check_entries(gram, cross_gram)
        # A candidate of no length with a positive product has no best weight.
        self.bounded = all(length < math.inf or one <= 0.0 for one, length in zip(products, self._lengths, strict=True))

    def __len__(self) -> int:
        return len(self._lengths)

    def in_units(self, scaled: list[float]) -> tuple[Tensor, Tensor]:
        """The weights of all candidates and their slack, in the units of the system, from the ``scaled`` weights."""
        weights = torch.tensor(
            [weight * self._unit / length for weight, length in zip(scaled, self._lengths, strict=True)],
            dtype=torch.float64,
        )
        return weights, self._cross_gram.double() - self._gram.double() @ weights


def _check_form(gram: Tensor, cross_gram: Tensor, tol: float) -> None:
    k = len(cross_gram) if cross_gram.ndim == 1 else -1
    if gram.shape != (k, k):
        raise ValueError(
            "Expected gram (k, k) and cross_gram (k,), "
            f"got {tuple(gram.shape)} and {tuple(cross_gram.shape)}. Restrict both to the same candidates."
        )
    for name, tensor in (("gram", gram), ("cross_gram", cross_gram)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(
                f"{name} must be of a floating-point dtype, which tells its rounding, got {tensor.dtype}. "
                f"Convert it with {name}.double()."
            )
    if not 0.0 < tol < 1.0:
        raise ValueError(f"tol must be in (0, 1), got {tol}. Choose one near 1e-10.")


def _check_entries(gram: Tensor, cross_gram: Tensor) -> None:
    for name, tensor in (("gram", gram), ("cross_gram", cross_gram)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} must be finite, got {int((~tensor.isfinite()).sum())} entries that are not. "
                "Leave out candidates whose gradient is not finite."
            )
