"""The sampler of a trainer's run: made when the run asks for its data, checked at each step, saved and resumed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.integrations._trainers.proposing import Proposing
from ftw_optim.proposals import ProposedSampler, VettedProposal

STATE = "proposal.pt"
"""The file of a checkpoint that holds the state of the sampler and of its proposal."""


@final
class Sampling:
    """The sampler of the present run, or the last one.

    Args:
        proposing: how candidates are proposed; None: the trainer samples its data itself.

    Attributes:
        sampler: the sampler; None before the first run, and where the trainer samples itself.
    """

    def __init__(self, proposing: Proposing | None) -> None:
        self._proposing = proposing
        self._order: torch.Tensor | None = None
        self._of_the_run = self._resumed = False
        self.sampler: ProposedSampler | None = None

    @property
    def proposes(self) -> bool:
        """Whether a proposal decides which records become candidates."""
        return self._proposing is not None

    def stages(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Proposing.stages`; likeness is trusted as far as the proposal of the present run trusts it."""
        return {} if self._proposing is None else self._proposing.stages(options, self._trusts_likeness)

    def _trusts_likeness(self) -> bool:
        tested = self._tested()
        return tested is not None and tested.trusts_likeness()

    def _tested(self) -> VettedProposal | None:
        """The proposal of the present run, if it tests likeness."""
        proposal = None if self.sampler is None else self.sampler.proposal
        return proposal if isinstance(proposal, VettedProposal) and proposal.order == "tested" else None

    def start(self) -> None:
        """Begin a run: the next sampler is its own."""
        self._of_the_run = self._resumed = False

    def sampler_for(
        self, data: Any, targets: Any, *, count: int, seed: int, source: str | None, whole: int = 1
    ) -> ProposedSampler:
        """The sampler over the training data, see :meth:`Proposing.sampler`.

        The first one of a run is the run's, and goes on with what the proposal has learned before. Others may ask for a
        loader while the run goes on: the proposal must not notice.

        Args:
            data: the training data.
            targets: the target examples.
            count: number of candidates of a step, of all processes.
            seed: of the order of the data.
            source: column of the data that is the ``source`` of a sample.
            whole: an epoch must be a multiple of so many rows, for other processes not to be given rows once more.

        Raises:
            ValueError: an epoch is not.
        """
        assert self._proposing is not None
        before = self.sampler
        of_the_run = not self._of_the_run or before is None or before.count != count
        proposal = None if before is None else before.proposal
        made = self._proposing.sampler(
            data,
            targets,
            count=count,
            seed=seed,
            source_column=source,
            proposal=proposal if of_the_run else copy.deepcopy(proposal),
        )
        if len(made) % whole:
            raise ValueError(
                f"Expected an epoch of a multiple of {whole} rows, a batch for each process, or dataloader_drop_last="
                f"True with a proposal, got {len(made)}: else processes are given rows that others had."
            )
        if of_the_run:
            self.sampler, self._of_the_run = made, True
        return made

    def check(
        self,
        batches: Sequence[Mapping[str, Any]],
        *,
        candidates: int,
        step: int,
        batch_size: int,
        windows: int,
        drop_last: bool,
        processes: Processes,
    ) -> None:
        """Check that the candidates of a step are the next rows that were given out, one for one.

        The loaders of several processes deal out batches in turn.

        Args:
            batches: the micro-batches of the step, as the loader gave them.
            candidates: their number.
            step: number of steps made before.
            batch_size: number of rows that the loader puts into one batch.
            windows: number of micro-batches of a step.
            drop_last: whether the last rows of an epoch are left out if they do not fill a micro-batch.
            processes: those that share the sampler's order.

        Raises:
            NotImplementedError: they are not.
            ValueError: by the number of steps, a run that was resumed is at another place than its sampler.
            RuntimeError: the processes differ.
        """
        if self.sampler is None:
            return
        sampler, resumed, self._resumed = self.sampler, self._resumed, False

        def numbers() -> list[int]:
            if resumed:
                rows = batch_size * processes.count
                _check_place(sampler, step, batch_size=rows, windows=windows, drop_last=drop_last)
            _check_rows(sampler, batches, processes, candidates=candidates, batch_size=batch_size)
            return sampler.coming(candidates * processes.count)

        processes.agreed(numbers)
        self._order = None if processes.count == 1 else dealt_in_turn(len(batches), processes.count, batch_size)

    def observe(self, selection: Selection) -> None:
        """Let the proposal learn from a step, from the candidates of all processes."""
        if self.sampler is not None:
            self.sampler.observe(selection, order=self._order)

    def skip(self, candidates: int) -> None:
        """Count the candidates of a step without a selection, of all processes, as taken."""
        if self.sampler is not None:
            self.sampler.skip(candidates)

    def rows_of(self, batches: Sequence[Mapping[str, Any]]) -> int:
        """The number of rows of some micro-batches; 0 where no proposal asks for it."""
        return 0 if self.sampler is None else sum(_rows(batches))

    def numbers(self) -> dict[str, float]:
        """Numbers for a logger: records of the epoch read and passed over; 1 where tested likeness is trusted."""
        if self.sampler is None:
            return {}
        found = {"read": float(self.sampler.read), "passed_over": float(self.sampler.passed_over)}
        tested = self._tested()
        return found if tested is None else {**found, "trusts_likeness": float(tested.trusts_likeness())}

    def save(self, directory: str) -> None:
        """Write the state of the sampler into a checkpoint, if there is one."""
        if self.sampler is not None:
            torch.save(self.sampler.state_dict(), os.path.join(directory, STATE))

    def load(self, directory: str | None) -> None:
        """Read the state of the sampler from a checkpoint; the trainer itself skips what was taken in its epoch.

        Args:
            directory: the checkpoint; None: the run starts anew.

        Raises:
            ValueError: only one of the two has a sampler, or the state is of another one.
        """
        self._resumed = directory is not None
        if directory is None:
            return
        path = os.path.join(directory, STATE)
        if self.sampler is None:
            if os.path.isfile(path):
                raise ValueError(
                    f"Expected the proposal in selective of which {path} has the state: without it the run would be "
                    "given other data. Start from its weights alone, or resume it as it was."
                )
            return
        if not os.path.isfile(path):
            raise ValueError(
                f"Expected {STATE} in {directory}, got none: its run had no proposal, so it was given other data. "
                "Resume it without one, or start from its weights alone."
            )
        self.sampler.load_state_dict(torch.load(path, weights_only=True), from_start=True)


