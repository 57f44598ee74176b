"""Packed documents: which position of a row belongs to which document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

BOUNDARIES = ("seq_idx", "cu_seq_lens_q", "position_ids")
"""Keys of a batch that tell where documents begin, as the collators of Transformers and TRL write them."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """The documents of a batch whose rows hold several.

    Attributes:
        sample_ids: shape ``(b, t)`` int64, the candidate of each position; -1 in documents without a label, such as
            padding.
        origins: the number of each candidate's document in the batch.
    """

    sample_ids: Tensor
    origins: list[int]


def documents_of(batch: Mapping[str, Any], counted: Tensor) -> Documents | None:
    """The documents of a batch; None where each row is a single document.

    Args:
        batch: the inputs of a model.
        counted: bool ``(b, t)``, the positions that have a label to predict.

    Raises:
        ValueError: the boundaries do not fit the shape of the tokens.
    """
    starts = _starts(batch, counted)
    if starts is None or int(starts.sum()) == len(starts):
        return None
    numbers = (starts.flatten().cumsum(0) - 1).view_as(starts)
    labels = torch.zeros(int(numbers[-1, -1]) + 1, dtype=torch.int64, device=numbers.device)
    labels.index_add_(0, numbers.flatten(), counted.flatten().to(torch.int64))
    origins = labels.nonzero()[:, 0]
    renumbered = torch.full_like(labels, -1)
    renumbered[origins] = torch.arange(len(origins), device=numbers.device)
    return Documents(sample_ids=renumbered[numbers], origins=origins.tolist())


def _starts(batch: Mapping[str, Any], counted: Tensor) -> Tensor | None:
    """Mask of the first position of each document, bool ``(b, t)``; None where the batch does not tell it."""
    starts = torch.zeros_like(counted)
    if isinstance(ends := batch.get("cu_seq_lens_q"), Tensor):
        flat = starts.view(-1)
        if int(ends[-1]) != len(flat):
            raise ValueError(
                f"Expected cu_seq_lens_q to end at the number of tokens, {len(flat)}, got {int(ends[-1])}."
            )
        flat[ends[:-1].to(torch.int64)] = True
    elif isinstance(numbers := batch.get("seq_idx"), Tensor):
        starts[:, 1:] = _like(numbers, counted, "seq_idx").diff(dim=1) != 0
    elif isinstance(positions := batch.get("position_ids"), Tensor) and batch.get("attention_mask") is None:
        # As attention masks of packed rows are built; beside an attention mask, positions do not show documents.
        starts[:, 1:] = _like(positions, counted, "position_ids").diff(dim=1) != 1
    else:
        return None
    starts[:, 0] = True
    return starts


def _like(values: Tensor, counted: Tensor, name: str) -> Tensor:
    if values.ndim != 2 or values.shape[1] != counted.shape[1] or len(values) not in (1, len(counted)):
        raise ValueError(
            f"Expected {name} of the tokens' shape {tuple(counted.shape)} to tell where documents begin, got "
            f"{tuple(values.shape)}."
        )
    return values.expand_as(counted)
