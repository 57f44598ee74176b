"""A sampler over data that are found by number, whose order a proposal decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ftw_optim._matching.selection import Selection
from ftw_optim.proposals.drawing import salt
from ftw_optim.proposals.interface import Proposal, Sample
from ftw_optim.proposals.records import KnownRecords


@final
class ProposedSampler(Sampler[int]):
    """The numbers of the records that a proposal makes candidates, for a ``DataLoader`` or a trainer.

    ::

        sampler = ProposedSampler(records, LearnedProposal(target), count=16, read_ahead=256)
        loader = DataLoader(records, batch_size=16, sampler=sampler, collate_fn=collate, num_workers=2)
        for batch in loader:
            optimizer.step(lambda: losses(batch))
            sampler.observe(optimizer.selection)

    For each step, ``read_ahead`` records are read in an order that the seed decides, and the proposal chooses ``count``
    of them. An epoch reads every record once. The same arguments give the same numbers, whatever the workers do; a
    loader that asks for batches ahead gets them from what has been learned when it asks.

    What was given out and :attr:`taken` by steps is counted by :meth:`observe` and :meth:`skip`. A new iterator begins
    behind what was taken, so what a loader had asked for ahead comes again. An epoch ends where everything was asked
    for and fewer than ``count`` records were not taken, as with ``drop_last``, or where nobody ever told what was
    taken. Features of our proposals are computed once for each record, and kept where those of all fit into 1 GiB.

    Args:
        data: the records, with a length, found by number; the data set of the loader.
        proposal: what chooses.
        count: the number of candidates of a step.
        read_ahead: number of records among which the proposal chooses, at least ``count``. None: all records of the
            data set that were not given out in this epoch.
        passed_over: ``"drop"``: records that were read and not chosen do not come back in this epoch. ``"keep"``: they
            are offered again, so that an epoch gives out every record once, the least wanted last.
        encode: makes of a record the sample that the proposal sees, with ``input_ids`` and perhaps ``labels`` and
            ``source``; None: the record is one.
        seed: seed of the order in which records are read.

    Raises:
        TypeError, ValueError: an argument is not as described above.
    """

    def __init__(
        self,
        data: Any,
        proposal: Proposal,
        *,
        count: int,
        read_ahead: int | None = None,
        passed_over: Literal["drop", "keep"] | None = None,
        encode: Callable[[Any], Sample] | None = None,
        seed: int = 0,
    ) -> None:
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TypeError(
                f"Expected data with a length, whose records are found by number, got {type(data).__name__}. For a "
                "stream there is CandidateStream(..., proposal=, read_ahead=)."
            )
        if not isinstance(proposal, Proposal):
            raise TypeError(f"Expected a Proposal of ftw_optim.proposals, got {type(proposal).__name__}.")
        if not len(data):
            raise ValueError("Expected at least one record, got none.")
        if not _counts(count, 1) or (read_ahead is not None and not _counts(read_ahead, count)):
            raise ValueError(
                f"Expected integers, count of at least 1 and read_ahead of at least count, got count={count} and "
                f"read_ahead={read_ahead}. read_ahead is the number of records among which the proposal chooses a "
                "step's candidates: their number divided by the share of useful records."
            )
        if passed_over not in ("drop", "keep", None):
            raise ValueError(f"passed_over must be 'drop' or 'keep', got {passed_over!r}.")
        if read_ahead is None and passed_over == "drop":
            raise ValueError(
                "passed_over='drop' needs a number as read_ahead: all records are read for the first step, and none "
                "would be left for the second."
            )
        self.data, self.proposal, self.count, self.seed, self.read_ahead = data, proposal, count, seed, read_ahead
        self.keep = passed_over == "keep" or read_ahead is None
        self._records = KnownRecords(data, proposal, encode)
        self._total = len(data)
        self._placed = 0  # how often the position was set anew
        self._ended: bool
        self._order: Tensor
        self._waiting: Tensor
        self._drawn: list[int]
        self._first: int | None  # what the next iterator begins with, where that is not what was not taken
        self._begin(0)

    @property
    def epoch(self) -> int:
        """The number of the epoch, counted from 0."""
        return self._epoch

    @property
    def read(self) -> int:
        """The number of records that were read in this epoch."""
        return self._read

    @property
    def given(self) -> int:
        """The number of records that were given out in this epoch."""
        return len(self._drawn)

    @property
    def taken(self) -> int:
        """The number of those that became candidates of a step, as far as :meth:`observe` and :meth:`skip` were told.

        The others wait in a loader.
        """
        return self._taken

    @property
    def passed_over(self) -> int:
        """The number of records that were read in this epoch and not given out, or not yet."""
        return self._read - len(self._drawn)

    def __len__(self) -> int:
        """The number of records that an epoch gives out."""
        if self.keep or self.read_ahead is None:
            return self._total
        rounds, rest = divmod(self._total, self.read_ahead)
        return rounds * self.count + min(self.count, rest)

    def __iter__(self) -> Iterator[int]:
        if self._ended and (not self._taken or len(self._drawn) - self._taken < self.count):
            self._begin(self._epoch + 1)
        self._ended = False
        at = self._taken if self._first is None else self._first
        placed, self._first = self._placed, None
        while at < len(self._drawn) or self._draw():
            yield self._drawn[at]
            at += 1
            if self._placed != placed:
                raise RuntimeError(
                    "The sampler was set to another epoch, or to the state of a checkpoint, while an iterator was on "
                    "its way: iterate anew."
                )
        self._ended = True

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless it is the present one and not over; trainers call this."""
        if epoch != self._epoch or self._ended:
            self._begin(epoch)

    def observe(self, selection: Selection, *, order: Tensor | None = None) -> None:
        """Let the proposal learn from a step, whose candidates were the next ones given out, in this order.

        Args:
            selection: the selection of the step.
            order: in a run of several processes that share one order of records, as a trainer's do: the candidate of
                all processes that each next one became, shape ``(n,)`` int64. Every process then learns the same. None:
                the candidates of this process, which has data and a sampler of its own.

        Raises:
            ValueError: there are more candidates than were given out.
        """
        selection = selection.own() if order is None else selection.in_order(order)
        numbers = self._next(len(selection.losses))
        self._records.observe(numbers, selection)
        self._taken += len(numbers)

    def coming(self, count: int) -> list[int]:
        """The numbers of the records that were given out and become candidates next, ``count`` at most."""
        return self._drawn[self._taken : self._taken + count]

    def skip(self, count: int) -> None:
        """Count the next ones given out as taken by a step without a selection.

        Raises:
            ValueError: there are fewer.
        """
        self._taken += len(self._next(count))

    def state_dict(self) -> dict[str, Any]:
        """The position, with what was given out and waits in a loader, and the state of the proposal."""
        return {
            "settings": self._settings(),
            "epoch": self._epoch,
            "read": self._read,
            "taken": self._taken,
            "ended": self._ended,
            "drawn": torch.tensor(self._drawn, dtype=torch.int64),
            "proposal": self.proposal.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, from_start: bool = False) -> None:
        """Go on as the sampler that gave this state would have, behind what was taken.

        Args:
            state_dict: a :meth:`state_dict`.
            from_start: whether the next iterator gives out the epoch from its start, for trainers that skip what was
                taken themselves.

        Raises:
            ValueError: the state is of a sampler with other settings; nothing is loaded.
        """
        if state_dict.get("settings") != self._settings():
            raise ValueError(
                f"Expected the state of a sampler with {self._settings()}, got {state_dict.get('settings')}: the "
                "records would not be those of the run that is resumed."
            )
        drawn = torch.as_tensor(state_dict["drawn"]).tolist()
        epoch, read, taken = (int(state_dict[name]) for name in ("epoch", "read", "taken"))
        self.proposal.load_state_dict(state_dict["proposal"])
        self._begin(epoch)
        self._drawn, self._read, self._taken = drawn, read, taken
        self._first = 0 if from_start else None
        # Behind its last record an epoch is over, though the loader may not have asked for another.
        self._ended = not from_start and (bool(state_dict["ended"]) or taken == len(self))
        if self.keep:
            given = torch.zeros(self._total, dtype=torch.bool)
            given[self._drawn] = True
            offered = self._order[:read]
            self._waiting = offered[~given[offered]]

    def _settings(self) -> dict[str, Any]:
        return {
            "records": self._total,
            "count": self.count,
            "read_ahead": self.read_ahead,
            "passed_over": "keep" if self.keep else "drop",
            "seed": self.seed,
        }

    def _begin(self, epoch: int) -> None:
        self._check_length()
        self._epoch, self._ended = epoch, False
        self._placed += 1
        generator = torch.Generator().manual_seed(salt("order", self.seed, epoch))
        self._order = torch.randperm(self._total, generator=generator)
        self._read = self._taken = 0
        self._first, self._drawn = None, []
        self._waiting = torch.empty(0, dtype=torch.int64)

    def _draw(self) -> bool:
        """Give out the next candidates; False where no record is left."""
        self._check_length()
        total = self._total
        upto = total if self.read_ahead is None else min(total, self._read + self.read_ahead - len(self._waiting))
        offered = torch.cat([self._waiting, self._order[self._read : upto]])
        if not len(offered):
            return False
        chosen = self._records.propose(offered, self.count)
        if self.keep:
            left = torch.ones(len(offered), dtype=torch.bool)
            left[chosen] = False
            self._waiting = offered[left]
        self._read = upto
        self._drawn += offered[chosen].tolist()
        return True

    def _check_length(self) -> None:
        if len(self.data) != self._total:
            raise ValueError(
                f"Expected the {self._total} records that the sampler was made for, got {len(self.data)}: make another "
                "one when records come or go."
            )

    def _next(self, count: int) -> Sequence[int]:
        numbers = self.coming(count)
        if len(numbers) < count:
            raise ValueError(
                f"Expected no more candidates than the {len(numbers)} given out and not taken, got {count}. Tell every "
                "step once, in turn, and where a step makes no selection, call skip(count)."
            )
        return numbers


def _counts(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
