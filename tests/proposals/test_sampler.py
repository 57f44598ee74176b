"""The sampler of a proposal over data found by number: every record in its turn, resumed to the bit behind workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from ftw_optim import Selection
from ftw_optim.proposals import (
    LearnedProposal,
    Proposal,
    ProposedSampler,
    SimilarityProposal,
    UniformProposal,
    VettedProposal,
)
from tests.support.grids import slow
from tests.support.selections import selection

TARGET = [{"input_ids": [1, 30, 31, 32]}]
KINDS: dict[str, Callable[[], Proposal]] = {
    "uniform": UniformProposal,
    "similar": lambda: SimilarityProposal(TARGET, explore=0.2),
    "learned": lambda: LearnedProposal(TARGET, dim=4),
    "vetted": lambda: VettedProposal(TARGET, dim=4),
    "tested": lambda: VettedProposal(TARGET, order="tested", dim=4),
    "one's own": lambda: _First(),
}
READ = [(8, "drop"), (8, "keep"), (None, None)]

Record = dict[str, list[int]]


class _First(Proposal):
    """One without features, which learns how many steps there were."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def propose(self, samples: Sequence[Mapping[str, Any]], count: int) -> Tensor:
        places = range(len(samples))
        by_id = sorted(places, key=lambda place: (samples[place]["input_ids"][-1] + len(self.seen)) % 17)
        return torch.tensor(by_id[:count])

    def observe(self, samples: Sequence[Mapping[str, Any]], selection: Selection) -> None:
        self.seen = [*self.seen, *(sample["input_ids"][-1] for sample in samples)]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.seen = state_dict["seen"]


def records(n: int) -> list[Record]:
    return [{"input_ids": [1, i % 3 + 30, i]} for i in range(n)]


def sampler_of(kind: str, n: int = 50, **changes: Any) -> ProposedSampler:
    return ProposedSampler(records(n), KINDS[kind](), **{"count": 3, "read_ahead": 8, **changes})


def scores_of(numbers: Sequence[int]) -> Selection:
    """A step's selection, which depends on its candidates alone."""
    n = len(numbers)
    scores = torch.tensor([(number * 37 % 19) / 19 for number in numbers], dtype=torch.float64)
    return selection(0, n=n, keep=1, gram=torch.eye(n).double(), cross_gram=scores, target_energy=1.0)


def steps(sampler: ProposedSampler, batches: Any, count: int | None = None) -> list[list[int]]:
    """The numbers of the next batches, each observed when it was used."""
    found = []
    for batch in islice(batches, count):
        found.append([int(number) for number in batch])
        sampler.observe(scores_of(found[-1]))
    return found


def loader_of(sampler: ProposedSampler, **options: Any) -> DataLoader[Any]:
    return DataLoader(sampler.data, batch_size=sampler.count, sampler=sampler, collate_fn=_last_tokens, **options)


def _last_tokens(samples: list[Record]) -> list[int]:
    return [sample["input_ids"][-1] for sample in samples]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("read_ahead", "passed_over"), READ)
