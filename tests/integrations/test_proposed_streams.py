"""Streams with a proposal: what is chosen, what becomes of the rest, and the same again when a run is resumed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import Selection
from ftw_optim.integrations.streaming import CandidateStream
from ftw_optim.integrations.streaming._proposing import packed, unpacked
from ftw_optim.proposals import LearnedProposal, Proposal, SimilarityProposal, UniformProposal
from tests.support.selections import selection
from tests.support.streams import encode, ids, numbers, usable

pytestmark = pytest.mark.filterwarnings("ignore:Skipped a record")
TARGET = [{"input_ids": [1, 30, 31, 32]}]
Sample = dict[str, Any]


def stream_of(proposal: Proposal | None = None, **changes: Any) -> CandidateStream:
    arguments: dict[str, Any] = {"batch_size": 3, "shuffle_buffer": 5, "seed": 2, "probabilities": {"a": 2.0, "b": 1.0}}
    if proposal is not None:
        arguments |= {"proposal": proposal, "read_ahead": 8}
    return CandidateStream({"a": numbers(0, 40), "b": numbers(100, 25)}, encode, **{**arguments, **changes})


def scores_of(samples: Sequence[Mapping[str, Any]]) -> Selection:
    """A step's selection, which depends on its candidates alone."""
    n = len(samples)
    scores = torch.tensor([(sample["n"] * 37 % 19) / 19 for sample in samples], dtype=torch.float64)
    return selection(0, n=n, keep=1, gram=torch.eye(n).double(), cross_gram=scores, target_energy=1.0)


def steps(stream: CandidateStream, count: int | None = None) -> list[list[Sample]]:
    """The next items, each observed when it was used; at the end of a round the next one begins."""
    found: list[list[Sample]] = []
    while count is None or len(found) < count:
        for item in islice(stream, None if count is None else count - len(found)):
            stream.observe(item, scores_of(item))
            found.append(item)
        if count is None:
            break
    return found


def of_sources(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(Counter(sample["source"] for sample in samples))


@pytest.mark.parametrize("batch_size", [None, 1, 3, 8])
@pytest.mark.parametrize("make", [UniformProposal, lambda: SimilarityProposal(TARGET), lambda: LearnedProposal(dim=4)])
def test_kept_samples_are_all_given_out_once_in_a_round(make: Any, batch_size: int | None) -> None:
    stream = stream_of(make(), passed_over="keep", batch_size=batch_size)
    for turn in (1, 2):
        items = list(stream)
        samples = items if batch_size is None else [sample for item in items for sample in item]
        assert sorted(sample["n"] for sample in samples) == sorted(usable(0, 40) + usable(100, 25))
        assert len(set(ids(samples))) == len(samples)
        if batch_size is not None:
            assert {len(item) for item in items[:-1]} == {batch_size}
        assert stream.read == {source: turn * count for source, count in of_sources(samples).items()}
        assert stream.passed_over == {"a": 0, "b": 0}


def test_dropped_samples_are_counted() -> None:
    stream = stream_of(SimilarityProposal(TARGET))
    given_out: list[Sample] = []
    for number, item in enumerate(stream, start=1):
        given_out += item
        assert sum(stream.read.values()) == min(8 * number, len(usable(0, 40) + usable(100, 25)))
        counts = of_sources(given_out)
        assert stream.passed_over == {name: read - counts.get(name, 0) for name, read in stream.read.items()}
    assert len(set(ids(given_out))) == len(given_out)
    assert {30, 31, 32} & {sample["n"] for sample in given_out} == {30, 32}  # 31 is refused by encode
    assert sum(stream.passed_over.values()) > 0
    plain = stream_of()
    list(plain)
    assert plain.read == plain.passed_over == {}


def test_a_kept_sample_waits_and_only_what_is_missing_is_read() -> None:
    stream = stream_of(UniformProposal(), passed_over="keep")
    next(iter(stream))
    assert (sum(stream.read.values()), sum(stream.passed_over.values())) == (8, 5)
    next(iter(stream))
    assert (sum(stream.read.values()), sum(stream.passed_over.values())) == (11, 5)


@pytest.mark.parametrize("passed_over", ["drop", "keep"])
def test_a_uniform_choice_of_all_that_is_read_gives_the_items_of_the_plain_stream(passed_over: Any) -> None:
    stream = stream_of(UniformProposal(), read_ahead=3, passed_over=passed_over)
    items = [sorted(ids(item)) for item in stream]
    assert items == [sorted(ids(item)) for item in stream_of()]
    assert sum(stream.passed_over.values()) == 0


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [3, 3, 1]), (True, [3, 3])])
def test_the_last_samples_of_a_round_are_fewer_or_left_out(drop_last: bool, sizes: list[int]) -> None:
    for passed_over in ("drop", "keep"):
        records = numbers(11, 5) + numbers(22, 2) if passed_over == "keep" else numbers(11, 5) + numbers(22, 4)
        read_ahead = 4
        stream = CandidateStream(
            {"a": records},
            encode,
            batch_size=3,
            proposal=UniformProposal(),
            read_ahead=read_ahead,
            passed_over=passed_over,  # type: ignore[arg-type]
            drop_last=drop_last,
        )
        assert [len(item) for item in stream] == sizes
        assert [len(item) for item in stream] == sizes  # the next round


