"""Runs of arms, one after the other, on one model: their evaluations and their clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from .arms import ARMS, Sizes
from .proposals import Known
from .records import Example
from .runs import Run
from .setting import Setting
from .split import Entrance, Rows, Top
from .step import Step, now

_EVALUATION_BATCH = 32
_PACE_ROWS = 4


class Lab:
    """The model, the records and the clock, shared by all runs of a comparison, one after the other.

    Attributes:
        keep_states: whether the trunk's hidden states of the stream's records are kept for later runs.
        score: called at the end of each run, with the model trained.
    """

    keep_states: bool = True
    score: Callable[[], list[float]] | None = None

    def __init__(self, top: Top, setting: Setting, sizes: Sizes, *, evaluations: int) -> None:
        self.top = top
        self.setting = setting
        self.sizes = sizes
        self.evaluations = evaluations
        self.entrance = Entrance(top)
        self._batches: dict[str, tuple[list[Rows], list[int]]] = {}
        self._own_examples: list[Example] | None = None

    def zero_shot(self) -> dict[str, list[float]]:
        """The losses before any step: LoRA starts without effect, so they are those of every arm and seed."""
        self.top.reset(0)
        return {name: self.losses(name) for name in ("test", "validation", "pool_test")}

    def losses(self, split: str) -> list[float]:
        """The present loss of each row of a split, in its order."""
        return self.losses_and_hits(split)[0]

    def losses_and_hits(self, split: str) -> tuple[list[float], list[float]]:
        """The present loss of each row of a split, in its order; and 1 where greedy decoding gives its response."""
        if split not in self._batches:
            examples: Sequence[Example] = getattr(self.setting, split)
            order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
            chunks = [order[at : at + _EVALUATION_BATCH] for at in range(0, len(order), _EVALUATION_BATCH)]
            batches = []
            for chunk in chunks:
                rows = [examples[index] for index in chunk]
                self.entrance.fill(rows)
                batches.append(self.entrance.rows(rows))
            self._batches[split] = batches, order
        batches, order = self._batches[split]
        place = torch.tensor(order).argsort()
        losses, hits = zip(*(self.top.evaluate_with_hits(rows) for rows in batches), strict=True)
        return torch.cat(losses)[place].tolist(), torch.cat(hits)[place].double().tolist()

    def pace(self) -> float:
        """Seconds of a forward and backward pass of the trained part on a few fixed rows."""
        examples = (list(self.setting.pool_test) * _PACE_ROWS)[:_PACE_ROWS]
        self.entrance.fill(examples)
        rows = self.entrance.rows(examples)
        start = now(self.top.device)
        torch.autograd.grad(self.top(rows).mean(), self.top.adapters())
        return now(self.top.device) - start

    def calibration(self, repeats: int = 5) -> dict[str, float]:
        """Seconds of the trunk for one token, in batches as large as a step's, and the pace beside them."""
        examples = (list(self.setting.pool_test) * self.sizes.candidates)[: self.sizes.candidates]
        tokens = sum(len(example.tokens) for example in examples)
        taken, paces = [], []
        for _ in range(repeats + 1):
            start = now(self.top.device)
            self.entrance.run(examples)
            taken.append(now(self.top.device) - start)
            paces.append(self.pace())
        # The first of each meets cold caches.
        return {"trunk_seconds_per_token": median(taken[1:]) / tokens, "pace": median(paces[1:])}

    def perform(self, run: Run, stream: Sequence[Sequence[Example]], tick: Callable[[], object]) -> None:
        """Fill in a run; ``tick`` is called after each step."""
        arm, top = ARMS[run.arm.split(":")[0]], self.top
        top.reset(run.seed)
        known = Known(
            embeddings=top.trunk.embed_tokens.weight.detach(),
            guide=self.setting.guide,
            own_source=self._own(),
            seed=run.seed,
        )
        step = Step(arm, run, known, top=top, entrance=self.entrance, setting=self.setting, sizes=self.sizes)
        evaluated_at = {round(run.steps * part / self.evaluations) for part in range(1, self.evaluations + 1)}
        run.paces.append(self.pace())
        seconds, tokens, candidates, targets = 0.0, 0, 0, 0
        for number in range(1, run.steps + 1):
            done = step(stream[number - 1])
            seconds += done.seconds
            tokens += sum(len(example.tokens) for example in [*done.candidates, *done.targets])
            candidates += len(done.candidates)
            targets += len(done.targets)
            total = float(done.weights.sum()) or 1.0  # a skipped step, or one without candidates
            for example, weight in zip(done.candidates, done.weights.tolist(), strict=True):
                of_source = run.sources.setdefault(example.source, [0, 0.0])
                of_source[0] += 1
                of_source[1] += weight / total
            if number in evaluated_at:
                run.at.append(number)
                losses, run.exact = self.losses_and_hits("test")
                run.test.append(losses)
                run.validation.append(sum(self.losses("validation")) / len(self.setting.validation))
                run.seconds.append(seconds)
                run.run_tokens.append(tokens)
                run.rows.append((candidates, targets))
                run.paces.append(self.pace())
            if not self.keep_states:
                self.entrance.forget()
            tick()
        run.pool = self.losses("pool_test")
        run.scores = [] if self.score is None else self.score()

    def _own(self) -> list[Example]:
        if self._own_examples is None:
            self._own_examples = self.setting.own_examples()
        return self._own_examples
