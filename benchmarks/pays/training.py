"""One run of one arm: its steps, its clock and its evaluations."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ftw_optim import SelectiveOptimizer, TargetGradient

from .arms import ARMS, Arm, Sizes
from .proposals import Known
from .records import Example, endless_batches
from .setting import Setting
from .split import Entrance, Rows, Top
from .weights import Expecting

WARM_UP_SHARE = 0.1
HELD_OUT_EVERY = 3
_EVALUATION_BATCH = 32
_PACE_ROWS = 4


@dataclass(kw_only=True)
class Run:
    """One arm with one budget, learning rate and seed, and what came of it.

    Attributes:
        steps: the budget; the learning rate has decayed to zero at its end.
        at: the steps after which it was evaluated.
        test: loss of each test row then.
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
        found = torch.cat([self.top.evaluate(rows) for rows in batches]).tolist()
        return [loss for _, loss in sorted(zip(order, found, strict=True))]

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
        step = _Step(arm, self, run, known)
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
                run.test.append(self.losses("test"))
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Done:
    """What one step ran: its candidates, their weights in the update, its target rows, and its seconds."""

    candidates: list[Example]
    weights: Tensor
    targets: list[Example]
    seconds: float


class _Step:
    """The steps of one run: propose, form the losses, select where the arm does, and apply."""

    def __init__(self, arm: Arm, lab: Lab, run: Run, known: Known) -> None:
        self._arm, self._lab, self._run = arm, lab, run
        self._sizes = lab.sizes
        self._chooser = arm.propose(known)
        inner = torch.optim.AdamW(lab.top.adapters(), lr=run.lr)
        self._schedule = LambdaLR(inner, lambda step: rate(step, run.steps))
        self._targets: list[Example] = []  # of the step, trained on or not
        self._guides: list[Example] = []  # those that only guide, where others are part of the step
        self._step = 0
        self._late_from = round(arm.target_after * run.steps)
        self._optimizer = inner
        method, count = arm.method, arm.trained_target_rows(self._sizes)
        if method is not None and method.watched:
            lab.entrance.fill(lab.setting.validation)
        guides = round(method.guide_share * len(known.guide)) if method is not None else 0
        if method is not None:
            count = count or self._sizes.target_rows
            guiding = (lambda: self._guides) if guides else (lambda: self._targets)
            options = {**method.options, **({"train_on_target": True} if self._late_from else {})}
            options |= {"train_on_target": self._losses(lambda: self._targets)} if guides else {}
            self._optimizer = SelectiveOptimizer(
                inner,
                lab.top,
                target=TargetGradient(
                    self._losses(guiding),
                    decay=method.decay,
                    refresh_every=method.refresh_every,
                    held_out=self._losses(lambda: lab.setting.validation) if method.watched else None,
                    held_out_every=HELD_OUT_EVERY,
                    until=self._late_from or None,
                ),
                filter=method.filter(self._sizes.keep, run.lr),
                weight=copy.copy(method.weight),
                metric=method.metric,
                seed=run.seed,
                **options,
            )
        self._target_batches = endless_batches(known.guide[guides:], count, seed=run.seed) if count else None
        self._guide_batches = endless_batches(known.guide[:guides], count, seed=run.seed) if guides else None

    def _losses(self, rows: Callable[[], Sequence[Example]]) -> Callable[[], Tensor]:
        return lambda: self._lab.top(self._lab.entrance.rows(rows()))

    def __call__(self, read: Sequence[Example]) -> _Done:
        lab, arm = self._lab, self._arm
        start = now(lab.top.device)
        late = self._step >= self._late_from
        guiding = arm.method is not None and (not self._late_from or self._step % arm.method.refresh_every == 0)
        run_targets = self._target_batches is not None and (late or guiding)
        instead = 0 if run_targets or self._target_batches is None else arm.trained_target_rows(self._sizes)
        candidates = self._chooser.choose(read, arm.rows(self._sizes) + instead)
        seconds = now(lab.top.device) - start
        self._targets = next(self._target_batches) if run_targets else []
        asked = self._guide_batches is not None and self._step % arm.method.refresh_every == 0
        self._guides = next(self._guide_batches) if asked else []
        self._step += 1
        # The trunk runs where a record is new; every arm is charged for it by the token whenever the record is used.
        lab.entrance.fill([*candidates, *self._targets, *self._guides])
        start = now(lab.top.device)
        weights = self._uniform(candidates) if arm.method is None else self._selective(candidates)
        self._schedule.step()
        seconds += now(lab.top.device) - start
        targets = [*self._targets, *self._guides]
        return _Done(candidates=candidates, weights=weights, targets=targets, seconds=seconds)

    def _uniform(self, candidates: list[Example]) -> Tensor:
        lab = self._lab
        rows = [*candidates, *self._targets]
        self._optimizer.zero_grad()
        lab.top(lab.entrance.rows(rows)).mean().backward()
        self._optimizer.step()
        return torch.full((len(candidates),), 1 / len(rows), dtype=torch.float64)

    def _selective(self, candidates: list[Example]) -> Tensor:
        lab, optimizer, method = self._lab, self._optimizer, self._arm.method
        optimizer.filter = method.filter(self._sizes.keep, self._schedule.get_last_lr()[0])
        for stage in (optimizer.filter, optimizer.weight):
            if isinstance(stage, Expecting):
                stage.scores = self._chooser.expected()
        rows = lab.entrance.rows(candidates)
        optimizer.step(lambda: lab.top(rows))
        selection = optimizer.selection
        if self._chooser.observe is not None:
            self._chooser.observe(candidates, selection)
        self._run.cosines.append(float(selection.cosine))
        return selection.spread_weights()


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, relative to its peak: linear up, then linear to the budget's end."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    return min((step + 1) / warm_up, max(0, steps - step) / max(1, steps - warm_up + 1))


def now(device: torch.device) -> float:
    """Seconds: of this process on the CPU, which others do not lengthen; of the wall once an accelerator is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
