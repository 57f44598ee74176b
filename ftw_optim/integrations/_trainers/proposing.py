"""The options that ask a trainer for a proposal, and the sampler over its training data that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from ftw_optim.proposals import (
    FilterUnless,
    LearnedProposal,
    Proposal,
    ProposedSampler,
    SimilarityProposal,
    UniformProposal,
    VettedProposal,
    WeightUnless,
)

OPTIONS = ("proposal", "read_ahead", "passed_over")
"""The options that go to the sampler."""

_Make = Callable[[Sequence[Mapping[str, Any]], int], Proposal]

NAMED: Mapping[str, _Make] = {
    "learned": lambda targets, seed: LearnedProposal(targets, seed=seed),
    "similarity": lambda targets, seed: SimilarityProposal(targets, seed=seed),
    "tested": lambda targets, seed: VettedProposal(targets, order="tested", seed=seed),
    "uniform": lambda targets, seed: UniformProposal(seed),
    "vetted": lambda targets, seed: VettedProposal(targets, seed=seed),
}
"""Proposals that need no more than target examples and a seed."""


@final
@dataclass(frozen=True, kw_only=True)
class Proposing:
    """How the candidates of a step are proposed among the training data.

    Attributes:
        proposal: the proposal, or the name of one in :data:`NAMED`.
        read_ahead: see :class:`ProposedSampler`.
        passed_over: see :class:`ProposedSampler`.
    """

    proposal: Proposal | str
    read_ahead: int | None = None
    passed_over: Literal["drop", "keep"] | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Proposing | None:
        """What the options ask for, which are taken out of them; None where they name no proposal.

        Raises:
            TypeError, ValueError: the proposal is neither one nor the name of one, or the other options come without.
        """
        given = {name: options.pop(name) for name in OPTIONS if name in options}
        proposal = given.get("proposal")
        if proposal is None:
            if given.keys() - {"proposal"}:
                raise ValueError(
                    f"Expected a proposal beside {', '.join(sorted(given.keys() - {'proposal'}))} in selective, got "
                    f"none. Pass one of {', '.join(map(repr, NAMED))} or of ftw_optim.proposals as proposal."
                )
            return None
        if isinstance(proposal, str) and proposal not in NAMED:
            raise ValueError(f"proposal must be one of {', '.join(map(repr, NAMED))}, got {proposal!r}.")
        if not isinstance(proposal, Proposal | str):
            raise TypeError(
                f"Expected as proposal one of {', '.join(map(repr, NAMED))} or one of ftw_optim.proposals, got "
                f"{type(proposal).__name__}."
            )
        return cls(**given)

    def stages(self, options: Mapping[str, Any], trusted: Callable[[], bool]) -> dict[str, Any]:
        """The filter and weight stage of the options, or their defaults, where they are for when likeness misleads.

        Args:
            options: of the :class:`~ftw_optim.SelectiveOptimizer`.
            trusted: whether likeness is trusted now.

        Returns:
            Stages that take all candidates as they are while it is. Nothing for a proposal that tests no likeness, and
            where the options have such stages already.
        """
        tests = isinstance(self.proposal, VettedProposal) and self.proposal.order == "tested"
        given = {name: {name: options[name]} for name in ("filter", "weight") if options.get(name) is not None}
        if not (tests or self.proposal == "tested") or isinstance(options.get("filter"), FilterUnless):
            return {}
        return {
            "filter": FilterUnless(condition=trusted, **given.get("filter", {})),
            "weight": WeightUnless(condition=trusted, **given.get("weight", {})),
        }

    def sampler(
        self,
        data: Any,
        targets: Any,
        *,
        count: int,
        seed: int,
        source_column: str | None = None,
        proposal: Proposal | None = None,
    ) -> ProposedSampler:
        """The sampler over the training data.

        Args:
            data: the training data, with ``input_ids`` and perhaps ``labels``.
            targets: the target examples, of the same form.
            count: number of candidates of a step.
            seed: of the order of the data, and of a proposal that was named.
            source_column: column of the data that is the ``source`` of a sample.
            proposal: one that goes on, of the trainer's run before; None: the one that was asked for.

        Raises:
            TypeError: the data have no length.
            ValueError: they have no such column.
        """
        wanted = self.proposal if proposal is None else proposal
        if isinstance(wanted, str):
            wanted = NAMED[wanted]([_sample(targets[number]) for number in range(len(targets))], seed)
        columns = getattr(data, "column_names", None) or ()
        if source_column is not None and columns and source_column not in columns:
            raise ValueError(
                f"Expected the source_column among the columns {', '.join(columns)}, got {source_column!r}."
            )
        if "input_ids" in columns and getattr(data, "format", {}).get("type") != "custom":
            # Others would be decoded in vain; a transform of one's own may need any of them.
            data = data.select_columns([name for name in ("input_ids", "labels", source_column) if name in columns])
        return ProposedSampler(
            data,
            wanted,
            count=count,
            read_ahead=self.read_ahead,
            passed_over=self.passed_over,
            encode=lambda record: _sample(record, source_column),
            seed=seed,
        )


def _sample(record: Mapping[str, Any], source_column: str | None = None) -> dict[str, Any]:
    sample = {name: record[name] for name in ("input_ids", "labels") if name in record}
    if source_column is not None:
        sample["source"] = record[source_column]
    return sample
