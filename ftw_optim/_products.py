"""Inner products of all candidates with each other and with the target, as they add up over parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

METRICS = ("preconditioned", "update", "euclidean")


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
        """Add those of the candidates' rows ``left`` (n, d) with ``right`` (n, d), and of ``left`` with ``target``."""
        self.gram += inner(left, right).to(self.gram)
        self.add_cross(left, target)

    def add_cross(self, rows: Tensor, target: Tensor | None) -> None:
        """Add those of the candidates' ``rows`` (n, d) with ``target`` (d,), if there is one."""
        if target is not None:
            self.cross_gram += inner(rows, target[None])[:, 0].to(self.cross_gram)

    def add_energy(self, left: Tensor, right: Tensor) -> None:
        """Add ``<left, right>`` to the target energy."""
        self.target_energy += inner(left.flatten()[None], right.flatten()[None])[0, 0].to(self.target_energy)

    def among(self, n: int, rows: Tensor) -> Products:
        """Those of ``n`` candidates of whom these are the ``rows``; zero for the others."""
        whole = Products.zeros(n, dtype=self.gram.dtype, device=self.gram.device)
        whole.gram[rows[:, None], rows] = self.gram
        whole.cross_gram[rows] = self.cross_gram
        whole.target_energy = self.target_energy
        return whole

    def on_host(self) -> Products:
        """On the CPU, in one copy."""
        n = len(self.cross_gram)
        # Symmetric to the last bit, whatever order the products were summed in.
        gram = (self.gram + self.gram.T) / 2
        flat = torch.cat([gram.flatten(), self.cross_gram, self.target_energy[None]]).cpu()
        return Products(gram=flat[: n * n].view(n, n), cross_gram=flat[n * n : -1], target_energy=flat[-1])


RUN = 4096
"""Entries that are summed in one go; longer sums lose digits (seen: 5e-5 of them in float32, and no sooner)."""


def inner(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of long rows, ``(n, d)`` and ``(m, d)``, as the sum of many short ones."""
    whole = left.shape[1] // RUN * RUN
    if whole <= RUN:
        return left @ right.T
    first, second = (part[:, :whole].view(len(part), -1, RUN).transpose(0, 1) for part in (left, right))
    return torch.bmm(first, second.mT).sum(0) + left[:, whole:] @ right[:, whole:].T
