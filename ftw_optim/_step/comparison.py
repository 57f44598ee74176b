"""Candidates compared with each other and with the target: the small problem of a step, and whom it is about.

What is not finite is rejected on the way. A candidate's square tells: it is not finite where a factor is not. Beside
such a candidate nothing can be measured (the expected gradient, and so ``P``, has it inside): the others are compared
anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors, finite_candidates
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import Products, on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import SketchSums
from ftw_optim._gram.spec import DEFAULT_MEMORY_LIMIT, GramSpec
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._step.candidates import CandidatePass, Candidates
from ftw_optim._step.closures import Plain
from ftw_optim._step.run import Run, full_precision
from ftw_optim._step.target import TargetNow

MatchingSums = GramSums | SketchSums


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What a look at the candidates told; on the CPU, brought there by one copy.

    Attributes:
        problem: products of all ``n`` candidates in each metric; empty where none of them reached a scored parameter.
        losses: shape ``(n,)``.
        finite: bool (n,), whose loss is finite.
        clean: bool (n,), of whom all is finite that was looked at beside the products.
        target: flags of the target gradient, see :class:`TargetNow`.
    """

    problem: Mapping[Metric, Products]
    losses: Tensor
    finite: Tensor
    clean: Tensor
    target: Tensor

    @property
    def measurable(self) -> Tensor:
        """Whose square is finite in every metric: bool (n,)."""
        squares = [one.gram.diagonal() for one in self.problem.values()]
        return torch.stack(squares).isfinite().all(dim=0) if squares else torch.ones_like(self.finite)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The small problem of a step.

    Attributes:
        problem: products in each metric, zero for rejected candidates; empty where there is nothing to match.
        losses: shape ``(n,)``, on the CPU.
        accepted: bool (n,): candidates that are not rejected.
        overflowed: a scaled gradient did, a candidate's or the target's: nothing may be applied.
        target_overflowed: the target's did.
    """

    problem: Mapping[Metric, Products]
    losses: Tensor
    accepted: Tensor
    overflowed: bool = False
    target_overflowed: bool = False


@final
class KeptFactors:
    """Candidates whose factors are all there, until the combined gradient is formed."""

    def __init__(self, run: Run, candidates: Candidates, target: TargetNow) -> None:
        self._run, self._target = run, target
        self.candidates = candidates
        self.found = candidates.found
        """Factors by parameter; zero for rejected candidates."""
        self.accepted = torch.ones(len(candidates.losses), dtype=torch.bool)

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` candidates, bool (n,)."""
        self.accepted = accepted
        self.found = {name: [use.without(~accepted) for use in uses] for name, uses in self.found.items()}

    def measured(self) -> Measured:
        """The products of those that are accepted; that all are finite is taken for granted until they are known."""
        run, losses = self._run, self.candidates.losses
        scored = {name: uses for name, uses in self.found.items() if name in run.parameters.scored}
        unseen = {name: uses for name, uses in self.found.items() if name not in scored}
        with full_precision(losses), run.clock.phase("gram"):
            sums = sums_of(run, self.accepted, self._target, losses.device)
            for name, uses in scored.items():
                sums.add(name, uses)
        detached = losses.detach()
        with run.clock.phase("solve"):
            problem, (values, finite, clean, flags) = on_host(
                sums.products() if scored else {},
                detached,
                detached.isfinite(),
                finite_candidates(unseen, losses),
                self._target.finite,
            )
        return Measured(problem=problem, losses=values, finite=finite, clean=clean, target=flags)

    def clean(self, measured: Measured) -> Tensor:
        """Of whom the loss and all factors are finite: bool (n,)."""
        return finite_candidates(self.found, self.candidates.losses).cpu()


