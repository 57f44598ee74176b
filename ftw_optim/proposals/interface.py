"""The interface of proposals, and the checks that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ftw_optim._matching.selection import Selection

Sample = Mapping[str, Any]


class Proposal(ABC):
    """The interface of proposals, which choose the candidates of a step among the records read for it.

    A sample is a mapping with ``input_ids`` (a list or a 1-D tensor of token ids), perhaps with ``labels`` (-100 where
    a token does not count) and ``source`` (a name). Calls come in turn: propose, step, observe. A proposal may learn
    from none, one or several observations between two calls of :meth:`propose`.

    A proposal may also have a method ``features(samples)``, a row of a matrix for each sample that depends on this
    sample alone, and take ``features=`` in both calls: then :class:`~ftw_optim.proposals.ProposedSampler` asks for the
    features of a record once, and hands over the records' numbers as samples.
    """

    @abstractmethod
    def propose(self, samples: Sequence[Sample], count: int) -> Tensor:
        """Positions of the ``count`` chosen samples, int64, all different.

        All positions where there are no more than ``count`` samples.
        """

    @abstractmethod
    def observe(self, samples: Sequence[Sample], selection: Selection) -> None:
        """Learn from a step.

        Args:
            samples: the step's candidates, in the order of the closure.
            selection: the selection among them.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, text, lists, tensors and dicts of these; later calls do not change it."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as the proposal that gave this state would have.

        Raises:
            ValueError: the state is of another kind of proposal, or of one with other settings; nothing is loaded.
        """


def check_count(count: int) -> None:
    """Raise a ValueError where ``count`` asks for nothing."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: the number of candidates of a step.")


def check_explore(explore: float, explore_by: str) -> None:
    """Raise a ValueError where the options of the uniform share are not valid."""
    if not 0.0 <= explore <= 1.0:
        raise ValueError(
            f"explore must be in [0, 1], got {explore}. It is the share of the candidates drawn uniformly: 1/8 is "
            "usual, 0 none."
        )
    if explore_by not in ("record", "source"):
        raise ValueError(f"explore_by must be 'record' or 'source', got {explore_by!r}.")


def check_best_share(best_share: float) -> None:
    """Raise a ValueError where the share of records that count as equally alike is none."""
    if not 0.0 <= best_share <= 1.0:
        raise ValueError(f"best_share must be in [0, 1], got {best_share}: a share of the records read.")


def observed(samples: Sequence[Sample], selection: Selection) -> Selection:
    """The selection among the samples: the whole one, or that among this process's candidates.

    Raises:
        ValueError: the samples are neither all candidates nor those of this process.
    """
    own = selection.own()
    for found in (selection, own):
        if len(samples) == len(found.cross_gram):
            return found
    n = len(own.cross_gram)
    raise ValueError(
        f"Expected the {n} candidates of the selection, in the order of the closure, got {len(samples)} samples."
    )


def check_state(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise a ValueError where a state has not the kind, the settings and the entries of the proposal's own state."""
    for name in ("kind", "settings"):
        if state_dict.get(name) != own[name]:
            raise ValueError(
                f"Expected the state of a proposal with {name} = {own[name]!r}, got {state_dict.get(name)!r}: make the "
                "proposal as it was made in the run that is resumed."
            )
    if missing := own.keys() - state_dict.keys():
        raise ValueError(
            f"Expected a whole state of the proposal, but {', '.join(sorted(missing))} is missing: "
            "begin anew, where it is the state of another release."
        )


def chosen_positions(found: Any, wanted: int, offered: int) -> list[int]:
    """What :meth:`Proposal.propose` returned, as a list; a ValueError where it is not what it should be."""
    positions = found.tolist() if isinstance(found, Tensor) else list(found)
    if len(positions) != wanted or len(set(positions)) != wanted or not set(positions) <= set(range(offered)):
        raise ValueError(
            f"Expected the proposal to give {wanted} different positions of {offered} samples, got {positions}."
        )
    return positions
