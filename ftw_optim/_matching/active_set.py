"""The active set of non-negative least squares: the iterations of Lawson and Hanson in Gram form."""

from __future__ import annotations

import math
from typing import final

from ftw_optim._matching.elimination import Elimination
from ftw_optim._matching.list_elimination import ListElimination
from ftw_optim._matching.scaled_system import ScaledSystem
from ftw_optim._matching.solution import WeightSolution
from ftw_optim._matching.tensor_elimination import TensorElimination

FEW_TO_GROW = 96
"""Number of candidates up to which the active set is grown in lists.

Both forms were equally quick at about 100 candidates, a quarter of them kept, on one thread of an x86 server.
"""

FEW_TO_FIT = 16
"""Number of candidates up to which all of them are fitted in lists.

Both forms were equally quick at about 20 on the same machine where all get weight, as most kept ones do; lists are
quicker up to 64 where few do.
"""


@final
class ActiveSet:
    """The candidates with positive weight (the active ones), grown one at a time, with the best weights for them.

    These are the iterations of Lawson and Hanson. Only admitted candidates may become active; a greedy filter admits
    further ones between the iterations.

    Args:
        system: the scaled system.
        left: the elimination of ``system`` in one of its forms, with nothing eliminated yet.
    """

    def __init__(self, system: ScaledSystem, left: Elimination) -> None:
        self._system = system
        self._rounding = system.rounding
        self._nearly = 1.0 - self._rounding**0.5  # equal in half of the digits
        self._left = left
        self._shares: list[float] = []  # the scaled weights of the active ones
        self._admitted: set[int] = set()
        self._given_up: list[int] = []
        self._iterations = 0

    @classmethod
    def to_grow(cls, system: ScaledSystem) -> ActiveSet:
        """An empty active set in the form that is quicker to :meth:`grow`."""
        few = len(system) <= FEW_TO_GROW
        return cls(system, ListElimination(system) if few else TensorElimination(system))

    @classmethod
    def to_fit(cls, system: ScaledSystem) -> ActiveSet:
        """An empty active set in the form that is quicker to :meth:`admit_all`."""
        few = len(system) <= FEW_TO_FIT
        return cls(system, ListElimination(system) if few else TensorElimination(system))

    def admit_all(self) -> None:
        """Let every candidate have weight, and refit."""
        self._admitted.update(range(len(self._system)))
        self._start()
        self._refit()

    def grow(self, count: int) -> list[int]:
        """Admit up to ``count`` candidates, each the :meth:`best` at its time; returns them in order."""
        kept: list[int] = []
        while len(kept) < count:
            best = self.best()
            if best is None:
                break
            if self.admit(best):
                kept.append(best)
        return kept

    def admit(self, candidate: int) -> bool:
        """Let ``candidate`` have weight, and refit; returns False, without a change, if rounding hides what it adds."""
        self._left.offer(candidate, offered=False)
        if not self._enter(candidate):
            return False
        self._admitted.add(candidate)
        self._refit()
        return True

    def best(self) -> int | None:
        """The candidate that would lower the objective most in addition to the active ones; None if none would.

        The gain of a candidate is its slack squared over its Schur complement; only candidates that are not yet
        admitted, with both above rounding, count. When the active ones span all directions but one, every candidate
        with a part in that direction has the same gain. Among equal gains the largest slack is best: it changes the
        other weights the least, so that they stay positive. Among equal slacks it is the first.
        """
        equals = self._left.foremost(self._noise(), self._nearly)
        if len(equals) < 2:
            return equals[0] if equals else None
        slack = self._left.slack(equals)
        bound = self._nearly * max(slack)
        return next(candidate for candidate, one in zip(equals, slack, strict=True) if one >= bound)

    def solution(self) -> WeightSolution:
        """The weights so far, in the units of the system; ``converged`` refers to all candidates, admitted or not."""
        self._settle()
        weights, slack = self._system.in_units(self._spread())
        return WeightSolution(
            weights=weights,
            slack=slack,
            iterations=self._iterations,
            converged=self._system.bounded and self._is_best(),
        )

    def _spread(self) -> list[float]:
        spread = [0.0] * len(self._system)
        for candidate, share in zip(self._left.active, self._shares, strict=True):
            spread[candidate] = share
        return spread

    def _is_best(self) -> bool:
        """Whether no candidate has slack above its tolerance and rounding, of either sign where it is active."""
        slack = self._left.slack_beside(self._shares)
        for candidate in self._left.active:
            slack[candidate] = abs(slack[candidate])
        noise = self._noise()
        for candidate, (value, tolerance) in enumerate(zip(slack, self._system.tolerance, strict=True)):
            if not value <= max(tolerance, noise):
                coefficients = self._left.coefficients(candidate)
                if not value <= self._noise(_squared(coefficients)):
                    return False
        return True

    def _noise(self, squared: float = 0.0) -> float:
        """The rounding error in the slack of a candidate that stems from errors of eps in the entries of ``gram``.

        Args:
            squared: sum of the squared coefficients of the candidate among the active ones, whose weights have rounding
                errors too.
        """
        return self._rounding * (1.0 + sum(self._shares)) * math.sqrt(1.0 + squared)

    def _start(self) -> None:
        """Begin with a set of candidates whose weights are all positive when they are solved for together.

        The set starts with all candidates; those without a positive weight are dropped until all weights are positive.
        Most often this is already the solution.
        """
        guess = [index for index, square in enumerate(self._system.matrix.diagonal().tolist()) if square > 0.0]
        while guess:
            self._iterations += 1
            # Only where half of the digits are exact: in a worse system rounding could make a weight positive.
            if not self._left.replace(guess) or not self._left.growth() < self._rounding**-0.5:
                break
            shares = self._left.solve(refined=False)
            least = self._rounding * (1.0 + sum(map(abs, shares)))
            positive = [candidate for candidate, share in zip(guess, shares, strict=True) if share > least]
            if len(positive) == len(guess):
                self._shares = shares
                return
            guess = positive
        self._left.replace([])

    def _refit(self) -> None:
        """Give weight to admitted candidates, each the first with the largest slack, until none has slack."""
        for _ in range(10 * len(self._system)):  # far more than are needed: rounding must not keep us here
            if len(self._admitted) == len(self._left.active):
                return
            waiting = sorted(self._admitted.difference(self._left.active, self._given_up))
            noise, tolerance = self._noise(), self._system.tolerance
            largest, candidate = 0.0, -1
            for other, slack in zip(waiting, self._left.slack(waiting), strict=True):
                if slack > largest and slack > max(noise, tolerance[other]):
                    largest, candidate = slack, other
            if candidate < 0:
                return
            self._enter(candidate)

    def _enter(self, candidate: int) -> bool:
        """Give ``candidate`` weight; returns False if rounding hides how much.

        The slack of the active candidates stays zero: as the weight of ``candidate`` grows, theirs change by its
        coefficients among them. An active candidate whose weight reaches zero leaves, and the weight of ``candidate``
        grows further among the others.
        """
        self._iterations += 1
        left = self._left
        before = list(left.active), self._shares
        slack, schur = left.left_of(candidate)
        weight = 0.0
        while True:
            coefficients = left.coefficients(candidate)
            squared = _squared(coefficients)
            # Entries of the Gram matrix off by eps move this by about eps (1 + |coefficients|^2).
            independent = schur > self._rounding * (1.0 + squared)
            if weight == 0 and slack <= self._noise(squared):
                return self._give_up(candidate)
            if independent:
                step = slack / schur
                shares = self._moved(step, coefficients)
                if min(shares, default=0.0) >= 0.0:
                    break
            limits = [
                share / coefficient if coefficient > 0 else math.inf
                for share, coefficient in zip(self._shares, coefficients, strict=True)
            ]
            limit = min(limits, default=math.inf)
            if limit == math.inf or not (independent or limit * schur <= slack):
                # Up to rounding, the objective has no minimum in this direction.
                self._set_active(*before)
                return self._give_up(candidate)
            slack -= limit * schur
            weight += limit
            shares = [max(0.0, share) for share in self._moved(limit, coefficients)]
            leaving = limits.index(limit)
            del shares[leaving]
            self._set_active(left.active[:leaving] + left.active[leaving + 1 :], shares, unchanged=leaving)
            _, schur = left.left_of(candidate)
        left.append(candidate)
        self._shares = [*shares, weight + step]
        for other in self._given_up:
            left.offer(other, offered=other not in self._admitted)
        self._given_up = []
        if weight > 0:
            self._settle()
        return True

    def _moved(self, step: float, coefficients: list[float]) -> list[float]:
        """The weights of the active candidates once one of these ``coefficients`` has gained ``step``."""
        return [share - step * one for share, one in zip(self._shares, coefficients, strict=True)]

    def _give_up(self, candidate: int) -> bool:
        """Ignore ``candidate`` until another one enters; returns False."""
        self._given_up.append(candidate)
        return False

    def _set_active(self, active: list[int], shares: list[float], *, unchanged: int = 0) -> None:
        """Make ``active`` the active set; its first ``unchanged`` candidates are already the first ones of the set."""
        # Schur complements only grow when candidates leave: what was above rounding stays positive definite.
        whole = self._left.replace(active, unchanged=unchanged)
        assert whole
        self._shares = shares

    def _settle(self) -> None:
        """Compute the weights of the active candidates anew from their rows, without the rounding of earlier steps.

        Candidates whose weight was positive only by that rounding leave.
        """
        while self._left.active:
            shares = self._left.solve(refined=True)
            stays = [share > 0.0 for share in shares]
            if all(stays):
                self._shares = shares
                break
            self._set_active(
                [candidate for candidate, stay in zip(self._left.active, stays, strict=True) if stay],
                [share for share in shares if share > 0.0],
                unchanged=stays.index(False),
            )


def _squared(values: list[float]) -> float:
    return sum(value * value for value in values)
