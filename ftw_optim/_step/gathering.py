"""The candidates' factors and what they measure: kept until the step is decided, or taken layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket, buckets_of
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.finiteness import finite_candidates
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import Products, on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import SketchSums
from ftw_optim._gram.spec import GramSpec
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._step.candidates import CandidatePass, Candidates
from ftw_optim._step.closures import Plain
from ftw_optim._step.setup import StepSetup, full_precision
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


@final
class KeptFactors:
    """Factors of all candidates, kept until the combined gradient is formed."""

    measures_alone = False
    """Whether each candidate is measured by itself, whoever is beside it."""

    def __init__(self, setup: StepSetup, candidates: Candidates, target: TargetNow) -> None:
        self._setup, self._target = setup, target
        self.candidates = candidates
        self.found = candidates.found
        """Factors by parameter; zero for rejected candidates."""
        self.buckets: Sequence[Bucket] = ()
        """The buckets of those that are alike; none before they are measured."""
        self.accepted = torch.ones(len(candidates.losses), dtype=torch.bool)

    @property
    def alone(self) -> dict[str, Sequence[Factors]]:
        """Factors of the parameters that are in no bucket."""
        together = {name for bucket in self.buckets for name in bucket.names}
        return {name: uses for name, uses in self.found.items() if name not in together}

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` candidates, bool (n,)."""
        self.found = {name: [use.without(~accepted) for use in uses] for name, uses in self.found.items()}
        self.accepted, self.buckets = accepted, ()

    def measured(self) -> Measured:
        """The products of the accepted candidates, which may turn out not to be finite."""
        setup, losses = self._setup, self.candidates.losses
        scored = setup.parameters.scored
        with full_precision(losses), setup.clock.phase("gram"):
            preconditioners = preconditioners_of(setup)
            self.buckets = self._alike(preconditioners)
            sums = sums_of(setup, self.accepted, self._target, losses.device, preconditioners)
            for bucket in self.buckets:
                if bucket.names[0] in scored:
                    assert isinstance(sums, GramSums)
                    sums.add_all(bucket)
            alone = self.alone
            for name, uses in alone.items():
                if name in scored:
                    sums.add(name, uses)
        unseen = {name: uses for name, uses in alone.items() if name not in scored}
        masks = [bucket.finite(setup.buffer) for bucket in self.buckets if bucket.names[0] not in scored]
        detached = losses.detach()
        with setup.clock.phase("solve"):
            problem, (values, finite, clean, flags) = on_host(
                sums.products() if any(name in scored for name in self.found) else {},
                detached,
                detached.isfinite(),
                finite_candidates(unseen, losses, *masks),
                self._target.finite,
            )
        return Measured(problem=problem, losses=values, finite=finite, clean=clean, target=flags)

    def _alike(self, preconditioners: Preconditioners) -> list[Bucket]:
        """The parameters that are alike, in buckets."""
        parameters, found = self._setup.parameters, self.found
        kinds: dict[str, Hashable] = {}
        if self._setup.sketch is None:  # whose hashes belong to single parameters
            some = {name: parameters.scored[name] for name in found if name in parameters.scored}
            kinds.update(preconditioners.kinds(some, parameters.groups))
        others = {name: parameters.updated[name] for name in found if name not in parameters.scored}
        kinds.update({name: ("combined alone", parameter.dtype) for name, parameter in others.items()})
        shapes = {name: parameters.updated[name].shape for name in kinds}
        return buckets_of(found, shapes, kinds, limit=self._setup.memory_limit)

    def clean(self, measured: Measured) -> Tensor:
        """Mask of the candidates whose loss and factors are all finite: bool (n,)."""
        return finite_candidates(self.found, self.candidates.losses).cpu()


@final
class _Stream:
    """Everything that one pass has handed over so far, of which only the sums are kept."""

    def __init__(self, setup: StepSetup, target: TargetNow) -> None:
        self._setup, self._target = setup, target
        self._sums: MatchingSums | None = None
        self._added = False
        self.finite: list[Tensor] = []
        """Masks of the candidates whose loss is finite, one for each micro-batch."""
        self.clean: list[Tensor] = []
        """Masks of those whose factors are finite too, where the products alone cannot tell."""

    def begin(self, losses: Tensor) -> Callable[[str, list[Factors]], None]:
        """Begin a batch with these losses; returns the function that takes its factors."""
        finite = losses.detach().isfinite()
        self.finite.append(finite)
        self.clean.append(finite)
        if isinstance(self._sums, SketchSums):
            self._sums.more(len(losses))
        else:
            everyone = torch.ones(len(losses), dtype=torch.bool)
            preconditioners = preconditioners_of(self._setup)
            self._sums = sums_of(self._setup, everyone, self._target, losses.device, preconditioners)
        return self._take

    def _take(self, name: str, uses: list[Factors]) -> None:
        if self._setup.scale > 1.0:
            for use in uses:
                self.clean[-1] = self.clean[-1] & use.finite().to(self.clean[-1].device)
        if name in self._setup.parameters.scored:
            assert self._sums is not None
            with self._setup.clock.phase("gram"):
                self._sums.add(name, uses)
            self._added = True

    def products(self) -> dict[Metric, Products]:
        """The products in each metric; none where no scored parameter was reached."""
        assert self._sums is not None
        return self._sums.products() if self._added else {}


