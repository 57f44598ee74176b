"""The elimination of small systems, in lists of floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import mul
from typing import final

from ftw_optim._matching.elimination import Elimination
from ftw_optim._matching.scaled_system import ScaledSystem


@final
class ListElimination(Elimination):
    """The form for small systems: each operation on a tensor would take longer than all of its arithmetic.

    Sums of products run over whole lists: a loop in Python costs several times as much.
    """

    def __init__(self, system: ScaledSystem) -> None:
        super().__init__(system)
        self._system: list[list[float]] = system.matrix.tolist()
        self._floor = list(self._tolerance)
        # The decomposition, by columns and without its diagonal; those of other candidates have an entry for each row.
        self._columns: list[list[float]] = [[] for _ in self._system]
        self._target: list[float] = []
        self._pivots: list[float] = []  # the diagonal
        self._right: list[list[float]] = []  # the rows right of the diagonal, for active candidates alone
        self._others = list(range(len(self._system)))
        self._slack = [row[-1] for row in self._system]
        self._schur = [row[index] for index, row in enumerate(self._system)]

    def append(self, candidate: int) -> None:
        """See :class:`Elimination`."""
        columns, slack, schur = self._columns, self._slack, self._schur
        entries, own = self._system[candidate], columns[candidate]
        pivot = math.sqrt(schur[candidate])
        share = slack[candidate] / pivot
        self._others.remove(candidate)
        for other in self._others:
            column = columns[other]
            entry = (entries[other] - sum(map(mul, own, column))) / pivot
            column.append(entry)
            schur[other] -= entry * entry
            slack[other] -= entry * share
        for row, entry in zip(self._right, own, strict=True):
            row.append(entry)
        self._right.append([])
        self._pivots.append(pivot)
        self._target.append(share)
        self.active.append(candidate)

    def replace(self, active: list[int], *, unchanged: int = 0) -> bool:
        """See :class:`Elimination`."""
        self.active = active[:unchanged]
        del self._target[unchanged:], self._pivots[unchanged:], self._right[unchanged:]
        for index, row in enumerate(self._right):
            del row[unchanged - 1 - index :]
        self._others = sorted(set(range(len(self._system))).difference(self.active))
        for other in self._others:
            column, row = self._columns[other], self._system[other]
            del column[unchanged:]
            self._schur[other] = row[other] - _dot(column, column)
            self._slack[other] = row[-1] - _dot(column, self._target)
        for candidate in active[unchanged:]:
            if not self._schur[candidate] > 0.0:
                return False
            self.append(candidate)
        return True

    def slack(self, candidates: Sequence[int]) -> list[float]:
        """See :class:`Elimination`."""
        return [self._slack[candidate] for candidate in candidates]

    def left_of(self, candidate: int) -> tuple[float, float]:
        """See :class:`Elimination`."""
        return self._slack[candidate], self._schur[candidate]

    def coefficients(self, candidate: int) -> list[float]:
        """See :class:`Elimination`."""
        return self._back_substitute(self._columns[candidate])

    def growth(self) -> float:
        """See :class:`Elimination`."""
        largest = 0.0
        for candidate, pivot in zip(self.active, self._pivots, strict=True):
            coefficients = self._back_substitute(self._columns[candidate])
            largest = max(largest, (1.0 + _dot(coefficients, coefficients)) / pivot**2)
        return largest

    def solve(self, *, refined: bool) -> list[float]:
        """See :class:`Elimination`."""
        weights = self._back_substitute(self._target)
        if not refined:
            return weights
        forward: list[float] = []
        for candidate, pivot in zip(self.active, self._pivots, strict=True):
            row = self._system[candidate]
            missing = row[-1] - _dot((row[other] for other in self.active), weights)
            forward.append((missing - _dot(self._columns[candidate], forward)) / pivot)
        return [weight + more for weight, more in zip(weights, self._back_substitute(forward), strict=True)]

    def slack_beside(self, weights: list[float]) -> list[float]:
        """See :class:`Elimination`."""
        return [row[-1] - _dot((row[other] for other in self.active), weights) for row in self._system]

    def offer(self, candidate: int, *, offered: bool) -> None:
        """See :class:`Elimination`."""
        self._floor[candidate] = self._tolerance[candidate] if offered else math.inf

    def foremost(self, least: float, nearly: float) -> list[int]:
        """See :class:`Elimination`."""
        rounding = self._rounding
        gains = [
            slack * slack / schur if slack > least and slack > floor and schur > rounding else 0.0
            for slack, floor, schur in zip(self._slack, self._floor, self._schur, strict=True)
        ]
        bound = nearly * max(gains, default=0.0)
        return [index for index, gain in enumerate(gains) if gain >= bound > 0.0]

    def _back_substitute(self, values: Sequence[float]) -> list[float]:
        """The solution of ``upper @ solution = values``, with the triangle of as many active candidates as values."""
        solution = list(values)
        for index in range(len(solution) - 1, -1, -1):
            later = solution[index + 1 :]
            solution[index] = (solution[index] - sum(map(mul, self._right[index], later))) / self._pivots[index]
        return solution


def _dot(left: Iterable[float], right: Iterable[float]) -> float:
    """The sum of products, up to the end of the shorter one."""
    total: float = sum(map(mul, left, right))
    return total
