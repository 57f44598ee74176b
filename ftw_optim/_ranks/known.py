"""The processes of an optimizer's selections, found out at its first step: groups are made by all of them together."""

from __future__ import annotations

from typing import Any, final

import torch.distributed as dist

from ftw_optim._ranks.ranks import Alone, Ranks, Several


@final
class KnownRanks:
    """The ranks of a selection, as long as the run is the same.

    Args:
        given: a process group, or a device mesh of one dimension; None: all processes of the run.

    Raises:
        TypeError: it is neither.
        ValueError: the mesh has several dimensions.
    """

    def __init__(self, given: Any = None) -> None:
        if given is not None and not isinstance(given, dist.ProcessGroup):
            if not hasattr(given, "get_group"):
                raise TypeError(f"Expected ranks as a ProcessGroup or a DeviceMesh, got {type(given).__name__}.")
            if given.ndim != 1:
                raise ValueError(
                    f"Expected ranks as a mesh of one dimension, got {given.ndim}: pass the one along which candidates "
                    'differ, such as mesh["dp"].'
                )
            given = given.get_group()
        self._given = given
        self._lost = False
        self._known: tuple[Any, Ranks] | None = None

    def __deepcopy__(self, memo: Any) -> KnownRanks:
        return KnownRanks(self._given)

    def __reduce__(self) -> tuple[Any, ...]:
        return (KnownRanks, ()) if self._given is None else (_lost, ())  # groups belong to their run

    def now(self, *, sharded: bool = False) -> Ranks:
        """The ranks of the coming step; where there are several, all of them ask at the same time.

        Args:
            sharded: whether each process holds a part of the parameters: one process is then not all there is to know.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return Alone()
        if self._lost:
            raise RuntimeError(
                "The group given as ranks is not part of a pickle: construct the optimizer anew with ranks=, and load "
                "its state."
            )
        group: Any = dist.group.WORLD if self._given is None else self._given
        if self._known is None or self._known[0] is not group:
            whole = dist.get_world_size(group) == 1 and not sharded
            self._known = group, (Alone() if whole else Several(group))
        return self._known[1]


def _lost() -> KnownRanks:
    """Ranks of a pickle that had a group, which is not known any more."""
    ranks = KnownRanks()
    ranks._lost = True
    return ranks