def test_an_epoch_reads_every_record_once(
    kind: str, read_ahead: int | None, passed_over: Literal["drop", "keep"] | None
) -> None:
    sampler = sampler_of(kind, read_ahead=read_ahead, passed_over=passed_over)
    orders = []
    for epoch in range(3):
        batches = steps(sampler, loader_of(sampler))
        flat = [number for batch in batches for number in batch]
        assert len(flat) == len(set(flat)) == len(sampler) == sampler.given == sampler.taken
        assert len(loader_of(sampler)) == len(batches)
        assert {len(batch) for batch in batches[:-1]} == {3}
        assert (sampler.epoch, sampler.read, sampler.passed_over) == (epoch, 50, 50 - len(flat))
        assert len(flat) == (50 if passed_over != "drop" else 6 * 3 + 2)
        orders.append(flat)
    assert orders[0] != orders[1] != orders[2]
    again = sampler_of(kind, read_ahead=read_ahead, passed_over=passed_over)
    assert [number for batch in steps(again, loader_of(again)) for number in batch] == orders[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(read_ahead=st.integers(3, 12), keep=st.booleans(), n=st.integers(1, 40), seed=st.integers(0, 3))
def test_candidates_are_what_the_proposal_chooses_among_the_records_read(
    kind: str, read_ahead: int, keep: bool, n: int, seed: int
) -> None:
    passed_over: Literal["drop", "keep"] = "keep" if keep else "drop"
    sampler = sampler_of(kind, n, read_ahead=read_ahead, passed_over=passed_over, seed=seed)
    # With all on offer, kept and read one by one, the order is what the seed decides.
    everyone = sampler_of("uniform", n, count=1, read_ahead=1, seed=seed)
    order = list(everyone)
    other, waiting = KINDS[kind](), list[int]()
    for batch in _in_batches(iter(sampler)):
        offered = waiting + order[: read_ahead - len(waiting)]
        order = order[read_ahead - len(waiting) :]
        samples = [sampler.data[number] for number in offered]
        chosen = [offered[place] for place in other.propose(samples, 3).tolist()]
        waiting = [number for number in offered if number not in chosen] if keep else []
        assert batch == chosen
        sampler.observe(scores_of(batch))
        other.observe([sampler.data[number] for number in batch], scores_of(batch))
    assert not order
    assert not waiting


def _in_batches(numbers: Any) -> Any:
    while batch := list(islice(numbers, 3)):
        yield batch


@pytest.mark.parametrize(
    ("kind", "workers"), [("learned", 0), ("one's own", 0), slow("learned", 2), slow("one's own", 2)]
)
@pytest.mark.parametrize(("read_ahead", "passed_over"), READ)
def test_a_run_that_is_resumed_goes_on_to_the_bit(
    kind: str, read_ahead: int | None, passed_over: Literal["drop", "keep"] | None, workers: int
) -> None:
    def new() -> ProposedSampler:
        return sampler_of(kind, 60, read_ahead=read_ahead, passed_over=passed_over)

    whole = new()
    expected = [batch for _ in range(2) for batch in steps(whole, loader_of(whole, num_workers=workers))]
    of_epoch = len(expected) // 2
    for stop in (1, 4, of_epoch, of_epoch + 2):
        first = new()
        found: list[list[int]] = []
        state: Any = None
        while len(found) < stop:
            for batch in loader_of(first, num_workers=workers):
                found.append([int(number) for number in batch])
                first.observe(scores_of(found[-1]))
                if len(found) == stop:
                    state = first.state_dict()
                    break
        # What goes on after the checkpoint does not change it.
        steps(first, loader_of(first, num_workers=workers), 1)
        second = new()
        second.load_state_dict(state)
        while len(found) < len(expected):
            found += steps(second, loader_of(second, num_workers=workers))
        assert found == expected


def test_the_workers_do_not_change_what_is_chosen_without_learning() -> None:
    alone, helped = sampler_of("similar"), sampler_of("similar")
    assert steps(alone, loader_of(alone)) == steps(helped, loader_of(helped, num_workers=2, prefetch_factor=3))


def test_trainers_that_skip_get_an_epoch_from_its_start() -> None:
    whole = sampler_of("learned", 60)
    expected = steps(whole, loader_of(whole))
    first = sampler_of("learned", 60)
    found = steps(first, loader_of(first), 2)
    again = sampler_of("learned", 60)
    again.load_state_dict(first.state_dict(), from_start=True)
    again.set_epoch(0)  # the present one
    batches = iter(loader_of(again))
    assert [[int(number) for number in next(batches)] for _ in range(2)] == found
    assert steps(again, batches) == expected[2:]
    again.set_epoch(1)
    whole.set_epoch(1)
    assert steps(again, loader_of(again)) == steps(whole, loader_of(whole))


def test_an_iterator_begins_behind_what_was_taken() -> None:
    sampler = sampler_of("similar")
    ahead = list(islice(sampler, 9))
    sampler.observe(scores_of(ahead[:3]))
    sampler.skip(1)
    assert (sampler.given, sampler.taken) == (9, 4)
    assert list(islice(sampler, 5)) == ahead[4:]
    with pytest.raises(ValueError, match="no more candidates than the 5 given out and not taken, got 6"):
        sampler.skip(6)
    assert sampler.taken == 4


def test_an_iterator_of_an_epoch_that_is_over_says_so() -> None:
    sampler = sampler_of("similar")
    stale = iter(sampler)
    next(stale)
    sampler.set_epoch(3)
    with pytest.raises(RuntimeError, match="another epoch"):
        next(stale)
    state = sampler.state_dict()
    stale = iter(sampler)
    next(stale)
    sampler.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the state of a checkpoint"):
        next(stale)


@pytest.mark.parametrize("workers", [0, 2])  # the second has asked for everything
def test_leaving_an_epoch_early_loses_nothing_that_was_asked_for_ahead(workers: int) -> None:
    sampler = sampler_of("similar", 20, count=4, passed_over="keep")
    loader = loader_of(sampler, num_workers=workers, persistent_workers=workers > 0)
    found = steps(sampler, loader, 3)  # behind which a loader with workers has asked for everything
    state = sampler.state_dict()
    found += steps(sampler, loader)
    assert sorted(number for batch in found for number in batch) == list(range(20))
    resumed = sampler_of("similar", 20, count=4, passed_over="keep")
    resumed.load_state_dict(state)
    assert steps(resumed, loader_of(resumed, num_workers=workers)) == found[3:]
    assert (sampler.epoch, resumed.epoch) == (0, 0)
    assert len(steps(sampler, loader)) == 5
    assert sampler.epoch == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_fill_no_batch_are_left_out_with_their_epoch(workers: int) -> None:
    sampler = sampler_of("similar", 20, count=6, passed_over="keep")
    loader = loader_of(sampler, num_workers=workers, drop_last=True)
    for epoch in range(3):
        assert len(steps(sampler, loader)) == 3
        assert (sampler.epoch, sampler.taken) == (epoch, 18)


def test_an_epoch_of_which_nobody_tells_what_was_taken_ends_as_others_do() -> None:
    sampler = sampler_of("similar", 20, count=4, passed_over="keep")
    for epoch in range(3):
        assert sorted(sampler) == list(range(20))
        assert sampler.epoch == epoch


def test_an_epoch_that_is_over_can_be_begun_again() -> None:
    sampler = sampler_of("uniform", 20, passed_over="keep")
    sampler.set_epoch(4)
    first = list(sampler)
    sampler.set_epoch(4)
    assert sampler.given == 0
    assert sorted(first) == sorted(sampler)


def test_data_that_have_grown_are_refused() -> None:
    sampler = sampler_of("similar", 20)
    list(sampler)
    sampler.data.append(records(21)[-1])
    with pytest.raises(ValueError, match="Expected the 20 records that the sampler was made for, got 21"):
        list(sampler)


def test_it_learns_where_the_useful_records_are() -> None:
    # Records with token 31 score high, and there are one in three of them.
    sampler = ProposedSampler(records(3000), LearnedProposal(None, dim=32, explore=0.0), count=8, read_ahead=48)
    shares = []
    for batch in loader_of(sampler):
        useful = torch.tensor([float(number % 3 == 1) for number in batch], dtype=torch.float64)
        sampler.observe(
            selection(0, n=8, keep=1, gram=torch.eye(8).double(), cross_gram=0.9 * useful - 0.1, target_energy=1.0)
        )
        shares.append(float(useful.mean()))
    assert sum(shares[-20:]) / 20 > 0.9


def test_features_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proposal = LearnedProposal(TARGET, dim=4)
    asked: Counter[int] = Counter()
    inner = proposal.features

    def counting(samples: Sequence[Mapping[str, Any]]) -> Tensor:
        asked.update(sample["input_ids"][-1] for sample in samples)
        return inner(samples)

    monkeypatch.setattr(proposal, "features", counting)
    sampler = ProposedSampler(records(40), proposal, count=3)
    asked.clear()
    for _ in range(2):
        steps(sampler, loader_of(sampler))
    assert asked == dict.fromkeys(range(40), 1)


class _ManyAtOnce(list[Record]):
    def __getitems__(self, numbers: list[int]) -> list[Record]:
        self.calls = getattr(self, "calls", 0) + 1
        return [self[number] for number in numbers]


def test_records_are_fetched_together_and_encoded() -> None:
    data = _ManyAtOnce(records(20))
    sampler = ProposedSampler(
        data,
        SimilarityProposal([{"input_ids": [31]}]),
        count=2,
        read_ahead=10,
        encode=lambda record: {"input_ids": record["input_ids"][1:2]},
    )
    assert all(number % 3 == 1 for number in sampler)
    assert data.calls <= 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": iter([])}, TypeError, "CandidateStream"),
        ({"data": []}, ValueError, "at least one record"),
        ({"proposal": lambda samples: samples}, TypeError, "Expected a Proposal"),
        ({"count": 0}, ValueError, "count of at least 1"),
        ({"count": 2.5}, ValueError, "Expected integers"),
        ({"read_ahead": 8.5}, ValueError, "Expected integers"),
        ({"read_ahead": 2}, ValueError, "count=3 and read_ahead=2"),
        ({"passed_over": "lose"}, ValueError, "'drop' or 'keep', got 'lose'"),
        ({"read_ahead": None, "passed_over": "drop"}, ValueError, "needs a number as read_ahead"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"data": records(9), "proposal": UniformProposal(), "count": 3, "read_ahead": 8, **arguments}
    with pytest.raises(error, match=message):
        ProposedSampler(**given)


def test_a_state_of_other_settings_is_refused() -> None:
    state = sampler_of("learned").state_dict()
    for changed in ({"n": 51}, {"count": 4}, {"read_ahead": 9}, {"passed_over": "keep"}, {"seed": 1}):
        other = sampler_of("learned", **changed)
        before = other.state_dict()
        with pytest.raises(ValueError, match="Expected the state of a sampler with"):
            other.load_state_dict(state)
        assert str(other.state_dict()) == str(before)
    with pytest.raises(ValueError, match="state of a proposal"):
        sampler_of("similar").load_state_dict(state)


def test_a_proposal_that_chooses_twice_is_refused() -> None:
    class Twice(_First):
        def propose(self, samples: Any, count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int64)

    sampler = ProposedSampler(records(9), Twice(), count=3, read_ahead=8)
    with pytest.raises(ValueError, match="3 different positions of 8"):
        next(iter(sampler))
    assert (sampler.read, sampler.given) == (0, 0)


def test_one_of_several_processes_learns_from_its_own_candidates() -> None:
    alone, beside = sampler_of("learned"), sampler_of("learned")
    numbers = [list(islice(iter(sampler), 3)) for sampler in (alone, beside)]
    own, others = scores_of(numbers[0]), scores_of([7, 9])
    alone.observe(own)
    whole = selection(
        0,
        n=5,
        keep=1,
        gram=torch.eye(5).double(),
        cross_gram=torch.cat([others.cross_gram, own.cross_gram]),
        target_energy=1.0,
        mine=slice(2, 5),
    )
    beside.observe(whole)
    learned = [sampler.proposal.state_dict()["learned"] for sampler in (alone, beside)]
    torch.testing.assert_close(*learned, rtol=0, atol=0)
    assert beside.taken == 3
