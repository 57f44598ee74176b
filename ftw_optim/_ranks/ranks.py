"""The processes whose candidates are one selection, and all that they tell each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from ftw_optim._ranks.process_groups import own_groups

Found = TypeVar("Found")

_KNOWN = "_known_to_all_ranks"

END = "the end of its closure"
"""What a rank has come to that makes no further pass."""

BUCKET = 2**25
"""Bytes that are summed or exchanged at a time."""


class Ranks(ABC):
    """The processes whose candidates are one selection.

    Every method is called by all of them, in the same order.

    Attributes:
        own: the number of this process among them.
        count: their number.
        met: whether they have found that they begin with the same parameters.
        members: their numbers in the run.
    """

    own: int = 0
    count: int = 1
    met: bool = True
    members: Sequence[int] = (0,)

    @property
    def alone(self) -> bool:
        """Whether this process holds everything by itself."""
        return False

    @abstractmethod
    def told(
        self, work: Callable[[], Found], tell: Callable[[Found], Any], *, at: str = END
    ) -> tuple[Found, list[Any]]:
        """Do some work that may fail on any rank, and hear what came of it on all.

        Args:
            work: the work; nothing in it may wait for another rank, but where it is told something itself.
            tell: what the others are told of its result; small, and it can be pickled.
            at: what this rank has come to, the same on all.

        Returns:
            The result, and what each rank told.

        Raises:
            RuntimeError: another rank failed, or has come to something else. Where this one failed, its own error is
                raised.
        """

    @abstractmethod
    def as_first_says(self, work: Callable[[], Found]) -> Found:
        """The result of some work that the first rank does for all; it can be pickled.

        Raises:
            RuntimeError: it failed there. There its own error is raised.
        """

    @abstractmethod
    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all ranks, equal on each; the tensors have the same shapes and dtypes everywhere."""

    @abstractmethod
    def exchanged(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send a part of some values to each rank, and get one from each, in their order.

        Args:
            values: the parts one behind the other, shape ``(sum(sent),)``.
            sent: how many numbers go to each rank.
            received: how many numbers come from each rank.
        """

    def neighbours(self, size: int) -> Ranks:
        """This rank and those beside it, in groups of ``size`` from the first on; called by all of them together.

        Args:
            size: a divisor of :attr:`count`.
        """
        return self

    def beginning(self, work: Callable[[], Found]) -> Found:
        """The result of work before the first thing that is told of a step; if it fails, the others are told then."""
        if self.alone:
            return work()
        try:
            return work()
        except BaseException as error:
            failure = error

        def fail() -> Found:
            raise failure

        return self.told(fail, lambda _: None)[0]

    def any(self, work: Callable[[], bool]) -> bool:
        """Whether some work says so on any rank."""
        return any(self.told(work, bool)[1])

    def gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, in their order.

        Args:
            rows: this rank's, of the same width and dtype everywhere.
            counts: the number of rows of each rank.
        """
        own, width = rows.flatten(), rows.shape[1:].numel()
        found = self.exchanged(own.repeat(self.count), [own.numel()] * self.count, [width * count for count in counts])
        return found.view(-1, *rows.shape[1:])

    def joined(self, work: Callable[[], Tensor]) -> Tensor:
        """The small tensors that some work gives on each rank, one behind the other, on the CPU."""
        return torch.cat(self.told(work, lambda found: found.detach().cpu())[1])


@final
class Alone(Ranks):
    """A process by itself: nothing is sent, and nothing is copied."""

    @property
    def alone(self) -> bool:
        """See :class:`Ranks`."""
        return True

    def told(
        self, work: Callable[[], Found], tell: Callable[[Found], Any], *, at: str = END
    ) -> tuple[Found, list[Any]]:
        """See :class:`Ranks`."""
        found = work()
        return found, [tell(found)]

    def as_first_says(self, work: Callable[[], Found]) -> Found:
        """See :class:`Ranks`."""
        return work()

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`Ranks`."""
        return list(tensors)

    def exchanged(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See :class:`Ranks`."""
        return values


@final
class Several(Ranks):
    """The processes of a group, which talk over groups of their own: nothing meets the collectives of others.

    Args:
        group: the processes; the new groups are made by all of them together.
        members: some of them by their numbers in the run, this one among them; None: all.
    """

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int] | None = None) -> None:
        members = dist.get_process_group_ranks(group) if members is None else list(members)
        self.own, self.count, self.met = members.index(dist.get_rank()), len(members), False
        self._first = members[0]
        self._objects, self._tensors = own_groups(group, members)
        self.members: Sequence[int] = members
        self._group = group
        self._neighbours: dict[int, Ranks] = {}

    def neighbours(self, size: int) -> Ranks:
        """See :class:`Ranks`."""
        if size == self.count:
            return self
        if size not in self._neighbours:
            start = self.own // size * size
            few = self.members[start : start + size]
            self._neighbours[size] = Alone() if size == 1 else Several(self._group, few)
        return self._neighbours[size]

    def told(
        self, work: Callable[[], Found], tell: Callable[[Found], Any], *, at: str = END
    ) -> tuple[Found, list[Any]]:
        """See :class:`Ranks`."""
        found, error, message = _tried(work, tell)
        if error is not None and set(self.members) <= getattr(error, _KNOWN, frozenset()):
            raise error  # it was told on the way, and nobody waits any more
        messages: list[Any] = [None] * self.count
        dist.all_gather_object(messages, (*message, at), group=self._objects)
        if error is not None:
            raise _known(error, self.members)
        self._refuse([text for _, text, _ in messages])
        self._refuse_places([place for _, _, place in messages])
        return found, [given for given, _, _ in messages]

    def as_first_says(self, work: Callable[[], Found]) -> Found:
        """See :class:`Ranks`."""
        message: list[Any] = [None]
        error = None
        if self.own == 0:
            _, error, message[0] = _tried(work, lambda found: found)
        dist.broadcast_object_list(message, src=self._first, group=self._objects)
        if error is not None:
            raise error
        self._refuse([text for _, text in message])
        found: Found = message[0][0]
        return found

    def _refuse(self, texts: Sequence[str | None]) -> None:
        """Raise where another rank failed."""
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if failed:
            rank, text = self.members[failed[0][0]], failed[0][1]
            error = RuntimeError(f"Rank {rank} raised {text}. This rank has changed nothing either.")
            raise _known(error, self.members)

    def _refuse_places(self, places: Sequence[str]) -> None:
        """Raise where the ranks have come to different passes, in which they would wait for each other."""
        if len(set(places)) > 1:
            first = min(rank for rank, place in enumerate(places) if place != places[0])
            error = RuntimeError(
                f"Expected every rank to make the same passes of a model in shards, but rank {self.members[0]} has "
                f"come to {places[0]}, rank {self.members[first]} to {places[first]}. Give each rank target rows in "
                "as many batches, and call the model as often for a batch of candidates."
            )
            raise _known(error, self.members)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`Ranks`."""
        found: list[Tensor | None] = [None] * len(tensors)
        for numbers in _buckets(tensors):
            flat = torch.cat([tensors[number].detach().flatten() for number in numbers])
            dist.all_reduce(flat, group=self._tensors)
            for number, part in zip(
                numbers, torch.split(flat, [tensors[number].numel() for number in numbers]), strict=True
            ):
                found[number] = part.view(tensors[number].shape)
        return [tensor for tensor in found if tensor is not None]

    def exchanged(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See :class:`Ranks`."""
        found = values.new_empty(sum(received))
        dist.all_to_all_single(found, values, list(received), list(sent), group=self._tensors)
        return found


def _tried(
    work: Callable[[], Found], tell: Callable[[Found], Any]
) -> tuple[Found, BaseException | None, tuple[Any, str | None]]:
    """The result of some work, or the error it ended with, and the message about it."""
    try:
        found = work()
        return found, None, (tell(found), None)
    except BaseException as error:  # an interrupt too: the others would wait
        text = str(error).partition("\n")[0]
        return None, error, (None, f"{type(error).__name__}: {text}" if text else type(error).__name__)  # type: ignore[return-value]


def _known(error: BaseException, members: Sequence[int]) -> BaseException:
    """The error, marked as one that these processes have been told of."""
    with suppress(AttributeError):
        setattr(error, _KNOWN, frozenset(members) | getattr(error, _KNOWN, frozenset()))
    return error


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of tensors that are summed together: of one dtype and device, in order."""
    buckets: list[list[int]] = []
    size, kind = BUCKET, None
    for number, tensor in enumerate(tensors):
        if size + tensor.nbytes > BUCKET or kind != (tensor.dtype, tensor.device):
            buckets.append([])
            size, kind = 0, (tensor.dtype, tensor.device)
        buckets[-1].append(number)
        size += tensor.nbytes
    return buckets
