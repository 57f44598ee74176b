"""One step of a run: its candidates, its target rows, its selection, and its clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ftw_optim import FilterStage, SelectiveOptimizer, TargetGradient, WeightStage
from ftw_optim.proposals import FilterUnless, WeightUnless

from .arms import Arm, Method, Sizes
from .proposals import Known
from .records import Example, endless_batches
from .runs import Run
from .setting import Setting
from .split import Entrance, Top
from .weights import Expecting

WARM_UP_SHARE = 0.1
HELD_OUT_EVERY = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """What one step ran: its candidates, their weights in the update, its target rows, and its seconds."""

    candidates: list[Example]
    weights: Tensor
    targets: list[Example]
    seconds: float


class Step:
    """The steps of one run: propose, form the losses, select where the arm does, and apply."""

    def __init__(
        self, arm: Arm, run: Run, known: Known, *, top: Top, entrance: Entrance, setting: Setting, sizes: Sizes
    ) -> None:
        self._arm, self._run = arm, run
        self._top, self._entrance, self._sizes = top, entrance, sizes
        self._chooser = arm.propose(known)
        inner = torch.optim.AdamW(top.adapters(), lr=run.lr)
        self._schedule = LambdaLR(inner, lambda step: rate(step, run.steps))
        self._targets: list[Example] = []  # of the step, trained on or not
        self._guides: list[Example] = []  # those that only guide, where others are part of the step
        self._step = 0
        self._late_from = round(arm.target_after * run.steps)
        self._optimizer = inner
        method, count = arm.method, arm.trained_target_rows(self._sizes)
        if method is not None and method.watched:
            entrance.fill(setting.validation)
        guides = round(method.guide_share * len(known.guide)) if method is not None else 0
        if method is not None:
            count = count or self._sizes.target_rows
            guiding = (lambda: self._guides) if guides else (lambda: self._targets)
            options = {**method.options, **({"train_on_target": True} if self._late_from else {})}
            options |= {} if method.scored is None else {"scored": method.scored(top)}
            options |= {"train_on_target": self._losses(lambda: self._targets)} if guides else {}
            self._optimizer = SelectiveOptimizer(
                inner,
                top,
                target=TargetGradient(
                    self._losses(guiding),
                    decay=method.decay,
                    refresh_every=method.refresh_every * self._groups(method),
                    held_out=self._losses(lambda: setting.validation) if method.watched else None,
                    held_out_every=HELD_OUT_EVERY,
                    until=self._late_from or None,
                ),
                filter=self._filter(method, self._sizes.keep, run.lr),
                weight=self._weight(method),
                metric=method.metric,
                seed=run.seed,
                **options,
            )
        self._target_batches = endless_batches(known.guide[guides:], count, seed=run.seed) if count else None
        self._guide_batches = endless_batches(known.guide[:guides], count, seed=run.seed) if guides else None

    def _filter(self, method: Method, keep: int, lr: float) -> FilterStage:
        found = method.filter(keep, lr)
        return FilterUnless(condition=self._chooser.trusted, filter=found) if method.unless_trusted else found

    def _weight(self, method: Method) -> WeightStage:
        found = copy.copy(method.weight)
        return WeightUnless(condition=self._chooser.trusted, weight=found) if method.unless_trusted else found

    def _groups(self, method: Method) -> int:
        """The number of selections of a step."""
        return max(1, self._sizes.candidates // method.group) if method.group else 1

    def _losses(self, rows: Callable[[], Sequence[Example]]) -> Callable[[], Tensor]:
        return lambda: self._top(self._entrance.rows(rows()))

    def __call__(self, read: Sequence[Example]) -> Done:
        arm = self._arm
        start = now(self._top.device)
        late = self._step >= self._late_from
        plain = arm.method is None or self._is_plain(arm.method)
        guiding = not plain and self._step % arm.method.refresh_every == 0
        trained = late and arm.trained_target_rows(self._sizes) > 0
        run_targets = self._target_batches is not None and (trained or guiding)
        instead = 0 if run_targets or self._target_batches is None else arm.trained_target_rows(self._sizes)
        candidates = self._chooser.choose(read, arm.rows(self._sizes) + instead)
        seconds = now(self._top.device) - start
        self._targets = next(self._target_batches) if run_targets else []
        asked = self._guide_batches is not None and self._step % arm.method.refresh_every == 0
        self._guides = next(self._guide_batches) if asked else []
        self._step += 1
        # The trunk runs where a record is new; every arm is charged for it by the token whenever the record is used.
        self._entrance.fill([*candidates, *self._targets, *self._guides])
        start = now(self._top.device)
        weights = self._uniform(candidates) if plain else self._selective(candidates)
        self._schedule.step()
        seconds += now(self._top.device) - start
        targets = [*self._targets, *self._guides]
        return Done(candidates=candidates, weights=weights, targets=targets, seconds=seconds)

    def _is_plain(self, method: Method) -> bool:
        """Whether this is a step between two selections, while the proposal is trusted."""
        trusted = self._chooser.trusted
        return method.trusted_every > 1 and trusted is not None and trusted() and self._step % method.trusted_every > 0

    def _uniform(self, candidates: list[Example]) -> Tensor:
        rows = [*candidates, *self._targets]
        self._optimizer.zero_grad()
        weights = _counts(rows, by_token=self._arm.by_token)
        weights /= weights.sum()
        losses = self._top(self._entrance.rows(rows))
        (losses @ weights.to(losses)).backward()
        self._optimizer.step()
        return weights[: len(candidates)]

    def _selective(self, candidates: list[Example]) -> Tensor:
        optimizer, method = self._optimizer, self._arm.method
        groups = self._groups(method)
        optimizer.filter = self._filter(method, max(1, self._sizes.keep // groups), self._schedule.get_last_lr()[0])
        counts = _counts(candidates, by_token=method.by_token)
        counts /= counts.mean()
        if groups > 1:
            return self._in_groups(candidates, counts, groups)
        for stage in (optimizer.filter, optimizer.weight):
            if isinstance(stage, Expecting):
                stage.scores = self._chooser.expected()
        rows = self._entrance.rows(candidates)
        optimizer.step(lambda: self._top(rows) * counts.to(rows["inputs_embeds"]))
        selection = optimizer.selection
        if self._chooser.observe is not None:
            self._chooser.observe(candidates, selection)
        self._run.cosines.append(float(selection.cosine))
        return selection.spread_weights() * counts

    def _in_groups(self, candidates: list[Example], counts: Tensor, groups: int) -> Tensor:
        """A step on the mean of selections, each among neighbours of its own; the target is that of all of them."""
        optimizer, weights = self._optimizer, []
        optimizer.zero_grad()
        for start in range(groups):
            group = slice(start * len(candidates) // groups, (start + 1) * len(candidates) // groups)
            rows = self._entrance.rows(candidates[group])
            factors = counts[group].to(rows["inputs_embeds"])
            optimizer.backward(lambda rows=rows, factors=factors: self._top(rows) * factors, grad_scale=1 / groups)
            weights.append(optimizer.selection.spread_weights() * counts[group] / groups)
            self._run.cosines.append(float(optimizer.selection.cosine))
        optimizer.step()
        return torch.cat(weights)


def _counts(rows: Sequence[Example], *, by_token: bool) -> Tensor:
    """How much each row counts, float64: its response tokens, or all rows alike."""
    return torch.tensor([row.response_length if by_token else 1 for row in rows], dtype=torch.float64)


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