@pytest.mark.slow
@settings(max_examples=25)
@given(
    position=st.integers(0, 12),
    passed_over=st.sampled_from(["drop", "keep"]),
    batch_size=st.sampled_from([1, 3]),
    target=st.booleans(),
)
def test_a_stream_whose_proposal_learns_resumes_at_any_item(
    position: int, passed_over: Literal["drop", "keep"], batch_size: int, target: bool
) -> None:
    def fresh() -> CandidateStream:
        proposal = LearnedProposal(TARGET if target else None, dim=4, seed=1)
        return stream_of(proposal, passed_over=passed_over, batch_size=batch_size)

    whole = fresh()
    expected = steps(whole, position + 6)
    first = fresh()
    before = steps(first, position)
    state = json.loads(json.dumps(first.state_dict()))
    steps(first, 2)  # of the killed run, after its checkpoint
    second = fresh()
    second.load_state_dict(state)
    assert before + steps(second, 6) == expected
    assert second.state_dict() == whole.state_dict()
    assert (second.read, second.passed_over) == (whole.read, whole.passed_over)
    first.load_state_dict(state)  # in the same process
    assert steps(first, 6) == expected[position:]


def _ahead(
    stream: CandidateStream, ahead: int, count: int, reading: list[list[Sample]] | None = None
) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """Consume ``count`` items as with a loader that draws ``ahead`` more; what was used, and what was only drawn."""
    drawn = [] if reading is None else reading
    iterator, used = iter(stream), []
    for _ in range(count):
        while len(drawn) < ahead + 1:
            drawn.append(next(iterator))
        item = drawn.pop(0)
        stream.observe(item, scores_of(item))
        used.append(item)
    return used, drawn


@pytest.mark.slow
@settings(max_examples=25)
@given(ahead=st.integers(0, 3), position=st.integers(1, 6), passed_over=st.sampled_from(["drop", "keep"]))
def test_items_read_ahead_are_proposed_again_as_they_were(ahead: int, position: int, passed_over: Any) -> None:
    """An item that was drawn before an observation is drawn before it again."""

    def fresh() -> CandidateStream:
        return stream_of(LearnedProposal(dim=4), passed_over=passed_over, lookahead=3, passes=None, batch_size=1)

    expected, _ = _ahead(fresh(), ahead, position + 5)
    first = fresh()
    before, _ = _ahead(first, ahead, position)
    state = json.loads(json.dumps(first.state_dict(position)))
    second = fresh()
    second.load_state_dict(state)
    after, _ = _ahead(second, ahead, 5)
    assert before + after == expected


def test_a_checkpoint_taken_right_after_resuming_is_the_same() -> None:
    first = stream_of(LearnedProposal(dim=4), lookahead=3)
    _ahead(first, 2, 3)
    state = json.loads(json.dumps(first.state_dict(3)))
    second = stream_of(LearnedProposal(dim=4), lookahead=3)
    second.load_state_dict(state)
    assert second.state_dict() == second.state_dict(3) == state


def test_no_observation_is_lost_where_less_is_read_ahead_after_resuming() -> None:
    proposal = LearnedProposal(dim=4)
    first = stream_of(proposal, lookahead=3)
    _ahead(first, 2, 3)
    second = stream_of(LearnedProposal(dim=4), lookahead=3)
    second.load_state_dict(first.state_dict(3))
    item = next(iter(second))
    for stream in (first, second):
        stream.observe(item, scores_of(item))
    learned = [stream.state_dict()["position"]["proposing"]["states"][-1]["learned"] for stream in (first, second)]
    assert learned[0] == learned[1]


@pytest.mark.parametrize("passed_over", ["drop", "keep"])
def test_an_interrupt_loses_nothing_of_a_proposal(passed_over: Any) -> None:
    calls = 0

    def interrupted(record: Mapping[str, Any]) -> dict[str, Any] | None:
        nonlocal calls
        calls += 1
        if calls in (1, 20, 30):
            raise KeyboardInterrupt
        return encode(record)

    arguments: dict[str, Any] = {"batch_size": 3, "read_ahead": 7, "passed_over": passed_over}
    stream = CandidateStream({"a": numbers(0, 60)}, interrupted, proposal=LearnedProposal(dim=4), **arguments)
    found, interrupts = [], 0
    while len(found) < 6:
        try:
            found += steps(stream, 1)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 3
    whole = CandidateStream({"a": numbers(0, 60)}, encode, proposal=LearnedProposal(dim=4), **arguments)
    assert found == steps(whole, 6)
    assert stream.state_dict() == whole.state_dict()


