"""What selection cost and saved, in seconds, beside plain steps over the same candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from ftw_optim.selection_log._log import LoggedRun

PHASES = ("target", "candidates", "gram", "exchange", "solve", "combine")
"""Phases of a selection, in their order."""
BACKWARD_SHARE = 1.5
"""The time of a plain step in backward passes: a forward pass takes about half of one."""


@final
@dataclass(kw_only=True)
class Cost:
    """Sums over the steps of a run whose times are known; :meth:`add` adds one.

    The seconds of the phases are measured, as the host sees them. The seconds of plain steps are an estimate from them:
    a plain step over the same candidates takes one forward and one backward pass, which nobody ran.

    - ``combine="factors"``: the pass over the candidates, and the gradient that was summed from it;
    - ``"graph"``: 1.5 times the weighted backward pass over all candidates, at most all that was run for them;
    - ``"rerun"``: the second pass over the kept ones, in proportion to all.

    Where nothing was combined, it is the pass over the candidates.

    Attributes:
        steps: number of steps.
        candidates: number of candidates.
        seconds: measured seconds by phase.
        plain: estimated seconds of plain steps.
        passed_over: records that a proposal read and passed over, which no pass was made for.
    """

    steps: int = 0
    candidates: int = 0
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    plain: float = 0.0
    passed_over: int = 0

    def add(self, milliseconds: Mapping[str, float | None], *, combine: str, offered: int, kept: int) -> None:
        """Add a step.

        Args:
            milliseconds: of each phase; others than these of a selection are left out, and a step with none.
            combine: the way the combined gradient was formed.
            offered: number of candidates.
            kept: number of candidates with a weight.
        """
        spent = {phase: (milliseconds.get(phase) or 0.0) / 1e3 for phase in PHASES if phase in milliseconds}
        if not spent:
            return
        self.steps, self.candidates = self.steps + 1, self.candidates + offered
        for phase, seconds in spent.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        own, combining = spent.get("candidates", 0.0), spent.get("combine", 0.0)
        plain = own + combining
        if combine == "graph" and combining:
            plain = min(plain, BACKWARD_SHARE * combining)
        elif combine == "rerun" and combining and kept:
            plain = combining * offered / kept
        self.plain += plain

    @property
    def total(self) -> float:
        """The measured seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def extra(self) -> float:
        """The seconds beside those of plain steps over the same candidates; below zero where it took less."""
        return self.total - self.plain

    @property
    def saved(self) -> float:
        """The estimated seconds that records which were passed over would have taken in plain steps."""
        return self.passed_over * self.plain / self.candidates if self.candidates else 0.0

    def numbers(self) -> dict[str, float]:
        """The seconds for a logger; none where no time is known."""
        if not self.steps:
            return {}
        found = {"seconds": self.total, "plain_seconds": self.plain, "cost_seconds": self.extra}
        return found | ({"saved_seconds": self.saved} if self.passed_over else {})

    def __str__(self) -> str:
        return " ".join(self.sentences())

    def sentences(self) -> list[str]:
        """What is measured and what is estimated, in words."""
        if not self.steps:
            return ["No time of a selection is known."]
        phases = ", ".join(f"{phase} {_seconds(self.seconds[phase])}" for phase in PHASES if phase in self.seconds)
        found = [
            f"Measured: {self.steps:,} steps with {self.candidates:,} candidates took {_seconds(self.total)} in the "
            f"optimizer ({phases}).",
            f"Estimated: plain steps over the same candidates would have taken {_seconds(self.plain)}.",
        ]
        if self.extra > 0.0 and self.plain > 0.0:
            found.append(
                f"So selection cost {_seconds(self.extra)}, as much as {self.extra / self.plain * self.steps:,.1f} "
                "plain steps; it pays where it saves more steps than that."
            )
        elif self.plain > 0.0:
            found.append(f"So selection cost nothing: it took {_seconds(-self.extra)} less.")
        if self.passed_over:
            found.append(
                f"Saved, estimated: {self.passed_over:,} records were read and passed over by the proposal; plain "
                f"steps over them would have taken {_seconds(self.saved)}."
            )
        else:
            found.append("No record is known to have been passed over by a proposal, so no pass over one was saved.")
        return found


def cost_of(run: LoggedRun) -> Cost:
    """The cost of the selections of a log.

    The number of records that were passed over is that of the metric ``passed_over``, which counts up, and anew in each
    epoch.
    """
    found = Cost()
    before = 0
    for row in run.steps:
        spent = {name.removeprefix("ms_"): value for name, value in row["ms"].items() if name.startswith("ms_")}
        found.add(spent, combine=row["combine"], offered=row["offered"], kept=row["kept"])
        if (now := row["metrics"].get("passed_over")) is not None:
            found.passed_over += int(now) - (before if now >= before else 0)
            before = int(now)
    return found


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if abs(seconds) >= 100 else f"{seconds:.3g} s"
