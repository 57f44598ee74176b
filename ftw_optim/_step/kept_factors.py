"""Factors that are kept until the step is decided, and added to the Gram matrix when the candidates are compared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket, buckets_of
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.finiteness import finite_candidates
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import on_host
from ftw_optim._matching.selection import Selection
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._step.captured_rows import CapturedRows
from ftw_optim._step.measuring import MatchingSums, Measured, preconditioners_of, sums_of
from ftw_optim._step.setup import StepSetup, full_precision
from ftw_optim._step.target import TargetNow


@final
class KeptFactors:
    """Factors of all candidates, kept until the combined gradient is formed."""

    measures_alone = False
    """Whether each candidate is measured by itself, whoever is beside it."""
    in_groups = False
    """Whether other ranks make selections of their own, beside this one."""

    def __init__(self, setup: StepSetup, candidates: CapturedRows, target: TargetNow) -> None:
        self._setup, self._target = setup, target
        self.candidates = candidates
        self.found = candidates.found
        """Factors by parameter; zero for rejected candidates."""
        self.buckets: Sequence[Bucket] = ()
        """The buckets of those that are alike; none before they are measured."""
        self.accepted = torch.ones(len(candidates.losses), dtype=torch.bool)
        self.mine = slice(0, len(candidates.losses) - (0 if target.rows is None else len(target.rows.losses)))
        """The candidates of this process among all."""

    @property
    def reached(self) -> Sequence[str]:
        """The captured parameters that some candidate reached."""
        return list(self.candidates.footprints)

    def own(self, selection: Selection) -> Selection:
        """The selection as far as it concerns this process, which ran all rows."""
        return selection

    @property
    def alone(self) -> dict[str, Sequence[Factors]]:
        """Factors of the parameters that are in no bucket."""
        return in_no_bucket(self.found, self.buckets)

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` candidates, bool (n,)."""
        self.found = {name: [use.without(~accepted) for use in uses] for name, uses in self.found.items()}
        self.accepted, self.buckets = accepted, ()

    def sums(self) -> MatchingSums:
        """The sums over the scored parameters that some candidate reached."""
        setup, losses = self._setup, self.candidates.losses
        scored = setup.parameters.scored
        with full_precision(losses), setup.clock.phase("gram"):
            preconditioners = preconditioners_of(setup)
            self.buckets = self.alike(preconditioners)
            sums = sums_of(setup, self.accepted, self._target, losses.device, preconditioners)
            for bucket in self.buckets:
                if bucket.names[0] in scored:
                    assert isinstance(sums, GramSums)
                    sums.add_all(bucket)
            for name, uses in self.alone.items():
                if name in scored:
                    sums.add(name, uses)
        return sums

    def measured(self) -> Measured:
        """The products of the accepted candidates, which may turn out not to be finite."""
        setup, losses = self._setup, self.candidates.losses
        scored, sums = setup.parameters.scored, self.sums()
        unseen = {name: uses for name, uses in self.alone.items() if name not in scored}
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

    def alike(self, preconditioners: Preconditioners) -> list[Bucket]:
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


def in_no_bucket(found: Mapping[str, Sequence[Factors]], buckets: Sequence[Bucket]) -> dict[str, Sequence[Factors]]:
    """The factors of those parameters that are in none of the buckets."""
    together = {name for bucket in buckets for name in bucket.names}
    return {name: uses for name, uses in found.items() if name not in together}
