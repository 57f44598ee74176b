"""One micro-batch of a trainer: what the model gets, which labels count, and the columns for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._step.losses import IGNORED, shifted_labels
from ftw_optim.integrations._trainers.packing import BOUNDARIES, Documents, documents_of

IDS, SOURCES, TEXTS = COLUMNS = ("selection_sample_ids", "selection_sources", "selection_texts")
"""Keys under which a collator hands over columns for the log, which never reach the model."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """A batch of candidates, or of target examples.

    Attributes:
        inputs: the inputs of the model, with labels.
        counted: bool ``(b, t)``, the positions that have a label to predict; ``(b, 1)`` of candidates with one loss.
        divides: in the same shape, what the trainer divides the loss of a window by; ``counted``, but for releases of
            Transformers that count the first label of a row too, which nothing predicts.
        documents: the documents, where rows are packed from several candidates; else None.
        columns: columns for the log, by the keys :data:`COLUMNS`, with one value for each candidate.
        rows_each: number of rows of each candidate: first the first rows of all, then the second ones.
    """

    inputs: dict[str, Any]
    counted: Tensor
    divides: Tensor
    documents: Documents | None
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    rows_each: int = 1

    @classmethod
    def of(cls, batch: Mapping[str, Any], *, shifts: bool = True, counts_first: bool = False) -> MicroBatch:
        """The micro-batch from the output of a collator.

        Args:
            batch: inputs and labels ``(b, t)``, or ``(b,)`` where rows have one label each.
            shifts: whether the label of a position is predicted by the position before.
            counts_first: whether the trainer counts the first label of a row too.

        Raises:
            ValueError: the batch has no labels, or a column has fewer values than there are documents.
        """
        inputs = {key: value for key, value in batch.items() if key not in COLUMNS}
        labels = inputs.get("shift_labels")
        if labels is None and isinstance(inputs.get("labels"), Tensor):
            labels = shifted_labels(inputs["labels"]) if shifts else inputs["labels"]
        if labels is None:
            raise ValueError(
                "Expected batches with labels (-100 where a position does not count), got the keys "
                f"{sorted(inputs)}: use a data collator that makes them, such as DataCollatorForSeq2Seq or "
                "DataCollatorForLanguageModeling(mlm=False)."
            )
        counted = (labels != IGNORED).view(len(labels), -1)
        divides = counted
        if counts_first and isinstance(inputs.get("labels"), Tensor):
            divides = (inputs["labels"] != IGNORED).view(len(labels), -1)
        documents = documents_of(inputs, counted)
        columns = {key: _of_candidates(batch[key], documents, key) for key in COLUMNS if key in batch}
        return cls(inputs=inputs, counted=counted, divides=divides, documents=documents, columns=columns)

    @classmethod
    def of_pairs(cls, batch: Mapping[str, Any]) -> MicroBatch:
        """The micro-batch of pairs, each with one loss, from the output of a collator of preference data.

        Args:
            batch: ``input_ids`` and other tensors of ``2 b`` rows, the chosen answers before the rejected ones, and
                tensors with one entry for each of ``b`` pairs.

        Raises:
            ValueError: there are no rows, or not an even number of them.
        """
        inputs = {key: value for key, value in batch.items() if key not in COLUMNS}
        rows = inputs.get("input_ids")
        if not isinstance(rows, Tensor) or not rows.ndim or len(rows) % 2:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else f"the keys {sorted(inputs)}"
            raise ValueError(
                "Expected batches with input_ids of shape (2 b, t), the chosen answers of b pairs before the rejected "
                f"ones, got {got}: use the trainer's own DataCollatorForPreference."
            )
        counted = torch.ones(len(rows) // 2, 1, dtype=torch.bool, device=rows.device)
        columns = {key: _of_candidates(batch[key], None, key) for key in COLUMNS if key in batch}
        return cls(inputs=inputs, counted=counted, divides=counted, documents=None, columns=columns, rows_each=2)

    def __len__(self) -> int:
        return len(self.counted) if self.documents is None else len(self.documents.origins)

    def sample_ids(self) -> Tensor:
        """The candidate of each position, int64 ``(b, t)``; or of each row ``(r,)``, where candidates have several."""
        if self.documents is not None:
            return self.documents.sample_ids
        if self.rows_each > 1:
            return torch.arange(len(self), device=self.counted.device).repeat(self.rows_each)
        rows = torch.arange(len(self.counted), device=self.counted.device)
        return rows[:, None].expand(self.counted.shape)

    def rows(self, rows: Tensor) -> dict[str, Any]:
        """The inputs of the candidates at the indices ``rows``."""
        count = len(self.counted)
        several = torch.cat([rows + number * count for number in range(self.rows_each)])
        index = {count: rows, self.rows_each * count: several}
        return {
            key: value[index[len(value)].to(value.device)]
            if isinstance(value, Tensor) and value.ndim and len(value) in index
            else value
            for key, value in self.inputs.items()
        }


def _of_candidates(values: Any, documents: Documents | None, key: str) -> list[Any]:
    """The values of a column for the candidates, in their order."""
    column: list[Any] = values.tolist() if isinstance(values, Tensor) else list(values)
    if documents is None:
        return column
    if len(column) <= max(documents.origins, default=-1):
        raise ValueError(
            f"Expected one value of {key} for each of the packed documents, got {len(column)} for document "
            f"{max(documents.origins)}: packed datasets keep no columns beside the tokens; leave the names of columns "
            "out, or train without packing."
        )
    return [column[origin] for origin in documents.origins]


def columns_of(batches: Sequence[MicroBatch]) -> dict[str, list[Any]]:
    """The columns that all micro-batches have, each for the candidates of all of them."""
    keys = [key for key in COLUMNS if all(key in batch.columns for batch in batches)]
    return {key: [value for batch in batches for value in batch.columns[key]] for key in keys}


_PADDING = {"labels": IGNORED, "shift_labels": IGNORED}


def joined_batches(batches: Sequence[MicroBatch]) -> MicroBatch:
    """All micro-batches in one, padded on the right.

    Raises:
        ValueError: rows are packed, or an input tensor is not of shape ``(b, t)``.
    """
    if any(batch.documents is not None for batch in batches):
        raise ValueError(
            'combine="rerun" takes one batch, and packed rows cannot be put together: use combine="factors" or "graph" '
            "or gradient_accumulation_steps=1."
        )
    longest = max(batch.counted.shape[1] for batch in batches)
    inputs: dict[str, Any] = {}
    for key, first in batches[0].inputs.items():
        if key in BOUNDARIES and key != "position_ids":
            continue
        parts = [batch.inputs[key] for batch in batches]
        shapes_fit = all(
            isinstance(part, Tensor) and part.shape == batch.counted.shape
            for part, batch in zip(parts, batches, strict=True)
        )
        if not isinstance(first, Tensor):
            inputs[key] = first
        elif shapes_fit:
            inputs[key] = torch.cat([_padded(part, longest, _PADDING.get(key, 0)) for part in parts])
        else:
            raise ValueError(
                f'combine="rerun" puts a window into one batch, but {key} has the shape {tuple(first.shape)} beside '
                f'{tuple(batches[0].counted.shape)} tokens: use combine="factors" or "graph", or '
                "gradient_accumulation_steps=1."
            )
    return MicroBatch(
        inputs=inputs,
        counted=torch.cat([_padded(batch.counted, longest, False) for batch in batches]),
        divides=torch.cat([_padded(batch.divides, longest, False) for batch in batches]),
        documents=None,
        columns=columns_of(batches),
    )


def _padded(part: Tensor, length: int, value: float) -> Tensor:
    return torch.nn.functional.pad(part, (0, length - part.shape[1]), value=value)
