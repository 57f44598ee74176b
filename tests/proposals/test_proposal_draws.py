"""Draws of proposals: the same again, whatever the order of the records, and uniform where they should be."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw_optim.integrations.streaming._proposing import packed, unpacked
from ftw_optim.proposals import LearnedProposal, Proposal, SimilarityProposal, UniformProposal, VettedProposal
from ftw_optim.proposals.drawing import best_and_uniform, explored, salt
from ftw_optim.proposals.trust import LikenessTrust
from tests.support.selections import selection

TARGET = [{"input_ids": [1, 2, 3]}, {"input_ids": [2, 3, 4]}]
KINDS: dict[str, Callable[[int], Any]] = {
    "uniform": lambda seed: UniformProposal(seed),
    "similar": lambda seed: SimilarityProposal(TARGET, explore=0.3, dim=16, seed=seed),
    "similar, each by itself": lambda seed: SimilarityProposal(TARGET, contrast=False, explore=0.3, seed=seed),
    "similar, drawn": lambda seed: SimilarityProposal(TARGET, temperature=0.1, explore_by="source", dim=16, seed=seed),
    "similar, all explored by source": lambda seed: SimilarityProposal(
        TARGET, explore=1.0, explore_by="source", seed=seed
    ),
    "learned": lambda seed: LearnedProposal(dim=8, seed=seed),
    "learned from likeness": lambda seed: LearnedProposal(TARGET, dim=8, use_source=True, seed=seed),
    "vetted": lambda seed: VettedProposal(TARGET, dim=8, seed=seed),
    "tested": lambda seed: VettedProposal(TARGET, order="tested", dim=8, seed=seed),
    "vetted, in any order": lambda seed: VettedProposal(order="uniform", dim=8, seed=seed),
}


def pool(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Different records of three sources, one of which has four fifths of them."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for i in range(n):
        ids = torch.randint(0, 30, (6,), generator=generator).tolist()
        records.append({"input_ids": [*ids, 100 + i], "source": "common" if i % 10 < 8 else f"rare {i % 2}"})
    return records


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(n=st.integers(1, 20), count=st.integers(1, 8), seed=st.integers(0, 5), random=st.randoms())
def test_the_order_of_the_records_changes_nothing(kind: str, n: int, count: int, seed: int, random: Any) -> None:
    records = pool(n)
    order = random.sample(range(n), n)
    shuffled = [records[i] for i in order]
    one, other = KINDS[kind](seed), KINDS[kind](seed)
    for step in range(3):
        chosen, again = one.propose(records, count), other.propose(shuffled, count)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == len(chosen) == min(n, count)
        assert chosen.tolist() == [order[i] for i in again.tolist()]
        of_step = selection(step, n=len(chosen), keep=1)
        one.observe([records[i] for i in chosen.tolist()], of_step)
        other.observe([shuffled[i] for i in again.tolist()], of_step)


@pytest.mark.parametrize("kind", KINDS)
def test_known_features_give_the_same_draws_and_spare_the_samples(kind: str) -> None:
    records = pool(30)
    one, other = KINDS[kind](1), KINDS[kind](1)
    features = one.features(records)
    for step in range(3):
        chosen = one.propose(records, 5)
        assert torch.equal(other.propose([{}] * 30, 5, features=features), chosen)
        of_step = selection(step, n=5)
        one.observe([records[i] for i in chosen.tolist()], of_step)
        other.observe([{}] * 5, of_step, features=features[chosen])
    with pytest.raises(ValueError, match="Expected features of shape"):
        one.propose(records, 5, features=features[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_calls_draw_anew_and_errors_do_not_count_as_calls(kind: str) -> None:
    records = pool(60)
    proposal, again, other = KINDS[kind](1), KINDS[kind](1), KINDS[kind](2)
    first = [proposal.propose(records, 6).tolist() for _ in range(8)]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        again.propose(records, 0)
    with pytest.raises(ValueError, match="Expected samples with input_ids"):
        again.propose([{}], 1)
    assert [again.propose(records, 6).tolist() for _ in range(8)] == first
    assert [other.propose(records, 6).tolist() for _ in range(8)] != first
    assert proposal.propose([], 3).tolist() == []
    if kind not in ("similar, drawn", "vetted"):  # which may take the same by their likeness
        assert len(set(map(tuple, first))) > 1


@pytest.mark.parametrize(
    "make",
    [
        UniformProposal,
        lambda: SimilarityProposal(TARGET, explore=1.0),
        lambda: LearnedProposal(TARGET, dim=8, explore=1.0),
    ],
    ids=["uniform", "similar", "learned"],
)
def test_where_all_is_explored_every_record_is_equally_likely_in_every_place(make: Callable[[], Any]) -> None:
    n, count, calls = 12, 3, 1200
    proposal = make()
    records = [{"input_ids": record["input_ids"]} for record in pool(n)]  # of no named source
    features = proposal.features(records)
    drawn = torch.stack([proposal.propose(records, count, features=features) for _ in range(calls)])
    for place in range(count):
        counts = torch.bincount(drawn[:, place], minlength=n).double()
        chi_square = float(((counts - calls / n).square() / (calls / n)).sum())
        assert chi_square < 40.0  # 11 degrees of freedom: one in 30,000 seeds is above
    pairs = Counter(tuple(sorted(row[:2])) for row in drawn.tolist())
    assert len(pairs) == n * (n - 1) // 2
    assert max(pairs.values()) < 40  # expected 18, standard deviation 4.3


def test_the_share_to_explore_is_rounded_at_random_and_taken_from_the_rest() -> None:
    records = pool(40)
    greedy = SimilarityProposal(TARGET, contrast=False)
    best = [greedy.propose(records, 4).tolist() for _ in range(20)]
    proposal = SimilarityProposal(TARGET, contrast=False, explore=0.125, seed=3)
    explored = []
    for _ in range(400):
        drawn = proposal.propose(records, 4).tolist()
        likeness = greedy.features(records)[:, 3]
        explored.append(sum(float(likeness[i]) < float(likeness[best[0]].min()) for i in drawn))
    assert set(explored) == {0, 1}
    # Every other call draws one of 37, of which some are as alike as the fourth best: five standard deviations.
    tied = sum(float(value) >= float(likeness[best[0]].min()) for value in likeness) - 3
    expected = 400 * 0.5 * (1 - tied / 37)
    assert abs(sum(explored) - expected) < 5 * 400**0.5 * 0.5


def test_what_lost_a_tie_is_explored_as_often_as_any_other() -> None:
    records = [{"input_ids": [1, 50]}, {"input_ids": [1, 51]}, {"input_ids": [1, 52]}, {"input_ids": [60, 61]}]
    proposal = SimilarityProposal(TARGET, contrast=False, explore=0.5)
    drawn = [proposal.propose(records, 2).tolist() for _ in range(600)]
    assert Counter(best for best, _ in drawn)[3] == 0
    # One in three, if the numbers that decided the tie have no part in it; else one in two.
    assert abs(Counter(explored for _, explored in drawn)[3] - 200) < 5 * (600 * 1 / 3 * 2 / 3) ** 0.5


def test_the_most_alike_come_first_and_temperature_softens_that() -> None:
    records = pool(40)
    greedy = SimilarityProposal(TARGET, contrast=False)
    likeness = greedy.features(records)[:, 3]
    chosen = likeness[greedy.propose(records, 10)]
    assert chosen.tolist() == sorted(likeness.tolist(), reverse=True)[:10]
    means = [
        sum(float(likeness[proposal.propose(records, 10)].mean()) for _ in range(50)) / 50
        for proposal in (
            SimilarityProposal(TARGET, contrast=False, temperature=temperature) for temperature in (0.0, 0.05, 0.3, 1e6)
        )
    ]
    assert means == sorted(means, reverse=True)
    assert abs(means[-1] - float(likeness.mean())) < 0.02  # uniform: its standard error is about 0.005


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    count=st.integers(1, 10),
    as_good=st.floats(0.0, 1.0),
    explore=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 999),
)
def test_the_best_are_drawn_among_as_many_as_are_as_good(
    n: int, count: int, as_good: float, explore: float, seed: int
) -> None:
    """Those without a likeness are none of them."""
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double()
    scores[scores < n // 3] = -torch.inf
    found = best_and_uniform(
        scores,
        torch.arange(n),
        torch.zeros(n),
        count,
        explore=explore,
        explore_by="record",
        salt=seed,
        as_good=as_good,
    )
    assert len(set(found.tolist())) == len(found) == min(n, count)
    best = len(found) - explored(len(found), explore, seed)
    among = math.ceil(as_good * (n - n // 3))
    least = scores.sort(descending=True).values[: max(best, among)]
    assert bool((scores[found[:best]] >= least[-1:]).all())
    if among <= best:
        assert torch.equal(scores[found[:best]], least[:best])


def test_each_of_the_best_is_as_likely_and_those_not_taken_are_explored_as_often_as_others() -> None:
    n, calls = 10, 1200
    counts = torch.zeros(n)
    for number in range(calls):
        found = best_and_uniform(
            torch.arange(n, 0, -1.0),
            torch.arange(n),
            torch.zeros(n),
            4,
            explore=0.5,
            explore_by="record",
            salt=salt(number),
            as_good=0.6,
        )
        assert int((found[:2] < 6).sum()) == 2
        counts[found] += 1
    # Two of the first six, and of the eight that are left two.
    expected = torch.where(torch.arange(n) < 6, 1 / 3 + 2 / 3 / 4, 1 / 4)
    assert bool(((counts - calls * expected).abs() < 5 * (calls * expected * (1 - expected)).sqrt()).all())


@pytest.mark.parametrize(
    "make",
    [SimilarityProposal, VettedProposal, partial(VettedProposal, order="tested")],
    ids=["similar", "vetted", "tested"],
)
def test_of_very_many_records_the_most_alike_are_as_good_as_each_other(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LikenessTrust, "share", lambda _: 1.0)
    records = pool(480)
    known = SimilarityProposal(TARGET, contrast=False).features(records)[:, 3]
    proposal, strict = make(TARGET, contrast=False), make(TARGET, contrast=False, best_share=0.0)
    features = proposal.features(records)
    drawn = [frozenset(proposal.propose(records, 4, features=features).tolist()) for _ in range(40)]
    least = sorted(known.tolist(), reverse=True)[29]
    assert all(float(known[place]) >= least for one in drawn for place in one)
    assert len(set(drawn)) > 35
    assert len(frozenset.union(*drawn)) > 25
    fixed = {tuple(known[strict.propose(records, 4, features=features)].tolist()) for _ in range(10)}
    assert fixed == {tuple(sorted(known.tolist(), reverse=True)[:4])}
    few = [known[make(TARGET, contrast=False).propose(records[:60], 4)].tolist() for _ in range(3)]
    assert few == 3 * [sorted(known[:60].tolist(), reverse=True)[:4]]


def test_beyond_the_stream_and_by_temperature_it_is_as_it_says() -> None:
    records = [*pool(480), *({"input_ids": []} for _ in range(800))]
    proposal = SimilarityProposal(TARGET)
    features = proposal.features(records)
    proposal.propose(records, 4, features=features)
    beyond = proposal._contrast.likeness(proposal._features.plain_columns(features))
    least = beyond.sort(descending=True).values[29]
    drawn = [proposal.propose(records, 4, features=features) for _ in range(40)]
    assert min(float(beyond[one].min()) for one in drawn) >= float(least) - 1e-9
    assert len({tuple(sorted(one.tolist())) for one in drawn}) > 35
    warm = [SimilarityProposal(TARGET, temperature=1e6, best_share=share) for share in (0.0, 1 / 16)]
    one, other = ([each.propose(records, 4, features=features).tolist() for _ in range(20)] for each in warm)
    assert one == other


@pytest.mark.parametrize(
    "make",
    [
        UniformProposal,
        partial(SimilarityProposal, TARGET, contrast=False),
        partial(SimilarityProposal, TARGET, contrast=False, temperature=1.0),
        partial(LearnedProposal, TARGET),
        partial(VettedProposal, TARGET, contrast=False),
        partial(VettedProposal, order="uniform"),
    ],
    ids=["uniform", "similar", "similar by temperature", "learned", "vetted", "vetted at random"],
)
def test_copies_of_a_record_are_drawn_each_for_itself(make: Callable[[], Proposal]) -> None:
    records = [{"input_ids": [1, 50 + i // 8]} for i in range(640)]
    proposal = make()
    drawn = [proposal.propose(records, 8).tolist() for _ in range(30)]
    texts = [len({place // 8 for place in one}) for one in drawn]
    assert sum(texts) / len(texts) > 7.0  # 7.7 on average


def test_of_what_a_veto_leaves_the_most_alike_are_as_good_as_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    records = pool(640)
    proposal = VettedProposal(TARGET, contrast=False, explore=0.0)
    features = proposal.features(records)
    worse = torch.arange(640) % 2 == 0
    monkeypatch.setattr(proposal._kinds, "judged", lambda _: (torch.zeros(640, dtype=torch.float64), worse))
    least = features[~worse, 3].sort(descending=True).values[19]
    drawn = [proposal.propose(records, 4, features=features) for _ in range(40)]
    assert not any(bool(worse[one].any()) or float(features[one, 3].min()) < float(least) for one in drawn)
    assert len({tuple(sorted(one.tolist())) for one in drawn}) > 35


@pytest.mark.slow
def test_sources_take_turns_where_they_are_explored() -> None:
    records = pool(100)
    proposal = SimilarityProposal(TARGET, explore=1.0)
    counts: Counter[str] = Counter()
    for _ in range(300):
        drawn = [records[i]["source"] for i in proposal.propose(records, 2).tolist()]
        assert len(set(drawn)) == 2
        counts.update(drawn)
    assert all(abs(counts[source] - 200) < 5 * 8.2 for source in ("common", "rare 0", "rare 1"))
    by_record = SimilarityProposal(TARGET, explore=1.0, explore_by="record")
    plain = Counter(records[i]["source"] for _ in range(300) for i in by_record.propose(records, 2).tolist())
    assert plain["common"] > 400
    every = [records[i]["source"] for i in proposal.propose(records, 100).tolist()]
    assert Counter(every) == Counter(record["source"] for record in records)  # small sources run out


def _saved(state: dict[str, Any], path: Any) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("way", ["json", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_bit_by_bit_and_that_of_another_proposal_is_refused(kind: str, way: str, tmp_path: Any) -> None:
    records = pool(30)

    def steps(proposal: Proposal, first: int, last: int) -> list[list[int]]:
        found = []
        for step in range(first, last):
            chosen = proposal.propose(records, 5).tolist()
            proposal.observe([records[i] for i in chosen], selection(step))
            found.append(chosen)
        return found

    whole = KINDS[kind](3)
    steps(whole, 0, 6)
    state = whole.state_dict()
    after = steps(whole, 6, 12)
    stored = unpacked(json.loads(json.dumps(packed(state)))) if way == "json" else _saved(state, tmp_path / "state")
    resumed = KINDS[kind](3)
    resumed.load_state_dict(stored)
    assert steps(resumed, 6, 12) == after
    assert packed(whole.state_dict()) == packed(resumed.state_dict())
    before = resumed.state_dict()
    wrong = [KINDS[kind](4).state_dict(), {**state, "kind": "Other"}]
    for refused in wrong:
        with pytest.raises(ValueError, match=r"Expected the state of a proposal with (kind|settings) ="):
            resumed.load_state_dict(refused)
    with pytest.raises(ValueError, match="calls is missing"):
        resumed.load_state_dict({name: value for name, value in state.items() if name != "calls"})
    assert packed(resumed.state_dict()) == packed(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"explore": -0.1}, r"explore must be in \[0, 1\], got -0.1"),
        ({"explore": 1.5}, "explore must be in"),
        ({"explore": float("nan")}, "explore must be in"),
        ({"best_share": 1.5}, r"best_share must be in \[0, 1\], got 1.5"),
        ({"best_share": float("nan")}, "best_share must be in"),
        ({"explore_by": "row"}, "explore_by must be 'record' or 'source', got 'row'"),
        ({"temperature": -1.0}, "temperature must be finite and not negative"),
        ({"target_samples": []}, "Expected target samples, got none"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
    ],
)
def test_options_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimilarityProposal(**{"target_samples": TARGET, **arguments})
