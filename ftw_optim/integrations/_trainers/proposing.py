"""What a trainer does with a proposal: it samples the training data by it, learns from steps, and is resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals import LearnedProposal, Proposal, ProposedSampler, SimilarityProposal, UniformProposal

STATE = "proposal.pt"
"""The file of a checkpoint that holds the state of the sampler and of its proposal."""

OPTIONS = ("proposal", "read_ahead", "passed_over")
"""The options that go to the sampler."""

_Make = Callable[[Sequence[Mapping[str, Any]], int], Proposal]

NAMED: Mapping[str, _Make] = {
    "learned": lambda targets, seed: LearnedProposal(targets, seed=seed),
    "similarity": lambda targets, seed: SimilarityProposal(targets, seed=seed),
    "uniform": lambda targets, seed: UniformProposal(seed),
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

    def sampler(
        self, data: Any, targets: Any, *, count: int, seed: int, source_column: str | None = None
    ) -> ProposedSampler:
        """The sampler over the training data.

        Args:
            data: the training data, with ``input_ids`` and perhaps ``labels``.
            targets: the target examples, of the same form.
            count: number of candidates of a step.
            seed: of the order of the data, and of a proposal that was named.
            source_column: column of the data that is the ``source`` of a sample.

        Raises:
            TypeError: the data have no length.
        """
        proposal = self.proposal
        if isinstance(proposal, str):
            proposal = NAMED[proposal]([_sample(targets[number]) for number in range(len(targets))], seed)
        columns = getattr(data, "column_names", None)
        if columns is not None and hasattr(data, "select_columns"):
            # Others would be decoded in vain.
            data = data.select_columns([name for name in ("input_ids", "labels", source_column) if name in columns])
        return ProposedSampler(
            data,
            proposal,
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


def observe(sampler: ProposedSampler | None, selection: Selection) -> None:
    """Let the proposal learn from a step, if there is one."""
    if sampler is not None:
        sampler.observe(selection)


def save(sampler: ProposedSampler | None, directory: str) -> None:
    """Write the state of the sampler into a checkpoint, if there is one."""
    if sampler is not None:
        torch.save(sampler.state_dict(), os.path.join(directory, STATE))


def load(sampler: ProposedSampler | None, directory: str | None, *, skips: bool) -> None:
    """Read the state of the sampler from a checkpoint, if there is one.

    Args:
        sampler: the sampler, if the trainer has one.
        directory: the checkpoint; None: the run starts anew.
        skips: whether the trainer skips what was taken in this epoch itself.

    Raises:
        ValueError: the checkpoint has none, or one of another sampler.
    """
    if sampler is None or directory is None:
        return
    path = os.path.join(directory, STATE)
    if not os.path.isfile(path):
        raise ValueError(
            f"Expected {STATE} in {directory}, got none: its run had no proposal, so it was given other data. Resume "
            "it without one, or start from its weights alone."
        )
    sampler.load_state_dict(torch.load(path, weights_only=True), from_start=skips)
