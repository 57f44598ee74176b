"""The inner products of rows' exact gradients, in the metric of the optimizer's coming step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from pays.damage import MARK
from pays.proposals import samples
from pays.records import Example
from pays.split import Entrance, Top
from torch import Tensor

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights
from ftw_optim.proposals import SimilarityProposal

from .ways import Rows

BATCH = 16


def products_of(
    top: Top,
    entrance: Entrance,
    optimizer: torch.optim.Optimizer,
    *,
    pool: Sequence[Example],
    target: Sequence[Example],
    held_out: Sequence[Example],
    own_source: str,
    tick: Callable[[int], object],
) -> Rows:
    """The rows with their products; nothing is changed.

    Args:
        top: the trained part of the model.
        entrance: holds what goes into it.
        optimizer: an AdamW after some steps; its ``P`` is taken at the mean gradient of all rows.
        pool: records.
        target: target rows that a step may run.
        held_out: target rows that no step sees.
        own_source: prefix of sources.
        tick: called with the number of rows whenever some are done.
    """
    rows = [*pool, *target]
    entrance.fill([*rows, *held_out])
    held_out_rows = entrance.rows(held_out)
    measuring = SelectiveOptimizer(
        optimizer, top, lambda: top(held_out_rows), filter=KeepAll(), weight=UniformWeights(), combine="factors"
    )

    def losses() -> Iterator[Tensor]:
        for at in range(0, len(rows), BATCH):
            some = rows[at : at + BATCH]
            yield top(entrance.rows(some))
            tick(len(some))

    measuring.zero_grad()
    measuring.backward(losses)
    measuring.zero_grad()
    found = measuring.selection
    assert found is not None
    return Rows(
        gram=found.gram.double(),
        held_out=found.cross_gram.double(),
        energy=found.target_energy,
        pool=range(len(pool)),
        target=range(len(pool), len(rows)),
        likeness=likeness(pool, target),
        plain_likeness=likeness(pool, target, contrast=False),
        own=[bool(own_source) and example.source.startswith(own_source) for example in pool] + [False] * len(target),
        tokens=torch.tensor([row.response_length for row in rows], dtype=torch.float64),
        damaged=[row.source.endswith(MARK) for row in rows],
    )


def likeness(rows: Sequence[Example], target: Sequence[Example], *, contrast: bool = True) -> Tensor:
    """Likeness of rows to the target rows, as :class:`SimilarityProposal` has it when it has read them: a rank."""
    proposal = SimilarityProposal(samples(target), contrast=contrast)
    order = proposal.propose(samples(rows), len(rows))
    ranks = torch.empty(len(rows))
    ranks[order] = torch.arange(len(rows), 0, -1.0)
    return ranks
