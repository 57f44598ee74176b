"""Likeness to the target rows beyond that to the stream: against means formed row by row, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ftw_optim.integrations.streaming._proposing import packed
from ftw_optim.proposals import Proposal, SimilarityProposal, VettedProposal
from ftw_optim.proposals import contrast as module
from ftw_optim.proposals.contrast import Contrast
from tests.support.selections import of_scores

COMMON, RARE = list(range(8)), list(range(20, 28))
"""Tokens of every text, and of the target's kind."""
TARGET = [{"input_ids": [*COMMON, *RARE]}]
MAKERS: dict[str, Callable[..., Any]] = {"similar": SimilarityProposal, "vetted": VettedProposal}


def points(n: int, d: int, *, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60)
@given(calls=st.lists(st.integers(0, 9), min_size=1, max_size=4), d=st.integers(1, 6), seed=st.integers(0, 999))
def test_it_is_the_likeness_to_the_mean_target_less_that_to_the_mean_of_the_stream(
    calls: list[int], d: int, seed: int
) -> None:
    target = functional.normalize(points(3, d, seed=seed + 1), dim=1).mean(0)
    contrast, offered = Contrast(target), points(0, d, seed=0)
    for number, n in enumerate(calls):
        contrast.see(points(n, d, seed=seed + 2 + number), torch.arange(n), salt=seed)
        offered = torch.cat([offered, points(n, d, seed=seed + 2 + number)])
    asked = points(5, d, seed=seed + 100)
    stream = functional.normalize(offered, dim=1).mean(0) if len(offered) else torch.zeros(d, dtype=torch.float64)
    expected = [
        functional.cosine_similarity(row, target, dim=0) - row @ stream / row.norm() / target.norm() for row in asked
    ]
    # The means are of numbers of 24 bits.
    torch.testing.assert_close(
        contrast.likeness(asked), torch.stack(expected), rtol=0, atol=1e-5 / float(target.norm())
    )


def test_of_very_many_records_as_many_as_are_needed_are_seen_whatever_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SEEN", 200)
    columns, keys = points(2000, 3, seed=0) + 1.0, torch.arange(2000)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    one, other, whole = (Contrast(points(1, 3, seed=2)[0]) for _ in range(3))
    one.see(columns, keys, salt=5)
    other.see(columns[order], keys[order], salt=5)
    assert packed(one.state_dict()) == packed(other.state_dict())
    assert one.state_dict()["count"] == 200
    monkeypatch.setattr(module, "_SEEN", 2000)
    whole.see(columns, keys, salt=5)
    asked = points(50, 3, seed=3)
    assert float((one.likeness(asked) - whole.likeness(asked)).abs().max()) < 0.25


def offered(generator: torch.Generator) -> list[dict[str, Any]]:
    """Twenty short records of common tokens, and twenty long ones, of which five share some of the target's own."""
    records = []
    for number in range(40):
        common = torch.randperm(8, generator=generator).tolist()
        others = (100 + torch.randperm(500, generator=generator)[:12]).tolist()
        if number < 20:
            ids = common[:3]
        elif number < 35:
            ids = [*common[:4], *others]
        else:
            ids = [*common[:3], *others[:10], *(RARE[place] for place in torch.randperm(8, generator=generator)[:3])]
        prompt = len(ids) // 2
        records.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "kind": number >= 35})
    return records


def share_of_the_kind(proposal: Any, *, steps: int = 20, score: float = 0.1) -> float:
    """What share of 5 of 40 are of the target's kind; scores rise with that."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        records = offered(generator)
        chosen = [records[place] for place in proposal.propose(records, 5).tolist()]
        found += [one["kind"] for one in chosen]
        scores = torch.tensor([score if one["kind"] else 0.5 * score for one in chosen])
        proposal.observe(chosen, of_scores(scores + 0.02 * torch.randn(5, generator=generator), torch.ones(5)))
    return sum(found) / len(found)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_short_records_of_what_all_texts_share_are_not_taken_for_the_targets_kind(make: Callable[..., Any]) -> None:
    """Nor does it matter that the target rows are labelled throughout, and the records have prompts."""
    assert share_of_the_kind(make(TARGET, contrast=False)) < 0.1
    assert share_of_the_kind(make(TARGET)) > 0.6  # by chance an eighth


def test_a_stream_like_the_target_is_taken_at_random() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randperm(40, generator=generator)[:8].tolist()} for _ in range(400)]
    target, stream = rows[:200], rows[200:]
    proposal = SimilarityProposal(target, dim=64)
    features = proposal.features(stream)
    proposal.propose(stream, 1)
    counted = proposal._contrast.likeness(proposal._features.plain_columns(features))
    alone = SimilarityProposal(target, contrast=False).features(stream)[:, 3].double()
    assert float(counted.std()) < 0.2 * float(alone.mean())
    assert float(counted.mean().abs()) < 0.05


def test_a_record_without_tokens_comes_last() -> None:
    records: list[dict[str, Any]] = [{"input_ids": []}, {"input_ids": [1, 2]}, {"input_ids": []}, {"input_ids": [3, 4]}]
    for make in MAKERS.values():
        assert set(make(TARGET).propose(records, 2).tolist()) == {1, 3}


@pytest.mark.parametrize("dim", [4, 64])
def test_with_an_embedding_means_are_compared(dim: int) -> None:
    """With fewer columns than it is wide, random directions of it."""
    embedding = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    proposal = SimilarityProposal(TARGET, embedding=embedding, dim=dim)
    assert proposal.features(TARGET).shape == (1, 4 + min(dim, 16))
    found: Sequence[int] = proposal.propose(offered(torch.Generator().manual_seed(0)), 5).tolist()
    assert len(set(found)) == 5
    embedding[7] = torch.inf
    with pytest.raises(ValueError, match="Expected an embedding of finite numbers"):
        SimilarityProposal(TARGET, embedding=embedding)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(make: Callable[..., Proposal]) -> None:
    proposal = make(TARGET)
    proposal.propose(offered(torch.Generator().manual_seed(0)), 3)
    state = proposal.state_dict()
    before, whole = packed(state), torch.zeros(256, dtype=torch.int64)
    for stream, said in (
        ({}, "Expected a sum and a count of the stream"),
        ({"sum": whole[:7], "count": 3}, "as 256 integers and their number, got torch.int64 of shape"),
        ({"sum": whole.double(), "count": 3}, "as 256 integers and their number, got torch.float64"),
        ({"sum": whole, "count": -1}, "and -1: begin anew"),
    ):
        with pytest.raises(ValueError, match=said):
            proposal.load_state_dict({**state, "stream": stream})
    with pytest.raises(ValueError, match="settings"):
        proposal.load_state_dict(make(TARGET, contrast=False).state_dict())
    assert packed(proposal.state_dict()) == before
