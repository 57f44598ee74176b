"""From factors and target gradient to the gradient that is applied: whom to reject, whom to keep, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim._factors.factors import Factors, finite_candidates
from ftw_optim._gram.blocks import Buffer
from ftw_optim._gram.exact import DEFAULT_MEMORY_LIMIT, GramSums
from ftw_optim._gram.inner_products import METRICS, Products, on_host
from ftw_optim._gram.sketch import Sketch, SketchSums
from ftw_optim._gram.ways import Observe
from ftw_optim._matching.filters import FilterStage
from ftw_optim._matching.problem import Selection, SketchReport
from ftw_optim._matching.weights import WeightStage
from ftw_optim._preconditioners.lookup import Preconditioners, learning_rate_is_zero
from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._step.candidates import Candidates, Pass, Plain, full_precision
from ftw_optim._step.choice import metrics_of, select
from ftw_optim._step.clock import Clock
from ftw_optim._step.combine import combined_gradients, usable_updates
from ftw_optim._step.parameters import Members
from ftw_optim._step.target import TargetNow

Found = Mapping[str, list[Factors]]
MatchingSums = GramSums | SketchSums


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """What one selection came to.

    Attributes:
        selection: whom and how much.
        gradients: that it makes, of every updated parameter that was reached, times the scale.
        candidates: what the pass over them found.
        overflowed: the target gradient did, in its scale.
    """

    selection: Selection
    gradients: Mapping[str, Tensor]
    candidates: Candidates
    overflowed: bool = False


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What one selection is decided with.

    Attributes:
        optimizer: the inner optimizer, whose state is the geometry.
        model: whose ``.grad`` is set aside during a backward.
        members: the parameters that are updated, and those that are scored.
        filter: the filter stage.
        weight: the weight stage.
        metric: that of the first Matching a stage sees.
        gram: how the Gram matrix is estimated; None: it is exact.
        memory_limit: bytes of multiplied-out gradients that may exist at a time.
        buffer: memory for those gradients, kept from step to step.
        scale: what the losses were multiplied by.
        generator: ``purpose -> generator`` of this step.
        clock: of the phases of this step.
        observe: told of each parameter that is added to the Gram matrix.
    """

    optimizer: Optimizer
    model: nn.Module
    members: Members
    filter: FilterStage
    weight: WeightStage
    metric: str
    gram: Sketch | None
    memory_limit: int | None
    buffer: Buffer
    scale: float
    generator: Callable[[str], torch.Generator]
    clock: Clock
    observe: Observe | None = None

    def made(
        self,
        update: str,
        candidates: Candidates,
        target: TargetNow,
        closure: Callable[..., Any],
    ) -> Made:
        """The selection of candidates whose factors are all there.

        Args:
            update: the way of this step.
            candidates: their losses and factors.
            target: the target gradient.
            closure: to run the kept candidates again with, if need be.

        Raises:
            ValueError: the target is not finite.
        """
        found, losses = candidates.found, candidates.losses
        unseen = {name: uses for name, uses in found.items() if name not in self.members.scored}
        accepted = torch.ones(len(losses), dtype=torch.bool)
        while True:
            with full_precision(losses), self.clock.phase("gram"):
                sums = self.sums(accepted, target.gradients, losses.device)
                for name, uses in found.items():
                    if name not in unseen:
                        sums.add(name, uses)
            # That all are finite is taken for granted until here: a device is waited for once. Where a factor is not,
            # neither is the candidate's square.
            with self.clock.phase("solve"):
                problem, (values, finite, others, flags) = on_host(
                    sums.products(),
                    losses.detach(),
                    losses.detach().isfinite(),
                    finite_candidates(unseen, losses),
                    target.finite,
                )
            overflowed = target.overflowed(flags, self.scale)
            left = accepted & others & _measurable(problem)
            if overflowed or (bool(accepted.all()) and not bool(left.all())):
                clean = finite_candidates(found, losses).cpu()
                if overflowed or self._overflows(finite, clean):
                    return self._nothing(values, clean, candidates, self._infinite(found), overflowed=overflowed)
                left = left if bool(clean.all()) else clean  # beside one that is not, nothing can be measured
            if found.keys() == unseen.keys() or not bool(left.any()):
                return self._nothing(values, left, candidates)
            if bool((left == accepted).all()):
                break
            accepted = left
            found = {name: [use.without(~accepted) for use in uses] for name, uses in found.items()}
        return self._combined(update, self._select(problem, values, accepted), candidates, found, closure)

    def streamed(
        self,
        candidates: Pass,
        target: TargetNow,
        closure: Callable[..., Any],
        is_plain: Callable[[Any], bool],
    ) -> Made | Plain:
        """As :meth:`made`, of a pass whose factors are dropped layer by layer as soon as the Gram matrix has them.

        Where a candidate turns out not to be finite when others have been compared beside it, the pass runs again over
        the others. In a sketch each is alone.
        """
        rows: Tensor | None = None
        values = accepted = torch.empty(0)
        while True:
            sums = _Stream(self, target)
            with ExitStack() as captured, self.clock.phase("candidates"):
                given = closure if rows is None else partial(closure, rows=rows)
                found = candidates.over(given, is_plain, captured, sums.begin)
            if isinstance(found, Plain):
                return found
            with self.clock.phase("solve"):
                problem, (some, finite, clean, flags) = sums.on_host(found.losses)
            if rows is None:
                values, rows = some, torch.arange(len(some))
                accepted = torch.ones(len(some), dtype=torch.bool)
            overflowed = target.overflowed(flags, self.scale)
            alone, measurable = self.gram is not None, _measurable(problem) if problem else torch.ones_like(clean)
            # Unless a scaled gradient may have overflowed, the squares alone tell.
            left = clean & measurable if alone or self.scale <= 1.0 or bool(clean.all()) else clean
            accepted = accepted.index_put((rows,), left)
            if overflowed or self._overflows(finite, clean):
                infinite = self._infinite(found.footprints)
                return self._nothing(values, accepted, found, infinite, overflowed=overflowed)
            if not problem or not bool(accepted.any()):
                return self._nothing(values, accepted, found)
            if alone or bool(accepted[rows].all()):
                break
            rows = accepted.nonzero()[:, 0]  # beside one that is not finite nothing can be measured
        whole = {metric: one.among(len(values), rows).of(accepted) for metric, one in problem.items()}
        return self._combined("rerun", self._select(whole, values, accepted), found, {}, closure)

    def sums(self, accepted: Tensor, target: Mapping[str, Tensor], device: torch.device) -> MatchingSums:
        """Of this step's Gram matrix, nothing added yet."""
        preconditioners = Preconditioners(self.optimizer, unknown_as_identity=self.metric == "euclidean")
        metrics = {self.metric, "preconditioned", *metrics_of(self.filter), *metrics_of(self.weight)}
        parameters, groups = self.members.scored, self.members.groups
        dtype = torch.float32
        for parameter in parameters.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        what: dict[str, Any] = {
            "shapes": {name: parameter.shape for name, parameter in parameters.items()},
            "metrics": [metric for metric in METRICS if metric in metrics],
            "dtype": dtype,
            "device": device,
            "scale": self.scale,
            "memory_limit": DEFAULT_MEMORY_LIMIT if self.memory_limit is None else self.memory_limit,
            "buffer": self.buffer,
            "observe": self.observe,
        }

        def precondition(name: str, reference: Tensor) -> Preconditioner:
            return preconditioners(parameters[name], groups[name], reference)

        if self.gram is None:
            return GramSums(accepted, target, precondition, **what)
        return SketchSums(
            accepted,
            target,
            precondition,
            sketch=self.gram,
            seed=self.generator("sketch").initial_seed(),
            **what,
        )

    def _overflows(self, finite: Tensor, clean: Tensor) -> bool:
        """Whether a scaled gradient did; a bare run would leave what makes a GradScaler back off."""
        return self.scale > 1.0 and bool((finite & ~clean).any())

    def _infinite(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        return {name: torch.full_like(self.members.parameters[name], torch.inf) for name in names}

    def _select(self, problem: Mapping[str, Products], losses: Tensor, accepted: Tensor) -> Selection:
        """Filter and weights."""
        with self.clock.phase("solve"):
            selection = select(
                problem,
                losses,
                accepted,
                metric=self.metric,
                filter_stage=self.filter,
                weight_stage=self.weight,
                generator=self.generator("stages"),
                learning_rate_is_zero=learning_rate_is_zero(self.optimizer),
            )
        if self.gram is None:
            return selection
        return replace(selection, sketch=SketchReport(dim=self.gram.dim, error=float(problem[self.metric].error)))

    def _nothing(
        self,
        losses: Tensor,
        accepted: Tensor,
        candidates: Candidates,
        gradients: Mapping[str, Tensor] | None = None,
        *,
        overflowed: bool = False,
    ) -> Made:
        selection = Selection.nothing(losses, accepted)
        return Made(selection=selection, gradients=gradients or {}, candidates=candidates, overflowed=overflowed)

    def _combined(
        self, update: str, selection: Selection, candidates: Candidates, found: Found, closure: Callable[..., Any]
    ) -> Made:
        """What the selection makes, and how it was formed."""
        losses = candidates.losses
        for way in [] if selection.skipped else usable_updates(update, selection, self.members, closure):
            precision = nullcontext() if way == "rerun" else full_precision(losses)
            with torch.enable_grad(), precision, self.clock.phase("combine"):
                gradients, finite = combined_gradients(
                    way,
                    selection,
                    found,
                    losses,
                    self.members,
                    self.model,
                    closure,
                    scale=self.scale,
                    generator=self.generator("projection"),
                    computed_in=candidates.computed_in,
                )
            # Where nothing is captured, a candidate's infinite gradient shows only now. A scaler wants to see it.
            if self.scale > 1.0 or finite:
                return Made(selection=selection.applied_by(way), gradients=gradients, candidates=candidates)
        return Made(selection=selection.applied_by(None), gradients={}, candidates=candidates)


@final
class _Stream:
    """Takes factors as they come, and keeps of them what the Gram matrix gets."""

    def __init__(self, decision: Decision, target: TargetNow) -> None:
        self._decision, self._target = decision, target
        self._finite: list[Tensor] = []  # the losses, of each micro-batch
        self._clean: list[Tensor] = []  # and the factors, where that must be told from squares out of range
        self._sums: MatchingSums | None = None
        self._added = False

    def begin(self, losses: Tensor) -> Callable[[str, list[Factors]], None]:
        """What takes the factors of these losses."""
        finite = losses.detach().isfinite()
        self._finite.append(finite)
        self._clean.append(finite)
        if isinstance(self._sums, SketchSums):
            self._sums.more(len(losses))
        else:
            everyone = torch.ones(len(losses), dtype=torch.bool)
            self._sums = self._decision.sums(everyone, self._target.gradients, losses.device)
        return self._take

    def _take(self, name: str, uses: list[Factors]) -> None:
        if self._decision.scale > 1.0:
            for use in uses:
                self._clean[-1] = self._clean[-1] & use.finite().to(self._clean[-1].device)
        if name in self._decision.members.scored:
            assert self._sums is not None
            with self._decision.clock.phase("gram"):
                self._sums.add(name, uses)
            self._added = True

    def on_host(self, losses: Tensor) -> tuple[dict[str, Products], list[Tensor]]:
        """The products, if any; the losses, which are finite, of which the factors too, and whether the target is."""
        assert self._sums is not None
        problem = self._sums.products() if self._added else {}
        return on_host(problem, losses.detach(), torch.cat(self._finite), torch.cat(self._clean), self._target.finite)


def _measurable(problem: Mapping[str, Products]) -> Tensor:
    """Of which candidates the squares are finite in every metric."""
    return torch.stack([one.gram.diagonal().isfinite() for one in problem.values()]).all(dim=0)
