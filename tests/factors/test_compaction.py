"""Factors that wait multiplied out where that is smaller: the same gradients, in less memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw_optim import Factors
from ftw_optim._factors import buckets
from ftw_optim._factors.buckets import buckets_of
from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.compaction import compacted
from ftw_optim._factors.factors import PositionMap, materialise, weighted_sum
from tests.support.factors import random_factors
from tests.support.oracles import gradients


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "SMALL", 0)


def dense(n: int, t: int, rows: int, columns: int, seed: int = 0) -> Factors:
    return random_factors("dense", grid=(n, t), rows=rows, columns=columns, seed=seed)


@settings(max_examples=60)
@given(
    n=st.integers(1, 4),
    t=st.integers(1, 6),
    rows=st.integers(1, 4),
    columns=st.integers(1, 6),
    times=st.integers(1, 2),
    packed=st.booleans(),
)
def test_the_same_gradients_in_at_most_half_of_the_memory(
    n: int, t: int, rows: int, columns: int, times: int, packed: bool
) -> None:
    uses = [dense(n, t, rows, columns, seed) for seed in range(times)]
    if packed:  # the last candidate has no position of its own where there is but one
        owner = torch.arange(n * t).reshape(n, t) % max(1, n - 1)
        uses = [replace(use, positions=PositionMap(candidates=owner, count=n)) for use in uses]
    shape = torch.Size((rows, columns))
    found = compacted(uses, shape)
    expected = torch.stack([gradients(use) for use in uses]).sum(0)
    if 2 * 8 * n * rows * columns > sum(use.bytes() for use in uses):
        assert found is uses
        return
    (one,) = found
    assert one.whole
    assert 2 * one.bytes() <= sum(use.bytes() for use in uses)
    torch.testing.assert_close(materialise([one], 0, rows), expected, rtol=1e-12, atol=1e-12)
    weights = torch.arange(n, dtype=torch.float64)
    torch.testing.assert_close(
        weighted_sum([one], weights, shape), torch.einsum("n,nrc->rc", weights, expected), rtol=1e-12, atol=1e-12
    )


def test_what_has_no_outer_products_or_another_shape_stays_as_it_is() -> None:
    shape = torch.Size((2, 3))
    for kind in ("one-hot", "sum"):
        uses = [random_factors(kind, grid=(3, 50), rows=2, columns=3, seed=0)]
        assert compacted(uses, shape) is uses
    uses = [dense(3, 50, 2, 3), Factors.explicit(torch.randn(3, 2, 3, dtype=torch.float64), torch.empty(shape))]
    assert compacted(uses, shape) is uses
    convolution = [dense(3, 50, 2, 4)]
    assert compacted(convolution, torch.Size((2, 2, 2))) is convolution


def test_what_shares_a_bucket_as_it_is_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "SMALL", 2**20)
    uses = [dense(3, 50, 2, 3)]
    assert compacted(uses, torch.Size((2, 3))) is uses


def test_short_factors_are_multiplied_out_in_float32() -> None:
    use = dense(3, 50, 2, 3)
    short = replace(use, left=use.left.bfloat16(), right=use.right.bfloat16())  # type: ignore[union-attr]
    (one,) = compacted([short], torch.Size((2, 3)))
    assert one.dtype() == torch.float32
    torch.testing.assert_close(materialise([one], 0, 2), materialise([short], 0, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_candidate_that_is_not_finite_is_known_afterwards_too(bad: float) -> None:
    use = dense(4, 50, 2, 3)
    use.left[2, 7, 1] = bad
    (one,) = compacted([use], torch.Size((2, 3)))
    assert one.finite().tolist() == [True, True, False, True]
    without = one.without(~one.finite())
    assert without.finite().all()
    assert not materialise([without], 0, 2)[2].any()


def test_what_was_multiplied_out_shares_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = torch.Size((2, 3))
    uses = {str(seed): [dense(4, 50, 2, 3, seed)] for seed in range(5)}
    found = {name: compacted(some, shape) for name, some in uses.items()}
    monkeypatch.setattr(buckets, "SMALL", 8 * (5 + 4) * 6)  # room for these, not for the factors
    (bucket,) = buckets_of(found, dict.fromkeys(found, shape), dict.fromkeys(found, 0), limit=2**28)
    assert buckets_of(uses, dict.fromkeys(found, shape), dict.fromkeys(found, 0), limit=2**28) == []
    rows = bucket.materialise(Buffer())[:4].view(4, 5, *shape)
    expected = torch.stack([gradients(one) for (one,) in uses.values()], dim=1)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
