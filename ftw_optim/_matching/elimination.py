"""The linear algebra behind the active set, as an interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ftw_optim._matching.scaled_system import ScaledSystem


class Elimination(ABC):
    """What the active candidates leave of a scaled system: a Cholesky decomposition that grows by one row for each.

    A candidate that is not active has a slack left, its product with what the target still lacks, and a Schur
    complement, the squared length of its part that is orthogonal to the active ones. Those of active candidates have no
    meaning. The forms of this interface differ in how quick they are and in rounding, in nothing else: all rules are in
    :class:`ActiveSet`.

    Args:
        system: the system, with nothing eliminated yet.

    Attributes:
        active: the eliminated candidates, in order.
    """

    def __init__(self, system: ScaledSystem) -> None:
        self.active: list[int] = []
        self._rounding = system.rounding
        self._tolerance = system.tolerance

    @abstractmethod
    def append(self, candidate: int) -> None:
        """Eliminate one more ``candidate``; its Schur complement must be positive."""

    @abstractmethod
    def replace(self, active: list[int], *, unchanged: int = 0) -> bool:
        """Eliminate ``active`` in place of the active ones, of which the first ``unchanged`` stay where they are.

        Returns:
            False if rounding leaves one of them no length: then nothing but a further ``replace`` may follow.
        """

    @abstractmethod
    def slack(self, candidates: Sequence[int]) -> list[float]:
        """The slack of ``candidates``."""

    @abstractmethod
    def left_of(self, candidate: int) -> tuple[float, float]:
        """The slack and the Schur complement of ``candidate``."""

    @abstractmethod
    def coefficients(self, candidate: int) -> list[float]:
        """The coefficients of ``candidate`` among the active ones."""

    @abstractmethod
    def growth(self) -> float:
        """The largest factor by which the inverse enlarges rounding errors.

        Of an active candidate it is ``(1 + |coefficients|^2) / schur``, both against the active ones before it.
        """

    @abstractmethod
    def solve(self, *, refined: bool) -> list[float]:
        """The weights of the active candidates that leave them no slack, with or without one step of refinement."""

    @abstractmethod
    def slack_beside(self, weights: list[float]) -> list[float]:
        """The slack of all candidates beside these ``weights`` of the active ones, from the system itself."""

    @abstractmethod
    def offer(self, candidate: int, *, offered: bool) -> None:
        """Let :meth:`foremost` look at ``candidate``, or not; at first it looks at all."""

    @abstractmethod
    def foremost(self, least: float, nearly: float) -> list[int]:
        """The offered candidates of largest gain, which is the slack squared over the Schur complement.

        Args:
            least: slack that does not exceed this, or the candidate's tolerance, counts as none; nor do Schur
                complements of the size of rounding.
            nearly: share of the largest gain from which on gains count as equal to it.

        Returns:
            Their indices, in order; empty where no candidate has a gain.
        """
