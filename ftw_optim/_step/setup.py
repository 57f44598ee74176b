"""The inputs of one step: the optimizer's options, and what belongs to this step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._capture.plan import CapturePlan
from ftw_optim._capture.sample_ids import GivenIds
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._capture.structure import Structure
from ftw_optim._factors.buffer import Buffer
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import Sketch
from ftw_optim._gram.spec import Observe
from ftw_optim._ranks.ranks import Ranks
from ftw_optim._ranks.wrapping import without_own_sums
from ftw_optim._step.clock import Clock
from ftw_optim._step.parameters import StepParameters
from ftw_optim._step.seen_pass import SeenPass
from ftw_optim._step.target import TargetGradient, TargetNow
from ftw_optim._step.watch import Watch
from ftw_optim._step.way import Way


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StepSetup:
    """The inputs and options of one step, which every stage reads.

    Clock, buffer and checks note what the stages do; nothing else is changed.

    Attributes:
        inner: the inner optimizer, from whose state the preconditioner is read.
        structure: the module that the closures call, and all in it.
        parameters: the updated and the scored parameters.
        plan: the captured parameters and their layers.
        way: the way to the combined gradient.
        target: the target closure, and when the target gradient is formed.
        trains_on_target: whether the target rows take part in the step; or the closure of rows that do while the target
            only guides.
        kept_target: the target gradient of the step before, where it is remembered.
        watch: what the last look at held-out rows found.
        filter: the filter stage.
        weight: the weight stage.
        metric: the metric of the first Matching that a stage sees.
        sketch: the sketch that estimates the Gram matrix; None: it is exact.
        memory_limit: bytes of multiplied-out gradients that may exist at a time.
        buffer: memory for those gradients, kept from step to step.
        scale: the factor by which the losses are multiplied.
        sample_ids: the candidate of each row or position; a list with one for each micro-batch.
        target_sample_ids: the target row of each row or position, where these take part.
        checks: what the self-check has vouched for; None: no self-check.
        ranks: the processes that make this step together.
        among: the number of them whose candidates are one selection; None: all, unless these are too many.
        backwards: number of selections before this one.
        seed_of: ``purpose -> seed`` of this step.
        clock: measures the phases of this step.
        observe: called with each parameter that is added to the Gram matrix.
    """

    inner: Optimizer
    structure: Structure
    parameters: StepParameters
    plan: CapturePlan
    way: Way
    target: TargetGradient
    trains_on_target: bool | Callable[[], Tensor]
    kept_target: Mapping[str, Tensor] | None
    watch: Watch
    filter: Callable[..., Any]
    weight: Callable[..., Any]
    metric: Metric
    sketch: Sketch | None
    memory_limit: int
    buffer: Buffer
    scale: float
    sample_ids: GivenIds | Sequence[GivenIds] | None
    target_sample_ids: GivenIds | None
    checks: SelfChecks | None
    ranks: Ranks
    among: int | None
    backwards: int
    seed_of: Callable[[str], int]
    clock: Clock
    observe: Observe | None = None

    @property
    def drops_factors(self) -> bool:
        """Whether factors are dropped layer by layer.

        What ``sample_ids`` tells would not fit the rows of a second pass, and several ranks reach layers in orders of
        their own.
        """
        return self.way.drops_factors and self.sample_ids is None and self.ranks.alone

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that the Gram matrix is formed in."""
        wanted = {self.metric, Metric.PRECONDITIONED, *metrics_of(self.filter), *metrics_of(self.weight)}
        return [metric for metric in Metric if metric in wanted]

    @contextmanager
    def undistracted(self) -> Iterator[None]:
        """A block in which nothing around the model talks to other processes, but this step alone."""
        with ExitStack() as stack:
            if not self.ranks.alone:
                block = without_own_sums(self.plan, self.ranks.members, meet=self.meet_for_forward)
                self.ranks.beginning(lambda: stack.enter_context(block))
            if self.in_shards:
                stack.enter_context(SeenPass.of(self.structure).watching(self.structure))
            yield

    @property
    def in_shards(self) -> bool:
        """Whether each rank holds a part of the parameters: then all make the same passes, and wait for each other."""
        return not self.ranks.alone and bool(self.structure.sharding)

    @property
    def agreed(self) -> Callable[[bool], bool] | None:
        """Whether any rank says yes, where all must make the same passes; None where each makes those it needs."""
        return (lambda own: self.ranks.any(lambda: own)) if self.in_shards else None

    def meet(self) -> None:
        """Hear whether another rank has failed, or makes another pass, before a backward pass, which would wait."""
        if self.in_shards:
            self.ranks.told(lambda: None, lambda _: None, at="a backward pass")

    def meet_for_forward(self) -> None:
        """Hear the same before a forward pass; a rank that :meth:`goes_on` for the others' sake comes once more."""
        while not all(self._said(True)):
            pass

    def goes_on(self) -> bool:
        """Whether other ranks make a forward pass, of a rank that has none to make."""
        return any(self._said(False))

    def _said(self, passes: bool) -> list[bool]:
        return self.ranks.told(lambda: passes, bool, at="a forward pass")[1]

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of this step's random numbers for one purpose."""
        return torch.Generator().manual_seed(self.seed_of(purpose))

    def target_gradient(self) -> TargetNow:
        """The target gradient of this step: formed anew, or the one that was kept."""
        with self.clock.phase("target"):
            return self.target.gradients(
                self.parameters.scored,
                self.kept_target,
                self.structure,
                backwards=self.backwards,
                scale=self.scale,
                seed=self.seed_of("target"),
                meet=self.meet,
            )

    def watch_after(self, target: TargetNow) -> Watch:
        """The watch over the guide after this step, with a look at held-out rows where one is due."""
        with self.clock.phase("target"):
            return self.watch.after(
                target.guide_losses,
                self.target,
                self.structure,
                ranks=self.ranks,
                backwards=self.backwards,
                seed=self.seed_of("held out"),
            )


def metrics_of(stage: Callable[..., Any]) -> tuple[Metric, ...]:
    """The further metrics a stage asks for.

    Raises:
        ValueError: one of them is unknown.
    """
    return tuple(map(Metric, getattr(stage, "metrics", ())))


def full_precision(losses: Tensor) -> torch.autocast:
    """A block without autocast: a region around the step is meant for the closure, not for the products here."""
    return torch.autocast(losses.device.type, enabled=False)
