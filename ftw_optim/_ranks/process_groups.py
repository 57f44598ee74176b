"""Groups of processes of the step's own, over which nothing of the user's or of a framework's is sent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_made: list[tuple[Any, Any, Sequence[int], tuple[Any, Any]]] = []
"""The run, a group of the user's in it, some of its processes, and the two groups that were made for these."""


def own_groups(group: dist.ProcessGroup, members: Sequence[int]) -> tuple[Any, Any]:
    """Two groups for processes of one: for objects and for tensors.

    They are made once, whatever number of optimizers there is: each has threads of its own, which never rest.
    """
    run = dist.group.WORLD
    _made[:] = [one for one in _made if one[0] is run]
    for _, known, these, groups in _made:
        if known is group and these == members:
            return groups
    # Objects go over the network of the hosts, whatever the tensors take: a failure must be told while a device waits.
    options: dict[str, Any] = {"timeout": _timeout(group), "use_local_synchronization": True}
    groups = (
        dist.new_group(members, backend="gloo", **options),
        dist.new_group(members, backend=dist.get_backend(group), **options),
    )
    _made.append((run, group, members, groups))
    return groups


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long the user lets the processes of the group wait for each other; None where it does not say."""
    for device in ("cpu", "cuda"):
        with suppress(Exception):  # a group has no backend for some device, and none promises to tell
            found: timedelta = group._get_backend(torch.device(device)).options._timeout
            return found
    return None
