"""Parameters that share a bucket: the same gradients as each has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import Factors
from ftw_optim._factors import buckets
from ftw_optim._factors.buckets import Bucket, buckets_of
from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.factors import PositionMap, materialise, projection, weighted_sum
from tests.support.factors import random_factors

SIZES = st.tuples(*[st.integers(1, 5)] * 5)


def some(sizes: tuple[int, int, int, int, int], kind: str, dtype: torch.dtype = torch.float64) -> list[Factors]:
    count, n, t, rows, columns = sizes
    drawn = [random_factors(kind, grid=(n, t), rows=rows, columns=columns, seed=seed) for seed in range(count)]
    return [Factors(left=f.left.to(dtype), right=None if f.right is None else f.right.to(dtype)) for f in drawn]


def shape_of(use: Factors) -> torch.Size:
    return torch.Size((use.rows, use.columns) if use.right is not None else (use.rows,))


@settings(max_examples=60)
@given(sizes=SIZES, kind=st.sampled_from(["dense", "sum"]), seed=st.integers(0, 3))
def test_a_bucket_has_the_gradients_of_its_parameters(
    sizes: tuple[int, int, int, int, int], kind: str, seed: int
) -> None:
    uses = some(sizes, kind)
    shape, n = shape_of(uses[0]), sizes[1]
    bucket, buffer = Bucket(names=[str(number) for number in range(len(uses))], uses=uses, shape=shape), Buffer()
    buffer.of(10**4, torch.float64, torch.device("cpu")).fill_(torch.nan)
    out = bucket.materialise(buffer)
    assert out.shape == (n + 1, len(uses) * shape.numel())
    expected = torch.cat([materialise([use], 0, use.rows).flatten(1) for use in uses], dim=1)
    torch.testing.assert_close(out[:n], expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 0.5
    weights = torch.where(torch.arange(n) % 2 == seed % 2, weights, 0.0)
    for use, found in zip(uses, bucket.weighted_sum(weights, buffer), strict=True):
        torch.testing.assert_close(found, weighted_sum([use], weights, shape), rtol=1e-12, atol=1e-12)
    left, right = (torch.randn(len(uses), size, dtype=torch.float64) for size in (uses[0].rows, uses[0].columns))
    values, sizes = bucket.projection(weights, left, right, buffer)
    for number, use in enumerate(uses):
        value, size = projection([use], weights, left[number], right[number])
        torch.testing.assert_close(values[number], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sizes[number], size, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_factors_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    uses = some((3, 4, 2, 3, 5), "dense", dtype)
    bucket = Bucket(names=["a", "b", "c"], uses=uses, shape=shape_of(uses[0]))
    assert bucket.dtype == torch.float32
    out = bucket.materialise(Buffer())[:4]
    expected = torch.cat([materialise([use], 0, use.rows).flatten(1) for use in uses], dim=1)
    torch.testing.assert_close(out, expected)
    assert bucket.weighted_sum(torch.ones(4), Buffer()).dtype == torch.float32


@given(
    where=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(["left", "right"]))),
    bad=st.sampled_from([float("nan"), float("inf")]),
)
def test_a_candidate_is_finite_where_all_its_factors_are(where: set[tuple[int, int, str]], bad: float) -> None:
    uses = some((3, 4, 2, 3, 5), "dense")
    for number, candidate, side in where:
        part: Tensor = getattr(uses[number], side)
        part[candidate, 0, 0] = bad
    expected = torch.stack([use.finite() for use in uses]).all(0)
    assert torch.equal(Bucket(names=["a", "b", "c"], uses=uses, shape=shape_of(uses[0])).finite(Buffer()), expected)


@settings(max_examples=40)
@given(count=st.integers(1, 9), largest=st.integers(1, 3000), kinds=st.integers(1, 2))
def test_each_parameter_is_in_one_bucket_at_most_and_parts_are_equal(count: int, largest: int, kinds: int) -> None:
    uses = some((count, 2, 2, 3, 2), "dense")
    found = {str(number): [use] for number, use in enumerate(uses)}
    shapes = dict.fromkeys(found, shape_of(uses[0]))
    made = buckets_of(found, shapes, {name: int(name) % kinds for name in found}, limit=largest)
    names = [name for bucket in made for name in bucket.names]
    assert len(names) == len(set(names))
    for kind in range(kinds):
        sizes = [len(bucket.names) for bucket in made if int(bucket.names[0]) % kinds == kind]
        alike = len(range(kind, count, kinds))
        size = 8 * (3 * 6 + 2 * 2 * 5)
        assert sum(sizes) == (alike if alike > 1 and size <= largest else 0)
        assert all(one * size <= largest for one in sizes)
        assert all(size == sizes[0] >= sizes[-1] for size in sizes[:-1])


def test_what_is_not_alike_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = some((2, 3, 2, 4, 5), "dense")
    positions = PositionMap(candidates=torch.zeros(3, 2, dtype=torch.int64), count=3)
    packed = [Factors(left=use.left, right=use.right, positions=positions) for use in dense]
    indexed = [random_factors("one-hot", grid=(3, 2), rows=4, columns=5, seed=seed) for seed in (0, 1)]
    shorter, other = some((1, 3, 1, 4, 5), "dense"), some((1, 3, 2, 4, 5), "dense", torch.float32)
    shape = torch.Size((4, 5))
    for pair in (packed, indexed, [dense[0], *shorter], [dense[0], *other]):
        found = {str(number): [use] for number, use in enumerate(pair)}
        assert buckets_of(found, dict.fromkeys(found, shape), dict.fromkeys(found, 0), limit=2**28) == []
    several = {"a": dense, "b": dense}
    assert buckets_of(several, dict.fromkeys(several, shape), dict.fromkeys(several, 0), limit=2**28) == []
    found = {"a": [dense[0]], "b": [dense[1]]}
    assert buckets_of(found, {"a": shape, "b": torch.Size((20,))}, dict.fromkeys(found, 0), limit=2**28) == []
    assert buckets_of(found, dict.fromkeys(found, shape), {"a": 0}, limit=2**28) == []
    assert len(buckets_of(found, dict.fromkeys(found, shape), dict.fromkeys(found, 0), limit=2**28)) == 1
    monkeypatch.setattr(buckets, "SMALL", 8)
    assert buckets_of(found, dict.fromkeys(found, shape), dict.fromkeys(found, 0), limit=2**28) == []
