"""From factors and target gradient to the gradient that is applied: whom to reject, whom to keep, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim._candidates import Candidates, full_precision
from ftw_optim._combine import all_finite, combined_gradients, usable_updates
from ftw_optim._factors import Factors, finite_candidates
from ftw_optim._filters import FilterStage
from ftw_optim._gram import products
from ftw_optim._gram_ways import Buffer
from ftw_optim._matching import Selection
from ftw_optim._members import Members
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._products import METRICS
from ftw_optim._selection import metrics_of, select
from ftw_optim._weights import WeightStage

Found = Mapping[str, list[Factors]]


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
    ) -> tuple[Selection, Mapping[str, Tensor], Found]:
        """The selection, the gradients it makes, and the factors without those of the rejected candidates.

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
        if self.scale > 1.0 and (target is None or bool((finite & ~accepted).any())):
            # An overflow: what a bare run would leave, so that a GradScaler backs off.
            infinite = {name: torch.full_like(self.members.parameters[name], torch.inf) for name in found}
            return Selection.nothing(values, accepted), infinite, found
        assert target is not None
        with full_precision(losses):
            selection = self._match(found, target, values, accepted)
        return *self._combine(update, selection, found, losses, closure, candidates.computed_in), found

    def _match(self, found: Found, target: Mapping[str, Tensor], losses: Tensor, accepted: Tensor) -> Selection:
        """Gram matrix, filter and weights."""
        scored = {name: uses for name, uses in found.items() if name in self.members.scored}
        if not scored or not bool(accepted.any()):
            return Selection.nothing(losses, accepted)
        preconditioners = Preconditioners(self.optimizer, unknown_as_identity=self.metric == "euclidean")
        metrics = {self.metric, "preconditioned", *metrics_of(self.filter), *metrics_of(self.weight)}
        parameters, groups = self.members.scored, self.members.groups
        while True:
            problem = products(
                scored,
                target,
                lambda name, reference: preconditioners(parameters[name], groups[name], reference),
                accepted,
                shapes={name: parameter.shape for name, parameter in parameters.items()},
                metrics=[metric for metric in METRICS if metric in metrics],
                scale=self.scale,
                memory_limit=self.memory_limit,
                buffer=self.buffer,
            )
            measurable = torch.stack([one.gram.diagonal().isfinite() for one in problem.values()]).all(dim=0)
            if bool(measurable.all()):
                break
            # Finite, but its square is not: as good as infinite.
            accepted = accepted & measurable
            if not bool(accepted.any()):
                return Selection.nothing(losses, accepted)
            scored = {name: [use.without(~accepted) for use in uses] for name, uses in scored.items()}
        return select(
            problem,
            losses,
            accepted,
            metric=self.metric,
            filter_stage=self.filter,
            weight_stage=self.weight,
            generator=self.generator("stages"),
            learning_rate_is_zero=preconditioners.learning_rate_is_zero,
        )

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
