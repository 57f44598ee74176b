"""Tables whose touched rows travel: what arrives are the gradients that were sent, in fewer numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftw_optim._factors.factors import Factors, PositionMap, weighted_sum
from ftw_optim._ranks.tables import Table, tables_of, touched

ROWS, COLUMNS = 50, 3


def use(count: int, positions: int, generator: torch.Generator, *, packed: bool = False) -> Factors:
    index = torch.randint(0, ROWS, (count, positions), generator=generator)
    values = torch.randn(count, positions, COLUMNS, dtype=torch.float64, generator=generator)
    found = Factors(left=index, right=values, rows=ROWS)
    if not packed:
        return found
    owner = torch.randint(-1, count, (count, positions), generator=generator)
    owner[0, 0] = 0
    return Factors(left=index, right=values, rows=ROWS, positions=PositionMap(candidates=owner, count=count))


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    packed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_was_written_is_read(counts: list[int], lengths: list[int], packed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    of_ranks = [[use(n, t + rank, generator, packed=packed) for t in lengths] for rank, n in enumerate(counts) if n]
    said = [{"table": touched(uses)} for uses in of_ranks]
    (table,) = tables_of([*said, {}], {"table": torch.empty(ROWS * 10, COLUMNS)}).values()
    numbers, indices = [], []
    for uses in of_ranks:
        own = torch.zeros(uses[0].count, table.size, dtype=torch.float64)
        at = torch.zeros(uses[0].count, table.places, dtype=torch.int64)
        table.write(uses, own, indices=False)
        table.write(uses, at, indices=True)
        numbers.append(own)
        indices.append(at)
    arrived = table.read(torch.cat(numbers), torch.cat(indices))
    weights = torch.randn(arrived.count, dtype=torch.float64, generator=generator)
    shape = torch.Size((ROWS * 10, COLUMNS))
    start, expected = 0, torch.zeros(shape, dtype=torch.float64)
    for uses in of_ranks:
        own = weights[start : start + uses[0].count]
        expected[:ROWS] += weighted_sum(uses, own, torch.Size((ROWS, COLUMNS)))
        start += len(own)
    torch.testing.assert_close(weighted_sum([arrived], weights, shape), expected)


def test_other_gradients_travel_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = use(2, 4, generator), use(2, 40, generator)
    dense = Factors(left=torch.randn(2, 5, ROWS), right=torch.randn(2, 5, COLUMNS))
    parameters = {"table": torch.empty(ROWS, COLUMNS)}
    assert tables_of([{"table": touched([few])}], parameters) == {"table": Table(places=4, columns=COLUMNS, rows=ROWS)}
    assert touched([few, dense]) is None  # as where embedding and head are one
    assert touched([Factors.explicit(torch.randn(2, ROWS, COLUMNS), parameters["table"])]) is None
    assert not tables_of([{"table": touched([few])}, {"table": touched([dense])}], parameters)
    assert not tables_of([{"table": touched([many])}], parameters)  # rows and indices would be more
    assert not tables_of([{}, {}], parameters)
    assert not tables_of([{"table": 4}], {"table": torch.empty(ROWS)})


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_rank_with_fewer_places_leaves_the_others_at_zero(scale: float) -> None:
    few = use(2, 2, torch.Generator().manual_seed(0))
    place = torch.zeros(2, 5 * COLUMNS, dtype=torch.float64)
    Table(places=5, columns=COLUMNS, rows=ROWS).write([few.divided(scale)], place, indices=False)
    assert torch.equal(place[:, 2 * COLUMNS :], torch.zeros(2, 3 * COLUMNS, dtype=torch.float64))
    assert few.right is not None
    torch.testing.assert_close(place[:, : 2 * COLUMNS], few.right.flatten(1) / scale)
