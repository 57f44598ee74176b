"""The elimination of large systems, in tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._matching.elimination import Elimination
from ftw_optim._matching.scaled_system import ScaledSystem

_ZERO = torch.zeros((), dtype=torch.float64)


@final
class TensorElimination(Elimination):
    """The form for large systems, with some thirty operations for each candidate that becomes active."""

    def __init__(self, system: ScaledSystem) -> None:
        super().__init__(system)
        n, self._system = len(system), system.matrix
        self._floor = torch.tensor(self._tolerance, dtype=torch.float64)
        # Row i is what is left of the system's row active[i] without the rows before it.
        self._rows = torch.empty(n, n + 1, dtype=torch.float64)
        self._upper = torch.empty(n, n, dtype=torch.float64)  # the columns of the active ones, in order
        self._slack_and_schur = torch.stack([self._system[:, -1], self._system.diagonal()])
        self._slack, self._schur = self._slack_and_schur

    def append(self, candidate: int) -> None:
        """See :class:`Elimination`."""
        size = len(self.active)
        before, row = self._rows[:size], self._rows[size]
        torch.addmv(self._system[candidate], before.T, before[:, candidate], alpha=-1, out=row)
        row /= math.sqrt(self._schur[candidate])
        entries = row[:-1]
        self._schur.addcmul_(entries, entries, value=-1)
        self._slack.addcmul_(entries, row[-1:], value=-1)
        self._upper[: size + 1, size] = self._rows[: size + 1, candidate]
        self.active.append(candidate)

    def replace(self, active: list[int], *, unchanged: int = 0) -> bool:
        """See :class:`Elimination`."""
        size, new = len(active), torch.tensor(active[unchanged:], dtype=torch.int64)
        head = self._rows[:unchanged]
        block = self._system[new] - head[:, new].T @ head
        lower, failed = torch.linalg.cholesky_ex(block[:, new])
        if failed:
            return False
        torch.linalg.solve_triangular(lower, block, upper=False, out=self._rows[unchanged:size])
        self._upper[:unchanged, unchanged:size] = head[:, new]
        self._upper[unchanged:size, unchanged:size] = lower.T
        rows = self._rows[:size]
        torch.sub(self._system.diagonal(), rows[:, :-1].square().sum(0), out=self._schur)
        torch.sub(self._system[:, -1], rows[:, -1] @ rows[:, :-1], out=self._slack)
        self.active = list(active)
        return True

    def slack(self, candidates: Sequence[int]) -> list[float]:
        """See :class:`Elimination`."""
        return _as_list(self._slack[torch.tensor(candidates, dtype=torch.int64)])

    def left_of(self, candidate: int) -> tuple[float, float]:
        """See :class:`Elimination`."""
        slack, schur = self._slack_and_schur[:, candidate].tolist()
        return slack, schur

    def coefficients(self, candidate: int) -> list[float]:
        """See :class:`Elimination`."""
        return _as_list(self._back_substitute(self._rows[: len(self.active), candidate : candidate + 1]))

    def growth(self) -> float:
        """See :class:`Elimination`."""
        size = len(self.active)
        inverse = torch.linalg.solve_triangular(
            self._upper[:size, :size], torch.eye(size, dtype=torch.float64), upper=True
        )
        return float(inverse.square_().sum(0).max())

    def solve(self, *, refined: bool) -> list[float]:
        """See :class:`Elimination`."""
        size = len(self.active)
        weights = self._back_substitute(self._rows[:size, -1:])
        if refined:
            active = torch.tensor(self.active, dtype=torch.int64)
            block = self._system[active]
            missing = block[:, -1] - block[:, active] @ weights
            weights = weights + torch.cholesky_solve(missing[:, None], self._upper[:size, :size], upper=True)[:, 0]
        return _as_list(weights)

    def slack_beside(self, weights: list[float]) -> list[float]:
        """See :class:`Elimination`."""
        spread = torch.zeros(len(self._system), dtype=torch.float64)
        spread[self.active] = torch.tensor(weights, dtype=torch.float64)
        return _as_list(self._system[:, -1] - self._system[:, :-1] @ spread)

    def offer(self, candidate: int, *, offered: bool) -> None:
        """See :class:`Elimination`."""
        self._floor[candidate].fill_(self._tolerance[candidate] if offered else math.inf)

    def foremost(self, least: float, nearly: float) -> list[int]:
        """See :class:`Elimination`."""
        useful = (self._slack > self._floor.clamp(min=least)).logical_and_(self._schur > self._rounding)
        gains = torch.where(useful, self._slack.square().div_(self._schur), _ZERO)
        largest, order = gains.topk(min(2, len(gains)))
        values, indices = largest.tolist(), order.tolist()
        if not indices or values[0] <= 0.0:
            return []
        if values[-1] < nearly * values[0]:
            return [indices[0]]
        equals: list[int] = (gains >= nearly * values[0]).nonzero()[:, 0].tolist()
        return equals

    def _back_substitute(self, column: Tensor) -> Tensor:
        """The solution, shape ``(k,)``, of ``upper @ solution = column``, shape ``(k, 1)``, among the active ones."""
        size = len(self.active)
        solution: Tensor = torch.linalg.solve_triangular(self._upper[:size, :size], column, upper=True)
        return solution[:, 0]


def _as_list(values: Tensor) -> list[float]:
    found: list[float] = values.tolist()
    return found