@final
class StreamedFactors:
    """Candidates whose factors are dropped layer by layer, as soon as the Gram matrix has them.

    Args:
        setup: the inputs and options of the step.
        candidate_pass: runs the candidates, and runs those that are left once more if it has to.
        target: the target gradient.
        candidates: losses of all, from the first pass.
        stream: everything that pass has handed over.
    """

    def __init__(
        self,
        setup: StepSetup,
        candidate_pass: CandidatePass,
        target: TargetNow,
        candidates: Candidates,
        stream: _Stream,
    ) -> None:
        self._setup, self._pass, self._target, self._stream = setup, candidate_pass, target, stream
        self.candidates = candidates
        self.measures_alone = setup.sketch is not None  # under the target as reference, in place of the mean
        self.found: Mapping[str, Sequence[Factors]] = {}
        self.buckets: Sequence[Bucket] = ()
        self.alone = self.found
        self.accepted = torch.ones(len(candidates.losses), dtype=torch.bool)
        self._rows = torch.arange(len(candidates.losses))
        self._losses: Tensor | None = None  # of all candidates, on the CPU

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` candidates, bool (n,)."""
        self.accepted = accepted

    def measured(self) -> Measured:
        """The products of the accepted candidates, which are run again if others were in the pass before."""
        if not bool(self.accepted[self._rows].all()):
            self._pass_again(self.accepted.nonzero()[:, 0])
        stream = self._stream
        with self._setup.clock.phase("solve"):
            problem, (values, finite, clean, flags) = on_host(
                stream.products(),
                self.candidates.losses.detach(),
                torch.cat(stream.finite),
                torch.cat(stream.clean),
                self._target.finite,
            )
        if self._losses is None:
            self._losses = values
        n, rows = len(self.accepted), self._rows
        nobody = torch.zeros(n, dtype=torch.bool)
        return Measured(
            problem={metric: one.among(n, rows) for metric, one in problem.items()},
            losses=self._losses,
            finite=nobody.index_put((rows,), finite),
            clean=nobody.index_put((rows,), clean),
            target=flags,
        )

    def clean(self, measured: Measured) -> Tensor:
        """Mask of the candidates whose loss and factors are finite, as far as known after the drop: bool (n,)."""
        return measured.clean if self._setup.scale > 1.0 else measured.clean & measured.measurable

    def _pass_again(self, rows: Tensor) -> None:
        self._rows, self._stream = rows, _Stream(self._setup, self._target)
        candidates = self._pass.candidates(rows, self._stream.begin)
        assert isinstance(candidates, Candidates)
        self.candidates = candidates


PassFactors = KeptFactors | StreamedFactors


def gather(setup: StepSetup, candidate_pass: CandidatePass, target: TargetNow) -> PassFactors | Plain:
    """The candidates' factors, kept or dropped layer by layer; or the request of a closure without candidates."""
    stream = _Stream(setup, target) if setup.drops_factors else None
    candidates = candidate_pass.candidates(taker=None if stream is None else stream.begin)
    if isinstance(candidates, Plain):
        return candidates
    if stream is None:
        return KeptFactors(setup, candidates, target)
    return StreamedFactors(setup, candidate_pass, target, candidates, stream)


def preconditioners_of(setup: StepSetup) -> Preconditioners:
    """The maps of the inner optimizer's coming step."""
    return Preconditioners(setup.inner, unknown_as_identity=setup.metric is Metric.EUCLIDEAN)


def sums_of(
    setup: StepSetup, accepted: Tensor, target: TargetNow, device: torch.device, preconditioners: Preconditioners
) -> MatchingSums:
    """The sums of this step's Gram matrix, before anything is added."""
    parameters, groups = setup.parameters.scored, setup.parameters.groups
    dtype = torch.float32
    for parameter in parameters.values():
        dtype = torch.promote_types(dtype, parameter.dtype)
    spec = GramSpec(
        shapes={name: parameter.shape for name, parameter in parameters.items()},
        target=target.gradients,
        precondition=lambda name, reference: preconditioners(parameters[name], groups[name], reference),
        metrics=setup.metrics,
        dtype=dtype,
        device=device,
        scale=setup.scale,
        memory_limit=setup.memory_limit,
        buffer=setup.buffer,
        observe=setup.observe,
        precondition_all=lambda names, references: preconditioners.stacked(
            [parameters[name] for name in names], groups[names[0]], references
        ),
    )
    if setup.sketch is None:
        return GramSums(spec, accepted)
    return SketchSums(spec, accepted, sketch=setup.sketch, seed=setup.generator("sketch").initial_seed())
