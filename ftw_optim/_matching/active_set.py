"""The active set of non-negative least squares: the iterations of Lawson and Hanson in Gram form."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from ftw_optim._matching.solution import WeightSolution

_ZERO = torch.zeros((), dtype=torch.float64)

RUN_PATIENCE = 8
"""Number of candidates that are entered one at a time after a run in which none could enter."""


@final
class ActiveSet:
    """The candidates with positive weight (the active ones), grown one at a time, with the best weights for them.

    These are the iterations of Lawson and Hanson. Only admitted candidates may become active; a greedy filter admits
    further ones between the iterations. Candidates are scaled to length one and the target to at most one, so that
    every threshold is a number without unit and powers of two pass through without rounding.

    Args:
        gram: shape ``(n, n)``.
        cross_gram: shape ``(n,)``.
        tol: as in :func:`solve_nnls`.
        eps: relative precision in which ``gram`` was accumulated; that of its dtype unless given.
        target_energy: squared length of the target, where known. Rounding errors in ``cross_gram`` are proportional to
            that length, not to ``cross_gram``: where the target is almost orthogonal to all candidates,
            ``cross_gram`` is nothing but rounding.
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
        _check_system(gram, cross_gram, tol)
        n = len(cross_gram)
        # Products of float32 gradients were seen off by some 3 eps; our own sums add float64 rounding.
        eps = torch.finfo(gram.dtype).eps if eps is None else eps
        self._rounding = 8 * eps + n * torch.finfo(torch.float64).eps
        self._nearly = 1.0 - self._rounding**0.5  # equal in half of the digits
        self._gram = gram.detach().to("cpu", torch.float64)
        self._cross_gram = cross_gram.detach().to("cpu", torch.float64)

        diagonal = self._gram.diagonal()
        # A candidate of no length: divided by infinity, its row, its slack and its weight are zero.
        self._lengths = torch.where(diagonal > 0, diagonal.sqrt(), torch.inf)
        scaled = self._cross_gram / self._lengths
        largest = float(self._cross_gram.abs().max()) if n else 0.0
        largest_scaled = float(scaled.abs().max()) if n else 0.0
        self._unit = max(largest_scaled, max(target_energy, 0.0) ** 0.5) or 1.0
        self._system = torch.empty(n, n + 1, dtype=torch.float64)  # [gram | cross_gram], scaled
        # In place: fresh pages cost more than the arithmetic.
        self._system[:, :n].copy_(self._gram).div_(self._lengths[:, None]).div_(self._lengths)
        self._system[:, n] = scaled / self._unit
        self._tolerance = tol * (largest / self._lengths).clamp(max=largest_scaled) / self._unit

        self._active = torch.empty(0, dtype=torch.int64)
        self._shares = torch.empty(0, dtype=torch.float64)  # their weights, scaled
        # Cholesky: row i is what is left of the system's row active[i] without the rows before it.
        self._rows = torch.empty(n, n + 1, dtype=torch.float64)
        self._admitted = torch.zeros(n, dtype=torch.bool)
        self._given_up: list[int] = []
        self._open = torch.ones(n, dtype=torch.bool)  # neither active nor given up
        self._iterations = 0
        self._schur = self._system.diagonal()  # of each candidate, against the active ones
        self._slack = _ZERO  # where it can be used
        self._measure(self._system[:, -1])

    def admit_all(self) -> None:
        """Let every candidate have weight, and refit."""
        self._admitted.fill_(True)
        self._start()
        self._refit()

    def admit(self, candidate: int) -> bool:
        """Let ``candidate`` have weight, and refit; returns False, without a change, if rounding hides what it adds."""
        if not self._enter(candidate):
            return False
        self._admitted[candidate] = True
        self._refit()
        return True

    def grow(self, count: int) -> list[int]:
        """Admit up to ``count`` candidates, each the :meth:`best` at its time; returns them in order.

        While no weight falls to zero, an entry does not change the entries before it. So whole runs of entries are
        formed first, with a dozen small operations for each entry, and checked afterwards.
        """
        kept: list[int] = []
        reach, patience = count, 0
        while len(kept) < count:
            if patience == 0 and not self._given_up:
                reach = min(reach, count - len(kept))
                run = self._run(reach)
                kept += run
                reach = max(2 * len(run), 4)  # one cut short costs what it looked at
                patience = 0 if run else RUN_PATIENCE
                if run:
                    continue
            patience = max(0, patience - 1)
            best = self.best()
            if best is None:
                break
            if self.admit(best):
                kept.append(best)
        return kept

    def _run(self, count: int) -> list[int]:
        """Enter up to ``count`` candidates by elimination alone, while every weight stays positive; returns them."""
        size, system, rows = len(self._active), self._system, self._rows
        slack = system[:, -1] - rows[:size, -1] @ rows[:size, :-1]
        negligible = self._tolerance.clamp(min=float(self._slack_rounding(torch.zeros(()))))
        # A candidate below rounding may be picked here; the check afterwards rejects it. Then no other was left.
        schur = torch.where(self._open & ~self._admitted, self._schur.clamp(min=self._rounding), torch.inf)
        history = torch.empty(count + 1, len(slack), dtype=torch.float64)
        history[0] = slack
        found: list[int] = []
        for number in range(count):
            slack = history[number]
            useful = slack.clamp(min=0.0)
            gains = (useful * useful).div_(schur)
            largest, order = gains.topk(min(2, len(slack)))
            values, candidate = largest.tolist(), int(order[0])
            if values[0] <= 0.0:
                break
            if len(values) > 1 and values[1] >= self._nearly * values[0]:
                candidate = self._first_of_equals(gains, useful)
            before = rows[: size + number]
            row = rows[size + number]
            torch.addmv(system[candidate], before.T, before[:, candidate], alpha=-1, out=row)
            row /= float(schur[candidate]) ** 0.5
            coordinates = row[:-1]
            schur[candidate] = torch.inf
            schur.addcmul_(coordinates, coordinates, value=-1).clamp_(min=self._rounding)
            torch.addcmul(slack, coordinates, row[-1:], value=-1, out=history[number + 1])
            found.append(candidate)
        length, refit = self._sound(found, history, negligible)
        found = found[:length]
        if not found:
            return []
        entered = torch.tensor(found)
        self._active = torch.cat([self._active, entered])
        self._admitted[entered] = True
        self._open[entered] = False
        self._iterations += length
        rows = rows[: size + length]
        self._schur = system.diagonal() - rows[:, :-1].square().sum(0)
        self._shares = self._back_substitute(rows[:, -1:])[:, 0]
        self._measure(system[:, -1] - rows[:, -1] @ rows[:, :-1])
        if refit:
            self._refit()
        return found

    def _sound(self, found: list[int], history: Tensor, negligible: Tensor) -> tuple[int, bool]:
        """The number of entries to keep from a run, and whether a refit is needed after the last of them.

        An entry is kept if all weights stay positive and its gain is above rounding, as is that of all before it. A
        refit is needed where an admitted candidate without weight has slack again.

        Args:
            found: the candidates that entered, in order, after the active ones.
            history: slack of all candidates before each entry, and after the last.
            negligible: slack that counts as zero.
        """
        if not found:
            return 0, False
        size, new = len(self._active), torch.tensor(found)
        everyone = torch.cat([self._active, new])
        upper = self._rows[: len(everyone), everyone].triu()
        inverse = torch.linalg.solve_triangular(upper, torch.eye(len(everyone), dtype=torch.float64), upper=True)
        # Column j: the weights when j + 1 candidates are active, and what the j-th is made of by those before it.
        shares = (inverse * self._rows[: len(everyone), -1]).cumsum(1)[:, size:]
        totals = shares.abs().sum(0)
        inside = torch.arange(len(everyone))[:, None] <= torch.arange(size, len(everyone))
        positive = ((shares > self._rounding * (1.0 + totals)) | ~inside).all(0)
        squared = (inverse.square().sum(0) * upper.diagonal().square())[size:]  # 1 + |coefficients|^2
        independent = upper.diagonal()[size:].square() > self._rounding * squared
        before = torch.cat([self._shares.sum()[None], totals[:-1]])
        slack = history[torch.arange(len(found)), new]
        clear = slack > torch.maximum(negligible[new], self._rounding * (1.0 + before) * squared.sqrt())
        sound = (positive & independent & clear).to(torch.uint8)
        length = len(found) if bool(sound.all()) else int(sound.argmin())
        without = self._admitted.clone()  # those that were admitted and have no weight
        without[self._active] = False
        wanting = (history[1 : length + 1, without] > negligible[without]).any(1)
        if bool(wanting.any()):
            return int(wanting.to(torch.uint8).argmax()) + 1, True
        return length, False

    def best(self) -> int | None:
        """The candidate that would lower the objective most in addition to the active ones; None if none would.

        The gain of a candidate is its slack squared over its Schur complement; only candidates that are not yet
        admitted, with both above rounding, count. When the active ones span all directions but one, every candidate
        with a part in that direction has the same gain. Among equal gains the largest slack is best: it changes the
        other weights the least, so that they stay positive. Among equal slacks it is the first.
        """
        useful = (self._slack > 0) & (self._schur > self._rounding) & ~self._admitted
        gains = torch.where(useful, self._slack.square() / self._schur, _ZERO)
        candidate = self._first_of_equals(gains, self._slack)
        return candidate if useful[candidate] else None

    def _first_of_equals(self, gains: Tensor, slack: Tensor) -> int:
        """The first candidate with the largest slack among those with the largest gain, both up to rounding."""
        slack = torch.where(gains >= self._nearly * gains.max(), slack, _ZERO)
        return int((slack >= self._nearly * slack.max()).to(torch.uint8).argmax())

    def solution(self) -> WeightSolution:
        """The weights so far, in the units of the system; ``converged`` refers to all candidates, admitted or not."""
        self._settle()
        scaled = torch.zeros_like(self._cross_gram).index_put((self._active,), self._shares)
        slack = self._system[:, -1] - self._system[:, :-1] @ scaled
        violation = slack.index_put((self._active,), slack[self._active].abs())
        coefficients = self._back_substitute(self._rows[: len(self._active), :-1])
        negligible = torch.maximum(self._tolerance, self._slack_rounding(coefficients.square().sum(0)))
        # A candidate of no length with a positive product has no best weight.
        bounded = not bool((self._lengths.isinf() & (self._cross_gram > 0)).any())
        weights = scaled * self._unit / self._lengths
        return WeightSolution(
            weights=weights,
            slack=self._cross_gram - self._gram @ weights,
            iterations=self._iterations,
            converged=bounded and bool((violation <= negligible).all()),
        )

    def _measure(self, slack: Tensor) -> None:
        """Store the ``slack`` outside of the active set, with zero where it is small enough to be negligible."""
        negligible = self._tolerance.clamp(min=float(self._slack_rounding(torch.zeros(()))))
        self._slack = torch.where((slack > negligible) & self._open, slack, _ZERO)

    def _slack_rounding(self, squared: Tensor) -> Tensor:
        """The rounding error in the slack of a candidate that stems from errors of eps in the entries of ``gram``.

        Args:
            squared: sum of the squared coefficients of the candidate among the active ones, whose weights have rounding
                errors too.
        """
        return self._rounding * (1.0 + self._shares.sum()) * (1.0 + squared).sqrt()

    def _start(self) -> None:
        """Begin with a set of candidates whose weights are all positive when they are solved for together.

        The set starts with all candidates; those without a positive weight are dropped until all weights are positive.
        Most often this is already the solution.
        """
        guess = self._lengths.isfinite().nonzero()[:, 0]
        while len(guess):
            self._iterations += 1
            block = self._system[guess]
            lower, failed = torch.linalg.cholesky_ex(block[:, guess])
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(guess), dtype=lower.dtype), upper=False)
            # Only where half of the digits are exact: in a worse system rounding could make a weight positive.
            if failed or not bool((inverse.square().sum(1) < self._rounding**-0.5).all()):
                return
            shares = inverse.T @ (inverse @ block[:, -1])
            positive = shares > self._rounding * (1.0 + shares.abs().sum())
            if bool(positive.all()):
                self._set_active(guess, shares)
                return
            guess = guess[positive]

    def _refit(self) -> None:
        for _ in range(10 * len(self._slack)):  # far more than are needed: rounding must not keep us here
            slack = torch.where(self._admitted, self._slack, _ZERO)
            candidate = int(slack.argmax())  # the first of the largest
            if not slack[candidate] > 0:
                return
            self._enter(candidate)

    def _enter(self, candidate: int) -> bool:
        """Give ``candidate`` weight; returns False if rounding hides how much.

        The slack of the active candidates stays zero: as the weight of ``candidate`` grows, theirs change by its
        coefficients among them. An active candidate whose weight reaches zero leaves, and the weight of ``candidate``
        grows further among the others.
        """
        self._iterations += 1
        active, shares = self._active, self._shares
        slack, weight = float(self._slack[candidate]), 0.0
        while True:
            column = self._rows[: len(self._active), candidate]
            coefficients = self._back_substitute(column[:, None])[:, 0]
            schur = float(self._schur[candidate])
            squared = coefficients @ coefficients
            # Entries of the Gram matrix off by eps move this by about eps (1 + |coefficients|^2).
            independent = schur > self._rounding * (1.0 + float(squared))
            if weight == 0 and slack <= float(self._slack_rounding(squared)):
                return self._give_up(candidate)
            if independent:
                step = slack / schur
                left = self._shares - step * coefficients
                if bool((left >= 0).all()):
                    break
            limits = torch.where(coefficients > 0, self._shares / coefficients, torch.inf)
            limit = float(limits.min()) if len(limits) else math.inf
            if limit == math.inf or not (independent or limit * schur <= slack):
                # Up to rounding, the objective has no minimum in this direction.
                self._set_active(active, shares)
                return self._give_up(candidate)
            leaving = int(limits.argmin())
            slack -= limit * schur
            weight += limit
            left = (self._shares - limit * coefficients).clamp(min=0.0)
            stays = torch.arange(len(limits)) != leaving
            self._set_active(self._active[stays], left[stays], unchanged=leaving)
        self._append(candidate, weight + step, left, column)
        if weight > 0:
            self._settle()
        return True

    def _give_up(self, candidate: int) -> bool:
        """Ignore ``candidate`` until another one enters; returns False."""
        self._given_up.append(candidate)
        self._open[candidate] = False
        self._slack[candidate] = 0.0
        return False

    def _append(self, candidate: int, weight: float, others: Tensor, column: Tensor) -> None:
        """Add ``candidate`` to the active set, with one further step of the elimination."""
        size = len(self._active)
        schur = self._schur[candidate]
        row = self._rows[size]
        torch.addmv(self._system[candidate], self._rows[:size].T, column, alpha=-1, out=row)
        row /= schur.sqrt()
        self._active = torch.cat([self._active, torch.tensor([candidate])])
        self._shares = torch.cat([others, torch.tensor([weight], dtype=torch.float64)])
        if self._given_up:
            self._open[self._given_up] = True
            self._given_up = []
        self._open[candidate] = False
        self._schur = self._schur - row[:-1].square()
        rows = self._rows[: size + 1]
        self._measure(self._system[:, -1] - rows[:, -1] @ rows[:, :-1])

    def _set_active(self, active: Tensor, shares: Tensor, *, unchanged: int = 0) -> None:
        """Make ``active`` the active set; the rows of its first ``unchanged`` candidates stay valid."""
        self._open[self._active] = True
        self._open[active] = False
        self._active, self._shares = active, shares
        self._eliminate(unchanged)

    def _eliminate(self, unchanged: int = 0) -> None:
        """Form the rows of the active set after the first ``unchanged`` ones, then Schur complements and slack."""
        size = len(self._active)
        head, new = self._rows[:unchanged], self._active[unchanged:]
        block = self._system[new] - head[:, new].T @ head
        # Schur complements only grow when candidates leave: what was above rounding stays positive definite.
        lower = torch.linalg.cholesky(block[:, new])
        rows = self._rows[unchanged:size]
        torch.linalg.solve_triangular(lower, block, upper=False, out=rows)
        rows[:, new] = lower.T  # equal but for rounding, without which the weights solve the active system
        rows = self._rows[:size]
        self._schur = self._system.diagonal() - rows[:, :-1].square().sum(0)
        self._measure(self._system[:, -1] - rows[:, -1] @ rows[:, :-1])

    def _settle(self) -> None:
        """Compute the weights of the active candidates anew from their rows, without the rounding of earlier steps.

        Candidates whose weight was positive only by that rounding leave.
        """
        while len(self._active):
            rows, block = self._rows[: len(self._active)], self._system[self._active]
            shares = self._back_substitute(rows[:, -1:])[:, 0]
            # One step of refinement: opposed candidates have large weights, and so large errors.
            missing = block[:, -1] - block[:, self._active] @ shares
            shares += torch.cholesky_solve(missing[:, None], rows[:, self._active], upper=True)[:, 0]
            positive = shares > 0
            if bool(positive.all()):
                self._shares = shares
                break
            self._set_active(self._active[positive], shares[positive], unchanged=int(positive.int().argmin()))

    def _back_substitute(self, columns: Tensor) -> Tensor:
        """The solution of ``upper @ solution = columns``, with the Cholesky factor ``upper`` of the active block."""
        upper = self._rows[: len(self._active), self._active]
        solution: Tensor = torch.linalg.solve_triangular(upper, columns, upper=True)
        return solution


def _check_system(gram: Tensor, cross_gram: Tensor, tol: float) -> None:
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
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} must be finite, got {int((~tensor.isfinite()).sum())} entries that are not. "
                "Leave out candidates whose gradient is not finite."
            )
    if not 0.0 < tol < 1.0:
        raise ValueError(f"tol must be in (0, 1), got {tol}. Choose one near 1e-10.")
