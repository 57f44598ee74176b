"""What the pass over some rows gives: their losses and factors; and those of several passes, joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors
from ftw_optim._factors.micro_batches import Footprint, joined, largest


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedRows:
    """The results of a pass over candidates, or over target rows that take part in the step.

    Attributes:
        losses: shape ``(n,)``, detached.
        found: factors of each captured parameter that was reached, multiplied by the scale; empty if they were handed
            over layer by layer.
        footprints: number of uses, multiplications and bytes of the factors of each parameter.
        computed_in: the dtypes that the losses and the captured layers were computed in.
    """

    losses: Tensor
    found: Mapping[str, Sequence[Factors]]
    footprints: Mapping[str, Footprint]
    computed_in: set[torch.dtype]


def together(batches: Sequence[CapturedRows]) -> CapturedRows:
    """The rows of several passes, in their order."""
    counts = [len(batch.losses) for batch in batches]
    names = dict.fromkeys(name for batch in batches for name in batch.found)
    found = {name: joined([batch.found.get(name, []) for batch in batches], counts) for name in names}
    return CapturedRows(
        losses=torch.cat([batch.losses for batch in batches]),
        found=found,
        footprints={name: Footprint.of(uses) for name, uses in found.items()}
        or largest(batch.footprints for batch in batches),
        computed_in=set.union(*(batch.computed_in for batch in batches)),
    )
