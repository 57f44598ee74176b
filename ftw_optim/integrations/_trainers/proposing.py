"""What a trainer does with a proposal: it samples the training data by it, learns from steps, and is resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch

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


def check_rows(
    sampler: ProposedSampler, batches: Sequence[Mapping[str, Any]], *, candidates: int, batch_size: int
) -> None:
    """Check that the candidates of a step are the next rows that were given out, one for one.

    Args:
        sampler: what gave out the rows.
        batches: the micro-batches of the step, as the loader gave them.
        candidates: their number.
        batch_size: number of rows that the loader puts into one batch.

    Raises:
        NotImplementedError: they are not.
    """
    left = len(sampler) - sampler.taken
    rows = [len(batch["labels"] if "labels" in batch else batch["input_ids"]) for batch in batches]
    expected = [min(batch_size, max(0, left - number * batch_size)) for number in range(len(rows))]
    if rows != expected or sum(rows) != candidates:
        raise NotImplementedError(
            f"Expected batches of {expected} rows, each of them a candidate, as the proposal chose them, got {rows} "
            f"rows and {candidates} candidates: a collator that packs, drops or adds rows cannot be used with a "
            "proposal."
        )


def check_place(sampler: ProposedSampler, step: int, *, batch_size: int, windows: int, drop_last: bool) -> None:
    """Check that a run goes on where the sampler's state was saved.

    Args:
        sampler: the sampler, with a state that was loaded.
        step: number of steps made before.
        batch_size: number of rows in a micro-batch.
        windows: number of micro-batches of a step.
        drop_last: whether the last rows of an epoch are left out if they do not fill a micro-batch.

    Raises:
        ValueError: by the number of steps the run is elsewhere.
    """
    batches = len(sampler) // batch_size if drop_last else -(-len(sampler) // batch_size)
    of_epoch = max(1, -(-batches // windows))
    place = step // of_epoch, step % of_epoch * windows * batch_size
    if (sampler.epoch, sampler.taken) != place:
        raise ValueError(
            f"Expected to go on in epoch {place[0]} after {place[1]} rows, as {step} steps of {windows} batches of "
            f"{batch_size} rows make it, but the checkpoint is of another place: an epoch was ended "
            "early, or batches had another size. Resume with the same sizes, or start from its weights."
        )


def save(sampler: ProposedSampler | None, directory: str) -> None:
    """Write the state of the sampler into a checkpoint, if there is one."""
    if sampler is not None:
        torch.save(sampler.state_dict(), os.path.join(directory, STATE))


def load(sampler: ProposedSampler | None, directory: str | None) -> None:
    """Read the state of the sampler from a checkpoint; the trainer itself skips what was taken in its epoch.

    Args:
        sampler: the sampler, if the trainer has one.
        directory: the checkpoint; None: the run starts anew.

    Raises:
        ValueError: only one of the two has a sampler, or the state is of another one.
    """
    if directory is None:
        return
    path = os.path.join(directory, STATE)
    if sampler is None:
        if os.path.isfile(path):
            raise ValueError(
                f"Expected the proposal in selective of which {path} has the state: without it the run would be given "
                "other data. Start from its weights alone, or resume it as it was."
            )
        return
    if not os.path.isfile(path):
        raise ValueError(
            f"Expected {STATE} in {directory}, got none: its run had no proposal, so it was given other data. Resume "
            "it without one, or start from its weights alone."
        )
    sampler.load_state_dict(torch.load(path, weights_only=True), from_start=True)
