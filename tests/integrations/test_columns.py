"""Columns for the log, which pass the collator by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftw_optim.integrations._trainers.columns import WithColumns
from ftw_optim.integrations._trainers.micro_batch import IDS, SOURCES, MicroBatch


def test_columns_pass_the_collator_by() -> None:
    seen: list[Any] = []

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(rows)
        return {"labels": torch.tensor([row["labels"] for row in rows])}

    rows = [{"labels": [1, 2, 3], "name": "a", "from": "x"}, {"labels": [1, 2, 3], "name": "b", "from": "y"}]
    columns = WithColumns(collator, {IDS: "name", SOURCES: "from"})
    batch = MicroBatch.of(columns(rows))
    assert all(set(row) == {"labels"} for row in seen)
    assert batch.columns == {IDS: ["a", "b"], SOURCES: ["x", "y"]}
    assert set(batch.inputs) == {"labels"}


def test_columns_of_packed_rows_belong_to_documents() -> None:
    batch = {
        "labels": torch.tensor([[-100, 1, 1, -100, 2, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),  # the last is padding
        IDS: ["a", "b"],
    }
    assert MicroBatch.of(batch).columns == {IDS: ["a", "b"]}
    with pytest.raises(ValueError, match=f"one value of {SOURCES} for each of the packed documents, got 1"):
        MicroBatch.of({**batch, SOURCES: ["x"]})
