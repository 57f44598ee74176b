"""Documents of packed rows, by whatever tells their boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftw_optim.integrations._trainers.packing import documents_of

LENGTHS = [3, 1, 4, 2]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
OWNERS = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None]
ENDS = torch.tensor([0, 3, 4, 8, 10], dtype=torch.int32)
EVERYWHERE = torch.ones(1, 10, dtype=torch.bool)


@pytest.mark.parametrize(
    "batch",
    [
        {"position_ids": POSITIONS},
        {"seq_idx": OWNERS.to(torch.int32)},
        {"cu_seq_lens_q": ENDS},
        {"position_ids": POSITIONS, "seq_idx": OWNERS, "cu_seq_lens_q": ENDS, "max_length_q": 4},
    ],
    ids=lambda batch: ", ".join(batch),
)
def test_documents_are_found_by_whatever_tells_their_boundaries(batch: dict[str, Any]) -> None:
    found = documents_of(batch, EVERYWHERE)
    assert found is not None
    assert torch.equal(found.sample_ids, OWNERS)
    assert found.origins == [0, 1, 2, 3]


def test_documents_without_labels_are_no_candidates() -> None:
    counted = EVERYWHERE & (OWNERS != 0) & (OWNERS != 2)
    found = documents_of({"position_ids": POSITIONS}, counted)
    assert found is not None
    assert found.sample_ids.tolist() == [[-1, -1, -1, 0, -1, -1, -1, -1, 1, 1]]
    assert found.origins == [1, 3]


def test_documents_of_several_rows() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    found = documents_of({"position_ids": positions}, torch.ones(2, 4, dtype=torch.bool))
    assert found is not None
    assert found.sample_ids.tolist() == [[0, 0, 1, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"position_ids": torch.arange(10)[None]},
        {"position_ids": POSITIONS, "attention_mask": torch.ones(1, 10)},
        {"cu_seq_lens_q": torch.tensor([0, 10])},
    ],
    ids=str,
)
def test_rows_of_one_document_each(batch: dict[str, Any]) -> None:
    assert documents_of(batch, EVERYWHERE) is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "end at the number of tokens, 10, got 4"),
        ({"seq_idx": torch.zeros(1, 3)}, r"Expected seq_idx of the tokens' shape \(1, 10\)"),
    ],
)
def test_boundaries_of_other_tokens(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents_of(batch, EVERYWHERE)
