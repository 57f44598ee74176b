"""Targets in orders of their own, which resume."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftw_optim.integrations.streaming import TargetCycle
from tests.support.streams import BAD, COUNTS, DAMAGED, encode, ids, numbers, write

pytestmark = pytest.mark.filterwarnings("ignore:Skipped a record")


@given(count=st.integers(1, 9), batch_size=st.integers(1, 12), seed=st.integers(0, 3), at=st.integers(0, 20))
def test_targets_are_cycled_in_orders_of_their_own_and_resume(count: int, batch_size: int, seed: int, at: int) -> None:
    records = [{"n": 11 * i} for i in range(count)]

    def fresh() -> TargetCycle:
        return TargetCycle(records, encode, batch_size=batch_size, seed=seed)

    batches = list(islice(fresh(), at + 5))
    cycle = fresh()
    assert [cycle.batch(number) for number in reversed(range(at + 5))] == batches[::-1]  # of the number alone
    order = [sample["sample_id"] for batch in batches for sample in batch]
    everything = sorted(f"target/{i}" for i in range(count))
    for first in range(0, len(order) - count + 1, count):
        assert sorted(order[first : first + count]) == everything
    killed, resumed = fresh(), fresh()
    list(islice(killed, at))
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    assert list(islice(resumed, 5)) == batches[at:]


def test_passes_and_seeds_differ() -> None:
    records = [{"n": 11 * i} for i in range(20)]
    cycle = TargetCycle(records, encode, batch_size=20)
    other = TargetCycle(records, encode, batch_size=20, seed=1)
    assert len({tuple(ids(batch)) for batch in (cycle.batch(0), cycle.batch(1), other.batch(0))}) == 3


def test_targets_skip_what_cannot_be_used(tmp_path: Path) -> None:
    cycle = TargetCycle(write(tmp_path / "t.jsonl", DAMAGED), encode, batch_size=3)
    assert cycle.skipped == COUNTS
    assert sorted(sample["n"] for sample in next(cycle)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"(?s)Expected target samples, got none from 3 records.*no label tokens"):
        TargetCycle(BAD, encode, batch_size=1)
    with pytest.raises(ValueError, match="a cycle with samples = 3, got 4"):
        cycle.load_state_dict({"batches": 1, "samples": 4, "seed": 0, "batch_size": 3})
    with pytest.raises(ValueError, match="0 or more, got -1"):
        cycle.batch(-1)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        TargetCycle(numbers(0, 2), encode, batch_size=0)
