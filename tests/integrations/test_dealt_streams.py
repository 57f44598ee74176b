"""Streams and targets of several processes: their parts are the whole, also over a resume with another number."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw_optim import Selection
from ftw_optim.integrations.streaming import CandidateStream, TargetCycle
from ftw_optim.proposals import LearnedProposal, UniformProposal
from tests.support.selections import selection
from tests.support.streams import encode, numbers


def stream(rank: int, ranks: int, *, records: int = 60, **options: Any) -> CandidateStream:
    usable = [{"n": 11 * number} for number in range(records)]
    sources = {"a": usable[records // 3 :], "b": usable[: records // 3]}
    settings = {"batch_size": 3, "seed": 1, "shuffle_buffer": 7, **options}
    return CandidateStream(sources, encode, rank=rank, ranks=ranks, **settings)


def names(items: list[Any]) -> list[str]:
    return [sample["sample_id"] for item in items for sample in (item if isinstance(item, list) else [item])]


@given(ranks=st.integers(1, 5), batch_size=st.integers(1, 4), drop_last=st.booleans())
def test_the_items_of_all_ranks_are_those_of_one_process(ranks: int, batch_size: int, drop_last: bool) -> None:
    options = {"drop_last": drop_last}
    dealt = [list(stream(rank, ranks, batch_size=batch_size, **options)) for rank in range(ranks)]
    whole = list(stream(0, 1, batch_size=batch_size * ranks, **options))
    if not drop_last and len(whole[-1]) < ranks:
        whole.pop()
    assert {len(items) for items in dealt} == {len(whole)}
    for number, item in enumerate(whole):
        assert names([items[number] for items in dealt]) == names([item])
        sizes = [len(items[number]) for items in dealt]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


@given(
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    steps=st.integers(0, 4),
    loaded=st.integers(0, 3),
    one_by_one=st.booleans(),
)
def test_a_run_of_another_number_of_ranks_goes_on_without_losing_a_sample(
    before: int, after: int, steps: int, loaded: int, one_by_one: bool
) -> None:
    options = {"batch_size": None if one_by_one else 3, "drop_last": True}
    first = [stream(rank, before, **options) for rank in range(before)]
    seen = [list(islice(iter(one), steps)) for one in first]
    states = [json.loads(json.dumps(one.state_dict())) for one in first]
    assert all(state == states[0] for state in states)
    second = [stream(rank, after, **options) for rank in range(after)]
    for one in second:
        one.load_state_dict(states[loaded % before])
    rest = [list(one) for one in second]
    size = 1 if one_by_one else 3
    given = [name for part in (*seen, *rest) for name in names(part)]
    assert len(given) == len(set(given))
    assert 60 - len(given) < after * size
    single = names(list(stream(0, 1, batch_size=1)))
    assert set(given) == set(single[: len(given)])


@given(count=st.integers(1, 9), ranks=st.integers(1, 4), more=st.integers(0, 3), number=st.integers(0, 9))
def test_target_batches_are_shared_out(count: int, ranks: int, more: int, number: int) -> None:
    records = [{"n": 11 * i} for i in range(count)]
    whole = TargetCycle(records, encode, batch_size=ranks + more)
    parts = [TargetCycle(records, encode, batch_size=ranks + more, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert names([part.batch(number) for part in parts]) == names([whole.batch(number)])
    assert all(len(part.batch(number)) for part in parts)
    assert all(part.state_dict() == whole.state_dict() for part in parts)


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_are_none_are_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="rank from 0 to ranks - 1"):
        stream(rank, ranks)
    with pytest.raises(ValueError, match="rank from 0 to ranks - 1"):
        TargetCycle(numbers(0, 4), encode, batch_size=4, rank=rank, ranks=ranks)


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ValueError, match="read_ahead of at least the 6 samples"):
        stream(0, 2, proposal=UniformProposal(), read_ahead=5)
    with pytest.raises(ValueError, match="at least 3, the number of ranks"):
        TargetCycle(numbers(0, 4), encode, batch_size=2, rank=0, ranks=3)


@given(ranks=st.integers(2, 4), batch_size=st.integers(1, 3), accumulated=st.integers(1, 3), keeps=st.booleans())
@settings(deadline=None, max_examples=20)
def test_all_ranks_learn_from_the_candidates_of_all(ranks: int, batch_size: int, accumulated: int, keeps: bool) -> None:
    """Each is told of its own candidates in the order of its closure; the run of one process learns the same."""

    def made(rank: int, count: int) -> CandidateStream:
        options = {"read_ahead": 4 * ranks * batch_size, "passed_over": "keep" if keeps else "drop"}
        size = batch_size * ranks // count
        return stream(rank, count, batch_size=size, drop_last=True, proposal=LearnedProposal(dim=4), **options)

    def score(samples: list[Any]) -> Selection:
        scores = torch.tensor([(sample["n"] * 37 % 19) / 19 for sample in samples], dtype=torch.float64)
        return selection(0, n=len(samples), keep=1, cross_gram=scores, target_energy=1.0)

    streams = [made(rank, ranks) for rank in range(ranks)]
    single = made(0, 1)
    for _ in range(2):
        windows = [list(islice(one, accumulated)) for one in streams]
        whole = list(islice(single, accumulated))
        own = [[sample for item in items for sample in item] for items in windows]
        everyone = [sample for samples in own for sample in samples]
        assert sorted(names([everyone])) == sorted(names(whole))
        if len(windows[0]) < accumulated:
            break
        for one, samples in zip(streams, own, strict=True):
            one.observe(samples, score(everyone))
        single.observe(everyone, score(everyone))
    state = single.proposal.state_dict()["learned"]  # type: ignore[union-attr]
    for one in streams:
        learned = one.proposal.state_dict()["learned"]  # type: ignore[union-attr]
        assert all(torch.equal(torch.as_tensor(learned[name]), torch.as_tensor(value)) for name, value in state.items())
    later = made(0, 1)
    later.load_state_dict(json.loads(json.dumps(streams[-1].state_dict())))
    assert names(list(islice(later, 1))) == names(list(islice(single, 1)))


def test_samples_of_no_item_are_refused() -> None:
    one = stream(1, 2, proposal=LearnedProposal(dim=4), read_ahead=12)
    item = next(iter(one))
    with pytest.raises(ValueError, match="one of the last items of this stream"):
        one.observe(item[:2], selection(0, n=4))
    one.observe(item, selection(0, n=6))
