"""Proposing: the choice of an item's samples among those read ahead, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations.streaming._screening import Sample
from ftw_optim.proposals import Proposal
from ftw_optim.proposals.interface import chosen_positions

_TENSOR = "tensor of "  # before the dtype, the one key of the mapping that stands for a tensor


@final
class Proposing:
    """Reads ahead, lets the proposal choose, and counts.

    Its position comes in two forms. A snapshot is taken before each item, so it shares what is never changed: samples,
    and the proposal's state. The packed form is made of JSON values.

    Args:
        proposal: the proposal.
        read_ahead: number of samples that it chooses from.
        passed_over: ``"drop"``: samples that were not chosen are forgotten; ``"keep"``: they are offered again.
        size: number of samples in an item.

    Raises:
        TypeError, ValueError: an argument is not as described above.
    """

    def __init__(
        self, proposal: Proposal, *, read_ahead: int | None, passed_over: Literal["drop", "keep"], size: int
    ) -> None:
        if not isinstance(proposal, Proposal):
            raise TypeError(f"Expected a Proposal of ftw_optim.proposals, got {type(proposal).__name__}.")
        if read_ahead is None or read_ahead < size:
            raise ValueError(
                f"Expected read_ahead of at least the {size} samples of an item, got {read_ahead}. It is the number of "
                "records among which the proposal chooses: an item's samples divided by the share of useful records."
            )
        if passed_over not in ("drop", "keep"):
            raise ValueError(f"passed_over must be 'drop' or 'keep', got {passed_over!r}.")
        self.proposal, self.read_ahead, self.keep, self.size = proposal, read_ahead, passed_over == "keep", size
        self.read: Mapping[str, int] = {}  # replaced, never changed: snapshots share them
        self.chosen: Mapping[str, int] = {}
        self._waiting: list[Sample] = []  # replaced, too
        self._later: Sequence[Any] = ()  # states of the proposal for the items after the next one
        self._first = True

    def passed_over(self) -> dict[str, int]:
        """The number of samples that were read and not chosen, or not yet, by source."""
        return {source: count - self.chosen.get(source, 0) for source, count in self.read.items()}

    def choose(self, sample: Callable[[], Sample | None], *, all_or_none: bool) -> list[Sample]:
        """The samples of the next item; fewer, if ``sample`` gives no more.

        Args:
            sample: reads the next sample; None at the end.
            all_or_none: whether to give none instead of fewer.

        Raises:
            ValueError: the proposal did not give positions.
        """
        offered = list(self._waiting)
        read = dict(self.read)
        while len(offered) < self.read_ahead and (found := sample()) is not None:
            offered.append(found)
            read[found["source"]] = read.get(found["source"], 0) + 1
        self.read = read
        if len(offered) < (self.size if all_or_none else 1):
            self._waiting = []
            return []
        wanted = min(self.size, len(offered))
        chosen = chosen_positions(self.proposal.propose(offered, self.size), wanted, len(offered))
        counts = dict(self.chosen)
        for position in chosen:
            source = offered[position]["source"]
            counts[source] = counts.get(source, 0) + 1
        self.chosen = counts
        if self.keep:
            taken = set(chosen)
            self._waiting = [sample for position, sample in enumerate(offered) if position not in taken]
            if self._first:
                packed(offered[0])  # what cannot be in a checkpoint is told now, not at the checkpoint
        self._first = False
        if self._later:
            self.proposal.load_state_dict(self._later[0])
            self._later = self._later[1:]
        return [dict(offered[position]) for position in chosen]  # positions still hold what was offered

    def observe(self, samples: Sequence[Mapping[str, Any]], selection: Selection) -> None:
        """Let the proposal learn from a step.

        Where less is read ahead than in the run that was resumed, states of later items are still to come. The latest
        of them learned most: it learns this, too, and holds from now on.
        """
        if self._later:
            self.proposal.load_state_dict(self._later[-1])
            self._later = ()
        self.proposal.observe(samples, selection)

    def snapshot(self) -> dict[str, Any]:
        """The position, which is never changed afterwards.

        Its states of the proposal are that for the next item and those for items after it; the last one holds from then
        on.
        """
        states = [self.proposal.state_dict(), *self._later]
        return {"read": self.read, "chosen": self.chosen, "waiting": self._waiting, "states": states}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go back to a snapshot.

        Raises:
            ValueError: a state is not one of this proposal.
        """
        states = position["states"]
        for state in reversed(states):  # all of them are checked, and the first one is what stays
            self.proposal.load_state_dict(state)
        self.read, self.chosen = dict(position["read"]), dict(position["chosen"])
        self._waiting, self._later = list(position["waiting"]), list(states[1:])


def packed(value: Any) -> Any:
    """The value as JSON values, from which :func:`unpacked` makes it again.

    Raises:
        TypeError: it holds something other than mappings by name, lists, tensors, numbers and text.
    """
    if isinstance(value, Tensor):
        return {f"{_TENSOR}{str(value.dtype).removeprefix('torch.')}": value.tolist()}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: packed(inner) for name, inner in value.items()}
    if type(value) is list:
        plain = all(type(inner) in (int, float, str) for inner in value)
        return value if plain else [packed(inner) for inner in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"Expected numbers, text, lists, tensors and mappings by name in what a checkpoint holds, got a "
        f"{type(value).__name__}. Let encode return lists, or pass passed_over='drop', which keeps no samples."
    )


def unpacked(value: Any) -> Any:
    """The value that :func:`packed` was given."""
    if isinstance(value, Mapping):
        if len(value) == 1 and (name := next(iter(value))).startswith(_TENSOR):
            return torch.tensor(value[name], dtype=getattr(torch, name.removeprefix(_TENSOR)))
        return {name: unpacked(inner) for name, inner in value.items()}
    if isinstance(value, list):
        plain = all(type(inner) in (int, float, str) for inner in value)
        return value if plain else [unpacked(inner) for inner in value]
    return value
