"""Dealing: the part of some samples that belongs to one of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Entry = TypeVar("Entry")


def check_rank(rank: int, ranks: int) -> None:
    """Raise a ValueError where ``rank`` is none of ``ranks``."""
    if ranks < 1 or not 0 <= rank < ranks:
        raise ValueError(
            f"Expected rank from 0 to ranks - 1, got rank={rank} and ranks={ranks}: pass torch.distributed.get_rank() "
            "and get_world_size()."
        )


def part_of(entries: Sequence[Entry], rank: int, ranks: int) -> list[Entry]:
    """The entries of one process: neighbours, as many as others have or one more, the first processes' first."""
    each, more = divmod(len(entries), ranks)
    start = rank * each + min(rank, more)
    return list(entries[start : start + each + (rank < more)])
