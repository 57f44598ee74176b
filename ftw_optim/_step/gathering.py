"""The candidates' factors and what they measure: kept until the step is decided, or taken layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ftw_optim._ranks.grouping import ranks_of_one, sums_of_neighbours
from ftw_optim._ranks.tables import touched
from ftw_optim._step.candidates import FEW_TARGET_ROWS, CandidatePass
from ftw_optim._step.captured_rows import together
from ftw_optim._step.closures import Plain
from ftw_optim._step.digest import digest_of, hashed, parts_of, refuse_differences, refuse_different_copies
from ftw_optim._step.kept_factors import KeptFactors
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.shared_factors import SharedFactors, Told, shared_target
from ftw_optim._step.streamed_factors import Stream, StreamedFactors
from ftw_optim._step.target import TargetNow
from ftw_optim._step.target_rows import target_of

PassFactors = KeptFactors | StreamedFactors | SharedFactors


def target_and_factors(setup: StepSetup, candidate_pass: CandidatePass) -> tuple[TargetNow, PassFactors | Plain]:
    """The target of this step, and the candidates' factors: of all ranks, which have run their own by then."""
    if setup.ranks.alone:
        return _own(setup, candidate_pass)
    digest = setup.ranks.beginning(lambda: digest_of(setup))
    if setup.in_shards:  # options decide about passes, for which all ranks wait
        parts = setup.ranks.beginning(lambda: parts_of(setup))
        told_first = setup.ranks.told(lambda: (hashed(digest), parts), lambda found: found)[1]
        refuse_differences(setup.ranks, [one for one, _ in told_first], digest)
        refuse_different_copies([some for _, some in told_first])
    (target, own), told = setup.ranks.told(
        lambda: _own(setup, candidate_pass),
        lambda found: _told(setup, hashed(digest), candidate_pass.takes_rows, *found),
    )
    refuse_differences(setup.ranks, [one.digest for one in told], digest)
    setup.ranks.met = True
    if any(one.plain is not None for one in told):
        _refuse_plain(told)
        return target, own
    assert isinstance(own, KeptFactors)
    candidate_pass.takes_rows = all(one.takes_rows for one in told)
    counts = [len(one.losses) - one.targets for one in told]
    size = ranks_of_one(counts, setup.among)
    totals = sums_of_neighbours([one.targets for one in told], size)
    if setup.trains_on_target is True and min(totals) < 2:
        raise ValueError(FEW_TARGET_ROWS)
    within, total = setup.ranks.neighbours(size), totals[setup.ranks.own // size]
    target = shared_target(setup.ranks, within, target, told, total=total)
    return target, SharedFactors(setup, within, own.candidates, target, told)


def _own(setup: StepSetup, candidate_pass: CandidatePass) -> tuple[TargetNow, KeptFactors | StreamedFactors | Plain]:
    """The target and the factors of this process alone."""
    target = target_of(setup, candidate_pass)
    return target, gather(setup, candidate_pass, target)


def _told(
    setup: StepSetup,
    digest: str,
    takes_rows: bool,
    target: TargetNow,
    own: KeptFactors | StreamedFactors | Plain,
) -> Told:
    """What the other ranks are told of this one's pass."""
    if isinstance(own, Plain):
        return Told(
            digest=digest,
            plain=own.value is not None,
            losses=torch.empty(0),
            targets=0,
            guide_losses=None,
            reached=0,
            takes_rows=False,
            touched={},
        )
    guides = target.guide_losses
    return Told(
        digest=digest,
        plain=None,
        losses=own.candidates.losses.detach().cpu(),
        targets=target.count,
        guide_losses=None if guides is None else guides.detach().cpu(),
        reached=setup.parameters.mask(own.reached),
        takes_rows=takes_rows,
        touched={name: touched(uses) for name, uses in own.found.items() if name in setup.parameters.scored},
    )


def _refuse_plain(told: Sequence[Told]) -> None:
    """Refuse closures without candidates in several processes, but where none has any and none ran a backward.

    Raises:
        RuntimeError: there are others.
    """
    without = [rank for rank, one in enumerate(told) if one.plain is not None]
    if len(without) < len(told):
        raise RuntimeError(
            f"Expected the losses of candidates from every rank, but the closure of rank {without[0]} returned none. "
            "Skip the step on all ranks, or on none."
        )
    if any(one.plain for one in told):
        raise RuntimeError(
            "Expected the losses of candidates: in several processes a closure with a backward of its own is not "
            "supported, as nothing would sum its gradients over the ranks."
        )


def gather(setup: StepSetup, candidate_pass: CandidatePass, target: TargetNow) -> KeptFactors | StreamedFactors | Plain:
    """The candidates' factors, kept or dropped layer by layer; or the request of a closure without candidates."""
    stream = Stream(setup, target) if setup.drops_factors else None
    candidates = candidate_pass.candidates(taker=None if stream is None else stream.begin)
    if isinstance(candidates, Plain):
        return candidates
    if stream is None:
        rows = candidates if target.rows is None else together([candidates, target.rows])
        return KeptFactors(setup, rows, target)
    return StreamedFactors(setup, candidate_pass, target, candidates, stream)