class Broken(Proposal):
    """Gives positions that are no choice."""

    def __init__(self, positions: list[int]) -> None:
        self.positions = positions

    def propose(self, samples: Sequence[Mapping[str, Any]], count: int) -> Tensor:
        return torch.tensor(self.positions)

    def observe(self, samples: Sequence[Mapping[str, Any]], selection: Selection) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize("positions", [[0, 1], [0, 1, 1], [0, 1, 8], [-1, 0, 1], [0, 1, 2, 3]])
def test_what_is_no_choice_is_refused_and_nothing_is_read(positions: list[int]) -> None:
    stream = stream_of(Broken(positions))
    before = stream.state_dict()
    with pytest.raises(ValueError, match="Expected the proposal to give 3 different positions of 8 samples, got"):
        next(iter(stream))
    assert stream.state_dict() == before
    good = stream_of(Broken([4, 0, 7]))
    assert len(next(iter(good))) == 3


def test_the_users_changes_to_samples_do_not_reach_a_checkpoint() -> None:
    stream = stream_of(UniformProposal(), passed_over="keep", lookahead=2)
    expected = list(stream_of(UniformProposal(), passed_over="keep"))
    for item in islice(stream, 3):
        for sample in item:
            sample.clear()
    resumed = stream_of(UniformProposal(), passed_over="keep")
    resumed.load_state_dict(stream.state_dict(1))
    assert list(resumed) == expected[1:]


def test_tensors_wait_in_a_checkpoint_and_what_cannot_is_refused_at_once() -> None:
    def tensors(record: Mapping[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([1, record["n"]])
        return {"input_ids": ids, "labels": ids, "more": [{"x": 0.1, "y": [None, True]}, torch.tensor([0.5]).half()]}

    def values(stream: CandidateStream) -> list[Any]:
        return [[packed(sample) for sample in item] for item in stream]

    arguments: dict[str, Any] = {"batch_size": 2, "read_ahead": 6, "passed_over": "keep"}
    stream = CandidateStream({"a": numbers(0, 20)}, tensors, proposal=UniformProposal(), **arguments)
    next(iter(stream))
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = CandidateStream({"a": numbers(0, 20)}, tensors, proposal=UniformProposal(), **arguments)
    resumed.load_state_dict(state)
    assert values(resumed) == values(stream)
    back = unpacked(json.loads(json.dumps(packed(tensors({"n": 3})))))
    assert [back["input_ids"].dtype, back["more"][1].dtype] == [torch.int64, torch.float16]

    def objects(record: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_ids": [1], "labels": [1], "labelled": {1, 2}} | {"labels": [1, 2], "input_ids": [1, 2]}

    stream = CandidateStream({"a": numbers(0, 20)}, objects, proposal=UniformProposal(), **arguments)
    with pytest.raises(TypeError, match=r"Expected numbers, text, lists, tensors .* got a set"):
        next(iter(stream))
    dropping = {**arguments, "passed_over": "drop"}
    assert len(next(iter(CandidateStream({"a": numbers(0, 9)}, objects, proposal=UniformProposal(), **dropping)))) == 2


def test_the_state_of_a_stream_that_proposes_otherwise_is_refused() -> None:
    stream = stream_of(UniformProposal())
    next(iter(stream))
    state = stream.state_dict()
    for other, name in [
        (stream_of(UniformProposal(), read_ahead=9), "read_ahead"),
        (stream_of(UniformProposal(), passed_over="keep"), "passed_over"),
        (stream_of(), "passed_over"),
    ]:
        before = other.state_dict()
        with pytest.raises(ValueError, match=f"Expected the state of a stream with {name} ="):
            other.load_state_dict(state)
        assert other.state_dict() == before
    with pytest.raises(ValueError, match="Expected the state of a stream with read_ahead = 8, got None"):
        stream.load_state_dict(stream_of().state_dict())
    other = stream_of(UniformProposal(seed=1))
    before = other.state_dict()
    with pytest.raises(ValueError, match="Expected the state of a proposal with settings ="):
        other.load_state_dict(state)
    assert other.state_dict() == before


def test_wrong_arguments_of_a_proposing_stream_are_named() -> None:
    with pytest.raises(ValueError, match="Expected read_ahead of at least the 3 samples of an item, got None"):
        stream_of(UniformProposal(), read_ahead=None)
    with pytest.raises(ValueError, match="Expected read_ahead of at least the 3 samples of an item, got 2"):
        stream_of(UniformProposal(), read_ahead=2)
    with pytest.raises(ValueError, match="Expected a proposal that chooses among the 8 samples read ahead"):
        stream_of(read_ahead=8)
    with pytest.raises(ValueError, match="passed_over must be 'drop' or 'keep', got 'lose'"):
        stream_of(UniformProposal(), passed_over="lose")
    with pytest.raises(TypeError, match=r"Expected a Proposal of ftw_optim\.proposals, got int"):
        stream_of(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected a stream with a proposal or shares, which can learn"):
        stream_of().observe([], scores_of([{"n": 1}]))