@final
class StreamedFactors:
    """Candidates whose factors are dropped layer by layer, as soon as the Gram matrix has them."""

    def __init__(self, run: Run, candidate_pass: CandidatePass, target: TargetNow) -> None:
        self._run, self._pass, self._target = run, candidate_pass, target
        self.found: Mapping[str, list[Factors]] = {}
        self.accepted = torch.empty(0, dtype=torch.bool)
        self._losses: Tensor | None = None  # of all candidates, from the first pass

    def passed(self, rows: Tensor | None = None) -> Plain | None:
        """Run the candidates, or some ``rows`` of them; what the closure asks for instead, if it does."""
        self._finite: list[Tensor] = []  # the losses, of each micro-batch
        self._clean: list[Tensor] = []  # and the factors, where that must be told from squares out of range
        self._sums: MatchingSums | None = None
        self._added = False
        candidates = self._pass.candidates(rows, self._begin)
        if isinstance(candidates, Plain):
            return candidates
        self.candidates = candidates
        self._rows = torch.arange(len(candidates.losses)) if rows is None else rows
        if rows is None:
            self.accepted = torch.ones(len(candidates.losses), dtype=torch.bool)
        return None

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` candidates, bool (n,)."""
        self.accepted = accepted

    def measured(self) -> Measured:
        """The products of those that are accepted, who are run again if others were compared beside them."""
        if not bool(self.accepted[self._rows].all()):
            self.passed(self.accepted.nonzero()[:, 0])
        assert self._sums is not None
        with self._run.clock.phase("solve"):
            problem, (values, finite, clean, flags) = on_host(
                self._sums.products() if self._added else {},
                self.candidates.losses.detach(),
                torch.cat(self._finite),
                torch.cat(self._clean),
                self._target.finite,
            )
        if self._losses is None:
            self._losses = values
        n, rows = len(self.accepted), self._rows
        everyone = torch.zeros(n, dtype=torch.bool)
        return Measured(
            problem={metric: one.among(n, rows) for metric, one in problem.items()},
            losses=self._losses,
            finite=everyone.index_put((rows,), finite),
            clean=everyone.index_put((rows,), clean),
            target=flags,
        )

    def clean(self, measured: Measured) -> Tensor:
        """Of whom the loss and all factors are finite, as far as can be told of what is gone: bool (n,)."""
        return measured.clean if self._run.scale > 1.0 else measured.clean & measured.measurable

    def _begin(self, losses: Tensor) -> Callable[[str, list[Factors]], None]:
        """What takes the factors of these losses."""
        finite = losses.detach().isfinite()
        self._finite.append(finite)
        self._clean.append(finite)
        if isinstance(self._sums, SketchSums):
            self._sums.more(len(losses))
        else:
            everyone = torch.ones(len(losses), dtype=torch.bool)
            self._sums = sums_of(self._run, everyone, self._target, losses.device)
        return self._take

    def _take(self, name: str, uses: list[Factors]) -> None:
        if self._run.scale > 1.0:
            for use in uses:
                self._clean[-1] = self._clean[-1] & use.finite().to(self._clean[-1].device)
        if name in self._run.parameters.scored:
            assert self._sums is not None
            with self._run.clock.phase("gram"):
                self._sums.add(name, uses)
            self._added = True


PassFactors = KeptFactors | StreamedFactors


def gather(run: Run, candidate_pass: CandidatePass, target: TargetNow) -> PassFactors | Plain:
    """The candidates' factors, kept or taken layer by layer; or the request of a closure that has no candidates."""
    if run.drops_factors:
        streamed = StreamedFactors(run, candidate_pass, target)
        return streamed.passed() or streamed
    candidates = candidate_pass.candidates()
    return candidates if isinstance(candidates, Plain) else KeptFactors(run, candidates, target)


def compare(run: Run, factors: PassFactors, target: TargetNow) -> Comparison:
    """The products of all candidates that are finite, with each other and with the target.

    Raises:
        ValueError: the target is not finite.
    """
    while True:
        seen, before = factors.measured(), factors.accepted
        target_overflowed = target.overflowed(seen.target, run.scale)
        left = before & seen.clean & seen.measurable
        if target_overflowed or not torch.equal(left, before):
            clean = before & factors.clean(seen)
            # A bare run would leave what makes a GradScaler back off.
            overflowed = run.scale > 1.0 and bool((before & seen.finite & ~clean).any())
            if target_overflowed or overflowed:
                return Comparison(
                    problem={},
                    losses=seen.losses,
                    accepted=clean,
                    overflowed=True,
                    target_overflowed=target_overflowed,
                )
            left = left if torch.equal(clean, before) else clean  # beside one that is not, nothing can be measured
            factors.keep_only(left)
        if not seen.problem or not bool(left.any()):
            return Comparison(problem={}, losses=seen.losses, accepted=left)
        if run.sketch is not None or torch.equal(left, before):  # in a sketch each is alone
            problem = {metric: one.of(left) for metric, one in seen.problem.items()}
            return Comparison(problem=problem, losses=seen.losses, accepted=left)


def sums_of(run: Run, accepted: Tensor, target: TargetNow, device: torch.device) -> MatchingSums:
    """The sums of this step's Gram matrix, nothing added yet."""
    preconditioners = Preconditioners(run.inner, unknown_as_identity=run.metric is Metric.EUCLIDEAN)
    parameters, groups = run.parameters.scored, run.parameters.groups
    dtype = torch.float32
    for parameter in parameters.values():
        dtype = torch.promote_types(dtype, parameter.dtype)
    spec = GramSpec(
        shapes={name: parameter.shape for name, parameter in parameters.items()},
        target=target.gradients,
        precondition=lambda name, reference: preconditioners(parameters[name], groups[name], reference),
        metrics=run.metrics,
        dtype=dtype,
        device=device,
        scale=run.scale,
        memory_limit=DEFAULT_MEMORY_LIMIT if run.memory_limit is None else run.memory_limit,
        buffer=run.buffer,
        observe=run.observe,
    )
    if run.sketch is None:
        return GramSums(spec, accepted)
    return SketchSums(spec, accepted, sketch=run.sketch, seed=run.generator("sketch").initial_seed())
