"""The selection as each of several processes sees it."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.selections import selection


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 5))
def test_the_parts_of_processes_are_the_whole(counts: list[int], seed: int) -> None:
    n = sum(counts)
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]
    rejected = torch.tensor([row for row in range(n) if row not in kept.tolist()][:1], dtype=torch.int64)
    gram = torch.arange(n * n, dtype=torch.float64).view(n, n)
    whole = selection(seed, n=n, keep=len(kept), kept=kept, rejected=rejected, gram=gram)
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    parts = [
        replace(whole, mine=slice(start, start + count)).own() for start, count in zip(starts, counts, strict=True)
    ]
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    assert torch.equal(torch.cat([part.cross_gram for part in parts]), whole.cross_gram)
    spread = torch.cat([part.spread_weights() for part in parts])
    assert torch.equal(spread, whole.spread_weights())
    assert sum(len(part.rejected) for part in parts) == len(rejected)
    for part, start, count in zip(parts, starts, counts, strict=True):
        assert torch.equal(part.gram, gram[start : start + count, start : start + count])
    assert whole.own() is whole
