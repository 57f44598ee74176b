"""The weighting of positions: one loss for each candidate from the losses of its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim.integrations._trainers.packing import Documents
from ftw_optim.integrations._trainers.processes import Processes

WEIGHTINGS = ("token_sum", "token_mean")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Weighting:
    """The divisors of the candidates' summed token losses.

    Attributes:
        kind: ``"token_sum"``: ``n * sum / tokens of the window``, so that the mean over the candidates is the mean over
            all tokens; ``"token_mean"``: ``sum / own tokens``.
        count: ``n``, the number of candidates in the window.
        tokens: for each micro-batch, the number to use for the tokens of the window, a scalar.
    """

    kind: str
    count: int
    tokens: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        kind: str,
        counted: Sequence[Tensor],
        documents: Sequence[Documents | None],
        *,
        over_window: bool = True,
        processes: Processes | None = None,
    ) -> Weighting:
        """The weighting of a window.

        Args:
            kind: see :class:`Weighting`.
            counted: for each micro-batch, the mask ``(b, t)`` of the positions that count in the number of tokens.
            documents: for each micro-batch, its documents; None where its rows are the candidates.
            over_window: whether the trainer's loss is the mean over all tokens of the window; False: it is the mean of
                the micro-batches' means.
            processes: those that have parts of the window; None: this is the whole of it.
        """
        pairs = zip(counted, documents, strict=True)
        count = sum(len(part) if packed is None else len(packed.origins) for part, packed in pairs)
        labels = [part.sum() for part in counted]
        if processes is None or processes.count == 1:
            window = [torch.stack(labels).sum().clamp(min=1)] * len(labels) if labels else []
            shares = len(labels)
        else:
            count, total, shares = processes.totals(count, sum(map(int, labels)), len(labels))
            window = [torch.full_like(one, max(1, total)) for one in labels]
        tokens = window if over_window else [one.clamp(min=1) * shares for one in labels]
        return cls(kind=kind, count=count, tokens=tokens)

    def losses(self, batch: int, values: Tensor, counted: Tensor, documents: Documents | None) -> Tensor:
        """One loss for each candidate of a micro-batch.

        Args:
            batch: the number of the micro-batch.
            values: shape ``(b, t)``, the loss of each position, zero where it has no label.
            counted: the mask ``(b, t)`` of the positions that have a label.
            documents: the documents of the micro-batch; None where its rows are the candidates.
        """
        sums = _by_candidate(values, documents)
        if self.kind == "token_sum":
            return sums * self.count / self.tokens[batch]
        return sums / _by_candidate(counted.to(values.dtype), documents).clamp(min=1)


def _by_candidate(values: Tensor, documents: Documents | None) -> Tensor:
    """Sums over each candidate's positions."""
    if documents is None:
        return values.sum(dim=1)
    n = len(documents.origins)
    owners = documents.sample_ids.flatten()
    # Positions that belong to no candidate are added to one further entry.
    return values.new_zeros(n + 1).index_add(0, owners.where(owners >= 0, n), values.flatten())[:n]
