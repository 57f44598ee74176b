"""Proposals: which of the records that a step reads become its candidates, before anything is run on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ftw_optim import Selection
from ftw_optim.proposals import LearnedProposal, Proposal, SimilarityProposal, VettedProposal

from .damage import MARK
from .records import IGNORED, Example, endless_batches


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """All that a proposal may know at the start of a run.

    Attributes:
        embeddings: the model's input embeddings, ``(vocabulary, d)``.
        guide: the target rows of the run.
        own_source: records of the target's own source; only for the arm that is told.
        seed: of the run.
    """

    embeddings: Tensor
    guide: Sequence[Example]
    own_source: Sequence[Example]
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Chooser:
    """A proposal within one run.

    Attributes:
        choose: the candidates of a step, out of the records read for it and their number.
        expected: the scores that it expects of the records it chose last.
        trusted: whether its choice is good enough to be left as it is.
        observe: told the candidates of a step and the selection among them; None: it learns nothing.
    """

    choose: Callable[[Sequence[Example], int], list[Example]]
    observe: Callable[[Sequence[Example], Selection], None] | None = None
    expected: Callable[[], Tensor] | None = None
    trusted: Callable[[], bool] | None = None


def first(known: Known) -> Chooser:
    """The records as they come."""
    return Chooser(choose=lambda read, count: list(read[:count]))


def own_source(known: Known) -> Chooser:
    """Records of the target's own source, in rounds: what nobody is told outside a benchmark.

    Raises:
        ValueError: no such record is known.
    """
    if not known.own_source:
        raise ValueError("No record of the target's own source is known: pass --own-source PREFIX.")
    singles = endless_batches(known.own_source, 1, seed=known.seed)
    return Chooser(choose=lambda read, count: [next(singles)[0] for _ in range(count)])


def similar(known: Known) -> Chooser:
    """Records that share the most tokens with the target rows, each by itself."""
    return _proposed_by(SimilarityProposal(samples(known.guide), contrast=False, seed=known.seed))


def contrasted(known: Known) -> Chooser:
    """Records that share more tokens with the target rows than with the stream."""
    return _proposed_by(SimilarityProposal(samples(known.guide), seed=known.seed))


def similar_and_sound(known: Known) -> Chooser:
    """The same of the records that are not damaged: what nobody is told outside a benchmark."""
    inner = similar(known)

    def choose(read: Sequence[Example], count: int) -> list[Example]:
        sound = [example for example in read if not example.source.endswith(MARK)]
        return inner.choose(sound, count)

    return Chooser(choose=choose)


def similar_embeddings(known: Known) -> Chooser:
    """Records whose mean input embedding is most like that of the target rows."""
    return _proposed_by(
        SimilarityProposal(samples(known.guide), contrast=False, embedding=known.embeddings, seed=known.seed)
    )


def vetted(known: Known) -> Chooser:
    """Records that share the most tokens with the target rows, but for those of a kind with worse scores."""
    return _proposed_by(VettedProposal(samples(known.guide), seed=known.seed))


def vetted_random(known: Known) -> Chooser:
    """Records at random, but for those of a kind with worse scores."""
    return _proposed_by(VettedProposal(samples(known.guide), order="uniform", seed=known.seed))


def tested(known: Known) -> Chooser:
    """The same in the order of likeness as far as scores bear it out, else at random."""
    return _proposed_by(VettedProposal(samples(known.guide), order="tested", seed=known.seed))


def tested_with_floor(known: Known) -> Chooser:
    """The same, but for an eighth that is always at random."""
    return _proposed_by(VettedProposal(samples(known.guide), order="tested", floor=0.125, seed=known.seed))


def learned(known: Known) -> Chooser:
    """Records like those with the best scores so far, at first like the target rows."""
    return _proposed_by(LearnedProposal(samples(known.guide), seed=known.seed))


def learned_from_scores(known: Known) -> Chooser:
    """The same from scores alone, which starts with no idea of likeness."""
    return _proposed_by(LearnedProposal(None, seed=known.seed))


def _proposed_by(proposal: Proposal) -> Chooser:
    return Chooser(
        choose=lambda read, count: [read[place] for place in proposal.propose(samples(read), count).tolist()],
        observe=lambda candidates, selection: proposal.observe(samples(candidates), selection),
        expected=(lambda: proposal.expected) if isinstance(proposal, LearnedProposal) else None,
        trusted=proposal.trusts_likeness if isinstance(proposal, VettedProposal) else None,
    )


def samples(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The examples as the package's proposals read them, without their sources, which no arm is told."""
    return [
        {
            "input_ids": example.tokens,
            "labels": [IGNORED] * example.prompt_length + example.tokens[example.prompt_length :],
        }
        for example in examples
    ]
