"""What is measured of the candidates' factors, and the sums that measure it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import SketchSums
from ftw_optim._gram.spec import GramSpec
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.target import TargetNow

MatchingSums = GramSums | SketchSums


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The measured products of the candidates, with losses and flags; on the CPU, copied there at once.

    Attributes:
        problem: products of all ``n`` candidates in each metric; empty where none of them reached a scored parameter.
        losses: shape ``(n,)``.
        finite: mask of the candidates whose loss is finite, bool (n,).
        clean: mask of the candidates for which everything else that was checked is finite, bool (n,).
        target: flags of the target gradient, see :class:`TargetNow`.
    """

    problem: Mapping[Metric, Products]
    losses: Tensor
    finite: Tensor
    clean: Tensor
    target: Tensor

    @property
    def measurable(self) -> Tensor:
        """Mask of the candidates whose square is finite in every metric: bool (n,)."""
        squares = [one.gram.diagonal() for one in self.problem.values()]
        return torch.stack(squares).isfinite().all(dim=0) if squares else torch.ones_like(self.finite)


def preconditioners_of(setup: StepSetup, optimizer: Optimizer | None = None) -> Preconditioners:
    """The maps of the inner optimizer's coming step, or of one that stands in for it."""
    unknown_as_identity = setup.metric is Metric.EUCLIDEAN
    return Preconditioners(optimizer or setup.inner, unknown_as_identity=unknown_as_identity)


def dtype_of_sums(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype in which products of these parameters' gradients are added up: the widest one, float32 at least."""
    dtype = torch.float32
    for parameter in parameters.values():
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def sums_of(
    setup: StepSetup,
    accepted: Tensor,
    target: TargetNow,
    device: torch.device,
    preconditioners: Preconditioners,
    *,
    scale: float | None = None,
    whole: Mapping[str, Tensor] | None = None,
    counted: Iterable[str] = (),
) -> MatchingSums:
    """The sums of this step's Gram matrix, before anything is added.

    Args:
        setup: the inputs and options of the step.
        accepted: the candidates that count, bool (n,).
        target: the target.
        device: where the sums are.
        preconditioners: the maps.
        scale: of the factors; None: that of the step.
        whole: the parameters as ``preconditioners`` know them; None: the scored ones.
        counted: parameters whose share of the target another rank's sketches have.
    """
    parameters, groups = setup.parameters.scored, setup.parameters.groups
    known = parameters if whole is None else whole
    spec = GramSpec(
        shapes={name: parameter.shape for name, parameter in parameters.items()},
        target=target.gradients,
        precondition=lambda name, reference: preconditioners(known[name], groups[name], reference),
        metrics=setup.metrics,
        dtype=dtype_of_sums(parameters),
        device=device,
        scale=setup.scale if scale is None else scale,
        memory_limit=setup.memory_limit,
        buffer=setup.buffer,
        observe=setup.observe,
        precondition_all=lambda names, references: preconditioners.stacked(
            [known[name] for name in names], groups[names[0]], references
        ),
    )
    if setup.sketch is None:
        return GramSums(spec, accepted)
    seed = setup.generator("sketch").initial_seed()
    return SketchSums(spec, accepted, sketch=setup.sketch, seed=seed, counted=counted)
