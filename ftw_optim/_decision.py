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

from ftw_optim._candidates import Candidates, Pass, Plain, full_precision
from ftw_optim._combine import all_finite, combined_gradients, usable_updates
from ftw_optim._factors import Factors, finite_candidates
from ftw_optim._filters import FilterStage
from ftw_optim._gram import DEFAULT_MEMORY_LIMIT, GramSums
from ftw_optim._gram_ways import Buffer
from ftw_optim._matching import Selection
from ftw_optim._members import Members
from ftw_optim._preconditioners.lookup import Preconditioners, learning_rate_is_zero
from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._products import METRICS, Products
from ftw_optim._selection import metrics_of, select
from ftw_optim._sketch import Sketch, SketchSums
from ftw_optim._weights import WeightStage

Found = Mapping[str, list[Factors]]
MatchingSums = GramSums | SketchSums


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

    def made(
        self,
        update: str,
        candidates: Candidates,
        target: Mapping[str, Tensor] | None,
        closure: Callable[..., Any],
    ) -> tuple[Selection, Mapping[str, Tensor]]:
        """The selection, and the gradients it makes.

        Args:
            update: the way of this step.
            candidates: their losses and factors.
            target: the target gradient; None where it overflowed.
            closure: to run the kept candidates again with, if need be.
        """
        found, losses = candidates.found, candidates.losses
        finite, accepted = finite_candidates(found, losses)
        values = losses.detach().cpu()
        if not bool(accepted.all()):
            found = {name: [use.without(~accepted) for use in uses] for name, uses in found.items()}
        if self._overflows(finite, accepted, target):
            return Selection.nothing(values, accepted), self._infinite(found)
        assert target is not None
        with full_precision(losses):
            selection = self._match(found, target, values, accepted)
        return self._combine(update, selection, found, losses, closure, candidates.computed_in)

    def streamed(
        self,
        candidates: Pass,
        target: Mapping[str, Tensor] | None,
        closure: Callable[..., Any],
        is_plain: Callable[[Any], bool],
    ) -> tuple[Selection, Mapping[str, Tensor], Candidates] | Plain:
        """As :meth:`made`, of a pass whose factors are dropped layer by layer as soon as the Gram matrix has them.

        Where a candidate turns out not to be finite when others have been compared beside it, the pass runs again over
        the others. In a sketch each is alone.
        """
        rows: Tensor | None = None
        values = accepted = torch.empty(0)
        while True:
            sums = _Stream(self, target or {})
            with ExitStack() as captured:
                given = closure if rows is None else partial(closure, rows=rows)
                found = candidates.over(given, is_plain, captured, sums.begin)
            if isinstance(found, Plain):
                return found
            if rows is None:
                values = found.losses.cpu()
                accepted = torch.ones(len(values), dtype=torch.bool)
                rows = torch.arange(len(values))
            finite, still = sums.finite()
            accepted = accepted.index_put((rows,), still)
            if self._overflows(finite, still, target):
                return Selection.nothing(values, accepted), self._infinite(found.footprints), found
            problem = sums.products(still)
            if problem is None or not bool(accepted.any()):
                return Selection.nothing(values, accepted), {}, found
            # Beside a candidate that is not finite nothing can be measured.
            alone = self.gram is not None
            clean = alone or bool((still == finite).all())
            measurable = _measurable(problem) if clean else torch.ones_like(still)
            if clean and bool(measurable.all()):
                break
            accepted = accepted.index_put((rows,), still & measurable)
            if not bool(accepted.any()):
                return Selection.nothing(values, accepted), {}, found
            if alone:
                problem = sums.products(accepted)
                assert problem is not None
                break
            rows = accepted.nonzero()[:, 0]
        whole = {metric: one.among(len(values), rows) for metric, one in problem.items()}
        selection = self._select(whole, values, accepted, sums.gram)
        return *self._combine("rerun", selection, {}, found.losses, closure, found.computed_in), found

    def sums(
        self, accepted: Tensor, target: Mapping[str, Tensor], device: torch.device, *, streamed: bool
    ) -> MatchingSums:
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
        }

        def precondition(name: str, reference: Tensor | None) -> Preconditioner:
            return preconditioners(parameters[name], groups[name], reference)

        if self.gram is None:
            return GramSums(accepted, target, precondition, **what)
        return SketchSums(
            accepted,
            target,
            precondition,
            sketch=self.gram,
            seed=self.generator("sketch").initial_seed(),
            # What is dropped before the next micro-batch comes has no common mean.
            beside_target=streamed,
            **what,
        )

    def _overflows(self, finite: Tensor, accepted: Tensor, target: Mapping[str, Tensor] | None) -> bool:
        """Whether a scaled gradient did; a bare run would leave what makes a GradScaler back off."""
        return self.scale > 1.0 and (target is None or bool((finite & ~accepted).any()))

    def _infinite(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        return {name: torch.full_like(self.members.parameters[name], torch.inf) for name in names}

    def _match(self, found: Found, target: Mapping[str, Tensor], losses: Tensor, accepted: Tensor) -> Selection:
        """Gram matrix, filter and weights."""
        scored = {name: uses for name, uses in found.items() if name in self.members.scored}
        if not scored or not bool(accepted.any()):
            return Selection.nothing(losses, accepted)
        while True:
            sums = self.sums(accepted, target, next(iter(scored.values()))[0].left.device, streamed=False)
            for name, uses in scored.items():
                sums.add(name, uses)
            problem = sums.on_host()
            measurable = _measurable(problem)
            if bool(measurable.all()):
                break
            # Finite, but its square is not: as good as infinite.
            accepted = accepted & measurable
            if not bool(accepted.any()):
                return Selection.nothing(losses, accepted)
            scored = {name: [use.without(~accepted) for use in uses] for name, uses in scored.items()}
        return self._select(problem, losses, accepted, sums)

    def _select(
        self, problem: Mapping[str, Products], losses: Tensor, accepted: Tensor, sums: MatchingSums
    ) -> Selection:
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
        return replace(selection, sketch=sums.sketch)

    def _combine(
        self,
        update: str,
        selection: Selection,
        found: Found,
        losses: Tensor,
        closure: Callable[..., Any],
        computed_in: Iterable[torch.dtype],
    ) -> tuple[Selection, Mapping[str, Tensor]]:
        """The weighted gradient of every updated parameter that was reached, times the scale, and how it was formed."""
        for way in [] if selection.skipped else usable_updates(update, selection, self.members, closure):
            with torch.enable_grad(), nullcontext() if way == "rerun" else full_precision(losses):
                gradients = combined_gradients(
                    way,
                    selection,
                    found,
                    losses,
                    self.members,
                    self.model,
                    closure,
                    scale=self.scale,
                    generator=self.generator("projection"),
                    computed_in=computed_in,
                )
            # Where nothing is captured, a candidate's infinite gradient shows only now. A scaler wants to see it.
            if self.scale > 1.0 or all_finite(gradients.values()):
                return selection.applied_by(way), gradients
        return selection.applied_by(None), {}


@final
class _Stream:
    """Takes factors as they come, and keeps of them what the Gram matrix gets."""

    def __init__(self, decision: Decision, target: Mapping[str, Tensor]) -> None:
        self._decision, self._target = decision, target
        self._losses: list[Tensor] = []  # finite or not, of each micro-batch
        self._masks: list[Tensor] = []  # the factors too
        self._sums: MatchingSums | None = None
        self._added = False

    @property
    def gram(self) -> MatchingSums:
        """The sums, where there is something to match."""
        assert self._sums is not None
        return self._sums

    def begin(self, losses: Tensor) -> Callable[[str, list[Factors]], None]:
        """What takes the factors of these losses."""
        finite = losses.detach().isfinite()
        given = finite.cpu()
        self._losses.append(finite)
        self._masks.append(finite)
        if isinstance(self._sums, SketchSums):
            self._sums.more(given)
        elif bool(given.any()) or self._decision.gram is not None:
            self._sums = self._decision.sums(given, self._target, losses.device, streamed=True)

        def take(name: str, uses: list[Factors]) -> None:
            for use in uses:
                self._masks[-1] = self._masks[-1] & use.finite().to(finite.device)
            if name not in self._decision.members.scored or self._sums is None:
                return
            self._sums.add(name, uses if bool(given.all()) else [use.without(~given) for use in uses])
            self._added = True

        return take

    def finite(self) -> tuple[Tensor, Tensor]:
        """Which candidates have a finite loss, and which of those finite factors too."""
        both = torch.stack([torch.cat(self._losses), torch.cat(self._masks)]).cpu()
        return both[0], both[1]

    def products(self, accepted: Tensor) -> dict[str, Products] | None:
        """On the CPU; None where there is nothing to match."""
        if self._sums is None or not self._added:
            return None
        return self._sums.on_host(accepted) if isinstance(self._sums, SketchSums) else self._sums.on_host()


def _measurable(problem: Mapping[str, Products]) -> Tensor:
    """Of which candidates the squares are finite in every metric."""
    return torch.stack([one.gram.diagonal().isfinite() for one in problem.values()]).all(dim=0)
