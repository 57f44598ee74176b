"""Kernel herding: records chosen one after the other, so that the mean of all of them comes nearest to the target's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from ftw_optim.proposals.drawing import uniforms

_AT_ONCE = 256  # records that are measured together: so many stay in a processor's cache
_IN_QUESTION = 16  # records, for each to be chosen, among which those already chosen in a call are counted in


@final
class Herding:
    """The records chosen so far, and those that would bring their mean nearest to the mean of the target rows.

    Every record is a point on a sphere. To be alike to the target's mean is not enough: twelve records that say the
    same are one, and what has been chosen for many steps is no longer missing. The record that takes most off the
    squared distance of the two means is the one with the largest ``(N + 1) m . x - S . x``, where ``m`` is the mean of
    the target rows, and ``S`` the sum of the ``N`` records before it (Chen, Welling and Smola 2010, "Super-samples from
    kernel herding"). The first one is the most alike, and where nothing in the data is like the target, so are all.

    Args:
        target: the mean of the target rows, each of length one, shape ``(d,)`` float64.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._sum, self._count = torch.zeros_like(target), 0

    def scores(self, columns: Tensor, keys: Tensor, count: int, salt: int, noise: Tensor | None = None) -> Tensor:
        """Numbers that are the higher, the earlier a record is chosen, shape ``(n,)`` float64; -1 of all but ``count``.

        Args:
            columns: features of the records, shape ``(n, d)``, of any length.
            keys: shape ``(n,)`` int64; among equal ones these and ``salt`` decide.
            count: the number of records to be chosen.
            salt: the seed of that.
            noise: added to the likeness of each record, shape ``(n,)``; None: nothing is.
        """
        # What is missing of the target's mean, and of that of the next record.
        direction = self._target - self._sum / (self._count + 1)
        known = torch.cat([_units(part) @ direction for part in torch.split(columns, _AT_ONCE)])
        noise = torch.zeros_like(known) if noise is None else noise
        shuffled = uniforms(keys, salt).argsort(stable=True)
        ahead = (known + noise)[shuffled].argsort(descending=True, stable=True)[: _IN_QUESTION * count]
        places = shuffled[ahead.sort().values]  # in an order, and so with a rounding, that is not that of the records
        units, noise = _units(columns[places]), noise[places]
        likeness, values = units @ self._target, (self._count + 1) * (units @ direction)
        found = torch.full_like(known, -1.0)
        for number in range(min(count, len(places))):
            best = int((values / (self._count + number + 1) + noise).argmax())
            found[places[best]] = count - number
            values += likeness - units @ units[best]
            values[best] = -torch.inf
        return found

    def note(self, columns: Tensor) -> None:
        """Count records as chosen; of features as in :meth:`scores`."""
        self._sum, self._count = self._sum + _units(columns).sum(0), self._count + len(columns)

    def state_dict(self) -> dict[str, Any]:
        """What was chosen."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from that.

        Raises:
            ValueError: it is of another form; nothing is loaded.
        """
        found = torch.as_tensor(state_dict["sum"], dtype=torch.float64, device="cpu")
        if found.shape != self._sum.shape or not bool(found.isfinite().all()):
            raise ValueError(
                f"Expected the sum of the records chosen so far as {len(self._sum)} finite numbers, got "
                f"{tuple(found.shape)}: begin anew."
            )
        self._sum, self._count = found.clone(), int(state_dict["count"])


def _units(columns: Tensor) -> Tensor:
    """Columns of length one, float64; zero where they are."""
    return functional.normalize(columns.double(), dim=1)