def dealt_in_turn(batches: int, ranks: int, rows: int) -> torch.Tensor:
    """Which candidate each row became, where batches are dealt out in turn and candidates stand by rank.

    Args:
        batches: number of batches of each rank.
        ranks: number of ranks.
        rows: number of rows of a batch.
    """
    return torch.arange(ranks * batches * rows).view(ranks, batches, rows).transpose(0, 1).flatten()


def _check_rows(
    sampler: ProposedSampler,
    batches: Sequence[Mapping[str, Any]],
    processes: Processes,
    *,
    candidates: int,
    batch_size: int,
) -> None:
    """Check that the candidates of a step are the next rows that were given out, one for one.

    Args:
        sampler: what gave out the rows.
        batches: the micro-batches of the step, as the loader gave them.
        processes: those that are given batches in turn.
        candidates: their number, of this process.
        batch_size: number of rows that the loader puts into one batch.

    Raises:
        NotImplementedError: they are not.
    """
    left = len(sampler) - sampler.taken
    rows = _rows(batches)
    before = [(number * processes.count + processes.own) * batch_size for number in range(len(rows))]
    expected = [min(batch_size, max(0, left - done)) for done in before]
    if rows != expected or sum(rows) != candidates:
        raise NotImplementedError(
            f"Expected batches of {expected} rows, each of them a candidate, as the proposal chose them, got {rows} "
            f"rows and {candidates} candidates: a collator that packs, drops or adds rows cannot be used with a "
            "proposal."
        )


def _rows(batches: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(batch["labels"] if "labels" in batch else batch["input_ids"]) for batch in batches]


def _check_place(sampler: ProposedSampler, step: int, *, batch_size: int, windows: int, drop_last: bool) -> None:
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
