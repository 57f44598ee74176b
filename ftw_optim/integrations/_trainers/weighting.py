"""From the losses of positions to one loss for each candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim.integrations._trainers.packing import Documents

WEIGHTINGS = ("token_sum", "token_mean")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Weighting:
    """What the token losses of a candidate are divided by.

    Attributes:
        kind: ``"token_sum"``: ``n * sum / tokens of the window``, so that the mean over the candidates is the mean over
            all tokens; ``"token_mean"``: ``sum / own tokens``.
        count: ``n``, the candidates of the window.
        tokens: of each micro-batch, what stands for the tokens of the window: a scalar each.
    """

    kind: str
    count: int
    tokens: Sequence[Tensor]

    @classmethod
    def of(
        cls, kind: str, counted: Sequence[Tensor], documents: Sequence[Documents | None], *, over_window: bool = True
    ) -> Weighting:
        """The weighting of a window.

        Args:
            kind: see :class:`Weighting`.
            counted: of each micro-batch, which positions have a label, ``(b, t)``.
            documents: of each micro-batch, None where its rows are the candidates.
            over_window: as a trainer whose loss is the mean over all tokens of the window; False: the mean of the
                micro-batches' means.
        """
        labels = [part.sum() for part in counted]
        if over_window:
            tokens = [torch.stack(labels).sum().clamp(min=1)] * len(labels) if labels else []
        else:
            tokens = [one.clamp(min=1) * len(labels) for one in labels]
        pairs = zip(counted, documents, strict=True)
        sizes = (len(part) if packed is None else len(packed.origins) for part, packed in pairs)
        return cls(kind=kind, count=sum(sizes), tokens=tokens)

    def losses(self, batch: int, values: Tensor, counted: Tensor, documents: Documents | None) -> Tensor:
        """One loss for each candidate of a micro-batch.

        Args:
            batch: its number.
            values: shape ``(b, t)``, the loss of each position, zero where it has no label.
            counted: shape ``(b, t)``, which have one.
            documents: see :meth:`of`.
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
    # Positions of none go behind the last.
    return values.new_zeros(n + 1).index_add(0, owners.where(owners >= 0, n), values.flatten())[:n]
