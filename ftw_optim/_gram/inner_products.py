"""Inner products of all candidates with each other and with the target, summed over parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._gram.metric import Metric
from ftw_optim._gram.profiling import profiled


@final
@dataclass(kw_only=True, eq=False)
class Products:
    """Inner products in one metric, summed over parameters.

    Attributes:
        gram: shape (n, n).
        cross_gram: shape (n,).
        target_energy: a scalar.
        error: a scalar: standard error of a product, relative to the norms of its two gradients; zero where exact.
        cross_gram_error: shape (n,), the standard error of ``cross_gram`` where it is estimated from rows of the step;
            None where it is not.
    """

    gram: Tensor
    cross_gram: Tensor
    target_energy: Tensor
    error: Tensor
    cross_gram_error: Tensor | None = None

    @classmethod
    def zeros(cls, n: int, *, dtype: torch.dtype, device: torch.device) -> Products:
        """Products of ``n`` candidates before anything is added: all zero."""
        return cls(
            gram=torch.zeros(n, n, dtype=dtype, device=device),
            cross_gram=torch.zeros(n, dtype=dtype, device=device),
            target_energy=torch.zeros((), dtype=dtype, device=device),
            error=torch.zeros((), dtype=dtype, device=device),
        )

    def add(self, left: Tensor, right: Tensor, target: Tensor | None) -> None:
        """Add products of the rows ``left`` and ``right``, both (n, d), and of ``left`` with ``target`` (d,)."""
        with profiled("products"):
            self.gram += inner(left, right).to(self.gram)
            self.add_cross(left, target)

    def add_square(self, rows: Tensor, n: int, *, energy: bool) -> None:
        """Add the products of the candidates' rows with each other, and with the target's row if there is one.

        Args:
            rows: shape ``(n, d)``, or ``(n + 1, d)`` with the target's row as the last.
            n: number of candidates.
            energy: whether to add the product of the target's row with itself, too.
        """
        with profiled("products"):
            both = inner(rows, rows).to(self.gram)
            self.gram += both[:n, :n]
            if len(rows) > n:
                self.cross_gram += both[:n, n]
                if energy:
                    self.target_energy += both[n, n]

    def add_cross(self, rows: Tensor, target: Tensor | None) -> None:
        """Add the products of the candidates' ``rows`` (n, d) with ``target`` (d,), if there is one."""
        if target is not None:
            self.cross_gram += inner(rows, target[None])[:, 0].to(self.cross_gram)

    def add_energy(self, left: Tensor, right: Tensor) -> None:
        """Add ``<left, right>`` to the target energy."""
        self.target_energy += inner(left.flatten()[None], right.flatten()[None])[0, 0].to(self.target_energy)

    def among(self, n: int, rows: Tensor) -> Products:
        """The products inside a system of ``n`` candidates, at the indices ``rows``; zero for all others."""
        whole = Products.zeros(n, dtype=self.gram.dtype, device=self.gram.device)
        whole.gram[rows[:, None], rows] = self.gram
        whole.cross_gram[rows] = self.cross_gram
        whole.target_energy, whole.error = self.target_energy, self.error
        return whole

    def of(self, accepted: Tensor) -> Products:
        """The products with zeros for all but the ``accepted`` candidates, bool (n,)."""
        both, zero = accepted[:, None] & accepted, self.gram.new_zeros(())
        return replace(
            self,
            gram=torch.where(both, self.gram, zero),
            cross_gram=torch.where(accepted, self.cross_gram, zero),
        )


def on_host(problem: Mapping[Metric, Products], *others: Tensor) -> tuple[dict[Metric, Products], list[Tensor]]:
    """The products and other small tensors on the CPU, in one copy: the device is waited for only once.

    Args:
        problem: the products in each metric.
        others: numbers or flags, of any shape.
    """
    parts = list(others)
    for one in problem.values():
        # Symmetric to the last bit, whatever order the products were summed in.
        parts += [(one.gram + one.gram.T) / 2, one.cross_gram, one.target_energy, one.error]
    if not parts:
        return {}, []
    dtype = torch.float32
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    flat = torch.cat([part.detach().flatten().to(parts[0].device, dtype) for part in parts]).cpu()
    given = torch.split(flat, [part.numel() for part in parts])
    there = [values.view(part.shape).to(part.dtype) for values, part in zip(given, parts, strict=True)]
    products = there[len(others) :]
    return {
        metric: Products(
            gram=products[4 * number],
            cross_gram=products[4 * number + 1],
            target_energy=products[4 * number + 2],
            error=products[4 * number + 3],
        )
        for number, metric in enumerate(problem)
    }, there[: len(others)]


RUN = 4096
"""Entries that are summed in one go; longer sums lose digits (seen: a relative error of 5e-5 in float32)."""


def inner(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of long rows, ``(n, d)`` and ``(m, d)``, as a sum of products of short pieces."""
    whole = left.shape[1] // RUN * RUN
    if whole <= RUN:
        return left @ right.T
    first, second = (part[:, :whole].view(len(part), -1, RUN).transpose(0, 1) for part in (left, right))
    return torch.bmm(first, second.mT).sum(0) + left[:, whole:] @ right[:, whole:].T
