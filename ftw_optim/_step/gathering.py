"""The candidates' factors and what they measure: kept until the step is decided, or taken layer by layer."""

from __future__ import annotations

from ftw_optim._step.candidates import CandidatePass
from ftw_optim._step.captured_rows import together
from ftw_optim._step.closures import Plain
from ftw_optim._step.kept_factors import KeptFactors
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.streamed_factors import Stream, StreamedFactors
from ftw_optim._step.target import TargetNow

PassFactors = KeptFactors | StreamedFactors


def gather(setup: StepSetup, candidate_pass: CandidatePass, target: TargetNow) -> PassFactors | Plain:
    """The candidates' factors, kept or dropped layer by layer; or the request of a closure without candidates."""
    stream = Stream(setup, target) if setup.drops_factors else None
    candidates = candidate_pass.candidates(taker=None if stream is None else stream.begin)
    if isinstance(candidates, Plain):
        return candidates
    if stream is None:
        rows = candidates if target.rows is None else together([candidates, target.rows])
        return KeptFactors(setup, rows, target)
    return StreamedFactors(setup, candidate_pass, target, candidates, stream)
