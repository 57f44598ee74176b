"""What came of one run of one arm."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Run:
    """One arm with one budget, learning rate and seed, and what came of it.

    Attributes:
        steps: the budget; the learning rate has decayed to zero at its end.
        at: the steps after which it was evaluated.
        test: loss of each test row then.
        exact: of each test row, 1 where greedy decoding gave its response at the last evaluation, else 0; empty in runs
            made before this was looked at.
        validation: mean loss of the validation rows then.
        pool: loss of each held-out pool row at the end.
        seconds: seconds of the steps until then, the trunk's excluded.
        run_tokens: tokens that entered the trunk until then, each record counted whenever it took part in a step.
        rows: candidates and target rows that took part until then.
        paces: seconds of a fixed small step of the trained part, measured at the start and at each evaluation.
        sources: of the candidates; of each, how many there were, and their weight in all steps, that of a step's
            candidates being one in all.
        cosines: the selection's, at each step; empty without selection.
        scores: what :attr:`Lab.score` gave at the end, if there is one.
    """

    arm: str
    steps: int
    lr: float
    seed: int
    at: list[int] = field(default_factory=list)
    test: list[list[float]] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    pool: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    run_tokens: list[int] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    sources: dict[str, list[float]] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A name that no other run of a comparison has."""
        return f"{self.arm}-{self.steps}steps-lr{self.lr:g}-seed{self.seed}"
