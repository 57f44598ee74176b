"""The arms of the comparison, and their runs: the same candidates for each, from the same weights."""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ftw_optim import (
    GreedyFilter,
    KeepAll,
    NonNegativeLeastSquares,
    SelectiveOptimizer,
    TargetGradient,
    last_blocks,
    token_losses,
)

from .records import Batch, Example, collate, endless_batches

_EVALUATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all arms have in common.

    Attributes:
        candidates: records that the stream offers at every step, ``n``.
        keep: how many of them the arm that keeps ``k`` keeps, and the random one takes.
        target_batch: target examples of one target gradient.
        anchor: strength that pulls the weights of all candidates towards uniform ones.
        refresh_every: steps between two target gradients of the arm that keeps all.
        device: where the model lies.
    """

    candidates: int
    keep: int
    target_batch: int
    anchor: float
    refresh_every: int
    device: str


class Picks(NamedTuple):
    """The picks of one selective step: each source's share of the weight, and the cosine to the target."""

    shares: dict[str, float]
    cosine: float


Step = Callable[[list[Example]], Picks | None]


class Start(NamedTuple):
    """The start of an arm; ``model`` is its own copy."""

    model: nn.Module
    lr: float
    target: list[Example]
    options: Options
    seed: int

    def adamw(self) -> torch.optim.AdamW:
        """The optimizer of every arm."""
        trainable = [param for param in self.model.parameters() if param.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.lr)

    def losses(self, examples: Sequence[Example]) -> Tensor:
        """Mean token loss of each example."""
        return token_losses(self.model, collate(examples, device=self.options.device))

    def target_losses(self) -> Callable[[], Tensor]:
        """Closure over the losses of the next target examples."""
        batches = endless_batches(self.target, self.options.target_batch, seed=self.seed)
        return lambda: self.losses(next(batches))


def _plain(start: Start, choose: Callable[[list[Example]], list[Example]]) -> Step:
    optimizer = start.adamw()

    def step(candidates: list[Example]) -> None:
        optimizer.zero_grad()
        start.losses(choose(candidates)).mean().backward()
        optimizer.step()

    return step


def _random_k(start: Start) -> Step:
    generator = random.Random(start.seed)
    return _plain(start, lambda candidates: generator.sample(candidates, start.options.keep))


def _all_n(start: Start) -> Step:
    return _plain(start, lambda candidates: candidates)


def _target_alone(start: Start) -> Step:
    batches = endless_batches(start.target, start.options.candidates, seed=start.seed)
    return _plain(start, lambda candidates: next(batches))


def _selective(start: Start, optimizer: SelectiveOptimizer) -> Step:
    def step(candidates: list[Example]) -> Picks:
        optimizer.step(lambda: start.losses(candidates))
        selection = optimizer.selection
        shares: Counter[str] = Counter()
        for index, weight in zip(selection.kept.tolist(), selection.weights.tolist(), strict=True):
            shares[candidates[index].source] += weight
        total = sum(shares.values()) or 1.0  # all weights are zero in a skipped step
        return Picks({source: share / total for source, share in shares.items()}, float(selection.cosine))

    return step


def _keep_k(start: Start) -> Step:
    optimizer = SelectiveOptimizer(
        start.adamw(),
        start.model,
        target=start.target_losses(),
        filter=GreedyFilter(keep=start.options.keep),
        seed=start.seed,
    )
    return _selective(start, optimizer)


def _tilt_all(start: Start) -> Step:
    optimizer = SelectiveOptimizer(
        start.adamw(),
        start.model,
        target=TargetGradient(start.target_losses(), refresh_every=start.options.refresh_every),
        filter=KeepAll(),
        weight=NonNegativeLeastSquares(anchor=start.options.anchor),
        combine="graph",
        scored=last_blocks(start.model, 1),
        seed=start.seed,
    )
    return _selective(start, optimizer)


class Arm(NamedTuple):
    """One way to train; ``per_step`` counts the gradients it takes, of candidates and of target examples."""

    label: str
    begin: Callable[[Start], Step]
    per_step: Callable[[Options], tuple[float, float]]


ARMS = {
    "random_k": Arm("AdamW, random k", _random_k, lambda options: (options.keep, 0)),
    "all_n": Arm("AdamW, all n", _all_n, lambda options: (options.candidates, 0)),
    "target_alone": Arm("AdamW, target alone", _target_alone, lambda options: (0, options.candidates)),
    "keep_k": Arm("Selective, keep k", _keep_k, lambda options: (options.candidates, options.target_batch)),
    "tilt_all": Arm(
        "Selective, tilt all n",
        _tilt_all,
        lambda options: (options.candidates, options.target_batch / options.refresh_every),
    ),
}


@dataclass(kw_only=True)
class Run:
    """One arm at one learning rate and seed, and what came of it.

    Attributes:
        steps: when it was evaluated; 0 is before the first step.
        losses: the mean loss of the evaluation examples then.
        seconds: training time until then, evaluation excluded.
        picks: what each step selected; empty for an arm that does not.
    """

    arm: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    picks: list[Picks] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The start and the data of every run: the weights, the candidates of each step, and the target.

    ``evaluation`` is what its loss is taken on, at the steps in ``evaluated_at``.
    """

    model: nn.Module
    stream: list[list[Example]]
    target: list[Example]
    evaluation: list[Example]
    evaluated_at: Sequence[int]
    options: Options

    def perform(self, runs: Sequence[Run], progress: tqdm) -> None:
        """Fills in all runs, step by step in turn, so that a disturbance of the machine hits them alike."""
        in_progress = [self._advance(run) for run in runs]
        for _ in range(len(self.stream) + 1):
            for advance in in_progress:
                next(advance)
                progress.update()

    def _advance(self, run: Run) -> Iterator[None]:
        """One evaluation of the start, then one step with each ``next``."""
        model = copy.deepcopy(self.model)
        step = ARMS[run.arm].begin(Start(model, run.lr, self.target, self.options, run.seed))
        batches = evaluation_batches(self.evaluation, self.options.device)
        seconds = 0.0
        for count in range(len(self.stream) + 1):
            if count > 0:
                start = _now(self.options.device)
                picks = step(self.stream[count - 1])
                seconds += _now(self.options.device) - start
                if picks is not None:
                    run.picks.append(picks)
            if count in self.evaluated_at:
                run.steps.append(count)
                run.losses.append(mean_loss(model, batches))
                run.seconds.append(seconds)
            yield


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)  # a step is over when the device is
    return time.perf_counter()


def evaluation_batches(examples: Sequence[Example], device: str) -> list[Batch]:
    """All examples in batches of like length, which need the least padding."""
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    return [
        collate(by_length[start : start + _EVALUATION_BATCH], device=device)
        for start in range(0, len(by_length), _EVALUATION_BATCH)
    ]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean over the examples of their mean token loss, the quantity that training minimises."""
    return float(torch.cat([token_losses(model, batch) for batch in batches]).mean())
