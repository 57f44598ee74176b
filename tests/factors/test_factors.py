"""Operations on factors against gradients that are multiplied out one candidate at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import Factors
from ftw_optim._factors.factors import PositionMap, materialise, projection, weighted_sum
from tests.support.factors import random_factors
from tests.support.oracles import gradients

KINDS = ("dense", "one-hot", "summed")


@st.composite
def uses(draw: st.DrawFn) -> list[Factors]:
    """One to three uses of one parameter by the same candidates, plain or packed."""
    seed, n = draw(st.integers(0, 2**16)), draw(st.integers(1, 4))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    packed = draw(st.booleans())
    found = []
    for number in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(KINDS if columns == 1 else KINDS[:2]))
        grid = (draw(st.integers(1, 3)) if packed else n, draw(st.integers(0 if number else 1, 5)))
        factors = random_factors(kind, grid=grid, rows=rows, columns=columns, seed=seed + number)
        if packed:
            generator = torch.Generator().manual_seed(seed + 7 * number)
            owners = torch.randint(-1, n, grid, generator=generator)
            factors = Factors(
                left=factors.left,
                right=factors.right,
                rows=rows,
                positions=PositionMap(candidates=owners, count=n),
            )
        found.append(factors)
    return found


@given(uses(), st.integers(0, 2**16))
def test_weighted_sum_is_the_weighted_sum_of_the_gradients(found: list[Factors], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(found[0].count, dtype=torch.float64, generator=generator)
    weights[torch.rand(len(weights), generator=generator) < 0.4] = 0.0
    expected = torch.einsum("n,nrc->rc", weights, sum(map(gradients, found)))
    torch.testing.assert_close(weighted_sum(found, weights, expected.shape), expected)


@given(uses(), st.data())
def test_any_rows_multiplied_out_are_those_of_the_gradients(found: list[Factors], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, found[0].rows - 1))
    stop = data.draw(st.integers(start + 1, found[0].rows))
    dirty = torch.full((10_000,), torch.nan, dtype=torch.float64)
    block = materialise([use.by_row() for use in found], start, stop, out=dirty)
    torch.testing.assert_close(block, sum(map(gradients, found))[:, start:stop])


@given(uses(), st.integers(0, 2**16))
def test_projection_is_that_of_the_weighted_sum(found: list[Factors], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, rows, columns = found[0].count, found[0].rows, found[0].columns
    weights, left, right = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (n, rows, columns))
    expected = torch.einsum("n,r,nrc,c->", weights, left, sum(map(gradients, found)), right)
    value, scale = projection(found, weights, left, right)
    torch.testing.assert_close(value, expected)
    assert scale >= 0


@given(uses(), st.data())
def test_a_nan_anywhere_marks_its_candidate_alone_and_without_removes_it(
    found: list[Factors], data: st.DataObject
) -> None:
    spoilt = data.draw(st.integers(0, found[0].count - 1))
    marks = torch.arange(found[0].count) == spoilt
    touched = False
    broken = []
    for use in found:
        mine = use.spread(marks).expand(use.left.shape[:2])[..., None]
        touched = touched or bool(mine.any())
        part = use.right if use.indexed else use.left
        part = torch.where(mine, torch.nan, part)
        broken.append(
            Factors(
                left=use.left if use.indexed else part,
                right=part if use.indexed else use.right,
                rows=use.rows,
                positions=use.positions,
            )
        )
    finite = torch.stack([use.finite() for use in broken]).all(0)
    assert finite.tolist() == [not (mark and touched) for mark in marks.tolist()]
    cleaned = sum(gradients(use.without(marks)) for use in broken)
    expected = sum(map(gradients, found))
    expected[spoilt] = 0.0
    torch.testing.assert_close(cleaned, expected)


def test_reduced_precision_factors_are_accumulated_in_float32() -> None:
    factors = random_factors("dense", grid=(2, 2000), rows=3, columns=4, seed=0)
    half = Factors(left=factors.left.bfloat16(), right=factors.right.bfloat16())  # type: ignore[union-attr]
    exact = Factors(left=half.left.double(), right=half.right.double())  # type: ignore[union-attr]
    block = materialise([half], 0, 3)
    assert block.dtype == torch.float32
    torch.testing.assert_close(block.double(), gradients(exact), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.zeros(2), None),
        (torch.zeros(2, 3, dtype=torch.int64), None),
        (torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)),
    ],
    ids=["no candidates", "indices without values", "different positions"],
)
def test_factors_that_do_not_fit_together_are_refused(left: Tensor, right: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"Expected left|differ in their first two axes"):
        Factors(left=left, right=right)


@pytest.mark.parametrize("axes", [(), (4,), (2, 3), (0,)], ids=str)
def test_any_axes_between_are_positions(axes: tuple[int, ...]) -> None:
    """So that a rule may return what it gets, whatever inputs its layer takes."""
    t = int(torch.tensor(axes).prod())
    dense = Factors(left=torch.zeros(2, *axes, 5), right=torch.zeros(2, *axes, 3))
    assert dense.left.shape == (2, t, 5)
    assert dense.right is not None
    assert dense.right.shape == (2, t, 3)
    indexed = Factors(left=torch.zeros(2, *axes, dtype=torch.int64), right=torch.zeros(2, *axes, 3), rows=7)
    assert indexed.left.shape == (2, t)
