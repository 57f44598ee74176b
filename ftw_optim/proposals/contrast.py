"""Likeness to the target rows beyond that to the stream: what records are alike in that the stream is not, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from ftw_optim.proposals.drawing import uniforms
from ftw_optim.proposals.features import AT_ONCE

_SEEN = 4096  # records of a call that tell what the stream is like: their mean is known to a hundredth then
_ONE = 1 << 24  # sums are of integers, so that the order of the records does not change them


@final
class Contrast:
    """How much more alike records are to the target rows than to the records that were on offer so far.

    Most of what makes two texts alike is shared by all texts: the words of the language, and that short ones have few
    others. So a record counts by ``(m - p) . x / |m|``, where ``x`` is its point on a sphere, ``m`` the mean of the
    target rows and ``p`` that of the stream: its likeness less a part for what the stream has anyway. That is the
    function which tells the two apart best (the witness function of the maximum mean discrepancy; Gretton and others
    2012, "A kernel two-sample test"). Where target and stream are the same, all records count alike.

    Args:
        target: the mean ``m`` of the target rows, each of length one, shape ``(d,)`` float64.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._sum, self._count = torch.zeros(len(target), dtype=torch.int64), 0

    def see(self, columns: Tensor, keys: Tensor, salt: int) -> None:
        """Count the records of a call as part of the stream; of very many, some that are drawn.

        Args:
            columns: features of the records, shape ``(n, d)``, of any length.
            keys: shape ``(n,)`` int64, of which the draw is a function.
            salt: the seed of the draw.
        """
        if len(columns) > _SEEN:
            columns = columns[uniforms(keys, salt).argsort(stable=True)[:_SEEN]]
        self._sum = self._sum + (_units(columns) * _ONE).round().long().sum(0)
        self._count += len(columns)

    def likeness(self, columns: Tensor) -> Tensor:
        """What records count, shape ``(n,)`` float64; without any token less than all others."""
        direction = self._target - self._sum / (max(self._count, 1) * _ONE)
        direction = direction / self._target.norm().clamp(min=1e-12)
        found = torch.cat([_units(part) @ direction for part in torch.split(columns, AT_ONCE)])
        return torch.where(columns.any(1), found, -torch.inf)

    def state_dict(self) -> dict[str, Any]:
        """What the stream was like."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from that.

        Raises:
            ValueError: it is of another form; nothing is loaded.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(f"Expected a sum and a count of the stream, got {', '.join(state_dict)}: begin anew.")
        found, count = torch.as_tensor(state_dict["sum"], device="cpu"), int(state_dict["count"])
        if found.shape != self._sum.shape or found.dtype != torch.int64 or count < 0:
            raise ValueError(
                f"Expected the sum of the stream's records as {len(self._sum)} integers and their number, got "
                f"{found.dtype} of shape {tuple(found.shape)} and {count}: begin anew."
            )
        self._sum, self._count = found.clone(), count


def _units(columns: Tensor) -> Tensor:
    """Columns of length one, float64; zero where they are."""
    return functional.normalize(columns.double(), dim=1)
