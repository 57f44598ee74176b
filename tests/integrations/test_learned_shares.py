"""Sources that are drawn by the weight of their candidates: what is learned, and that a resumed run learns the same."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw_optim import Selection
from ftw_optim.integrations.streaming import CandidateStream, LearnedShares
from ftw_optim.integrations.streaming._shares import SourceShares
from ftw_optim.proposals import UniformProposal
from tests.support.selections import selection
from tests.support.streams import encode, ids

NAMES = ("a", "b", "c")
GIVEN = {"a": 0.5, "b": 0.3, "c": 0.2}
HALF = LearnedShares(decay=0.5)


def stream(*, batch_size: int = 4, shares: Any = HALF, **options: Any) -> CandidateStream:
    sources = {name: [{"n": 11 * number} for number in range(40)] for name in NAMES}
    fixed = {"seed": 3, "passes": None, "probabilities": GIVEN, "shuffle_buffer": 5}
    return CandidateStream(sources, encode, batch_size=batch_size, shares=shares, **{**fixed, **options})


def favouring(samples: Sequence[Mapping[str, Any]], worth: Mapping[str, float]) -> Selection:
    """A selection that keeps all candidates, each with the weight of its source."""
    weights = torch.tensor([worth[sample["source"]] for sample in samples], dtype=torch.float64)
    total = float(weights.sum())
    weights = weights / total if total else weights
    return selection(1, n=len(samples), kept=torch.arange(len(samples)), weights=weights)


@given(
    st.lists(st.lists(st.floats(0.0, 10.0), min_size=3, max_size=3), max_size=20),
    st.floats(0.0, 0.99),
    st.floats(0.01, 1.0),
)
def test_no_source_starves_whatever_is_learned(worths: list[list[float]], decay: float, floor: float) -> None:
    shares = SourceShares(LearnedShares(decay=decay, floor=floor), {name: 7 * one for name, one in GIVEN.items()})
    samples = [{"source": name} for name in NAMES]
    average = dict(GIVEN)
    for worth in worths:
        shares.observe(samples, favouring(samples, dict(zip(NAMES, worth, strict=True))))
        if (total := sum(worth)) > 0:
            average = {
                name: decay * average[name] + (1 - decay) * one / total for name, one in zip(NAMES, worth, strict=True)
            }
        found = shares.probabilities()
        assert sum(found.values()) == pytest.approx(1.0)
        for name, one in found.items():
            assert one >= floor * GIVEN[name] - 1e-12
            assert one == pytest.approx((1 - floor) * average[name] + floor * GIVEN[name], abs=1e-9)


def test_the_sources_of_the_weight_are_drawn() -> None:
    """All of the weight goes to the rarest source: at rest it has all but the floor of the others."""
    candidates = stream(shares="learned")
    assert candidates.shares == pytest.approx(GIVEN)
    drawn: Counter[str] = Counter()
    for step, samples in enumerate(islice(iter(candidates), 600)):
        candidates.observe(samples, favouring(samples, {"a": 0.0, "b": 0.0, "c": 1.0}))
        if step >= 300:
            drawn.update(sample["source"] for sample in samples)
    expected = {"a": 0.2 * 0.5, "b": 0.2 * 0.3, "c": 0.8 + 0.2 * 0.2}
    assert candidates.shares == pytest.approx(expected, abs=1e-4)
    for name, share in expected.items():
        assert drawn[name] / drawn.total() == pytest.approx(share, abs=0.04)  # 1,200 draws


def test_candidates_of_equal_worth_leave_the_shares_near_the_given_ones() -> None:
    candidates = stream(shares=LearnedShares(decay=0.98, floor=0.5), batch_size=16)
    for samples in islice(iter(candidates), 300):
        candidates.observe(samples, favouring(samples, dict.fromkeys(NAMES, 1.0)))
    for name, share in candidates.shares.items():
        assert share == pytest.approx(GIVEN[name], abs=0.15)


def test_shares_that_are_not_asked_for_stay() -> None:
    plain = stream(shares=None)
    assert plain.shares == pytest.approx(GIVEN)
    with pytest.raises(ValueError, match='shares="learned"'):
        plain.observe([], selection(1, n=0, kept=torch.empty(0, dtype=torch.int64), weights=torch.empty(0)))
    learning = stream()
    first = [ids(samples) for samples in islice(iter(learning), 3)]
    assert first == [ids(samples) for samples in islice(iter(plain), 3)]


def run(candidates: CandidateStream, steps: int, ahead: int) -> list[tuple[list[str], dict[str, Any]]]:
    """The ids of each step's samples and the state after it, where so many items are read before they are needed."""
    items, waiting, done = iter(candidates), deque[Any](), []
    start = candidates.state_dict()["position"]["items"]
    for step in range(1, steps + 1):
        while len(waiting) <= ahead:
            waiting.append(next(items))
        samples = waiting.popleft()
        candidates.observe(samples, favouring(samples, {"a": 1.0, "b": 0.1 * (len(done) % 3), "c": 2.0}))
        done.append((ids(samples), json.loads(json.dumps(candidates.state_dict(start + step)))))
    return done


@settings(max_examples=20)
@given(st.integers(0, 3), st.integers(1, 9), st.booleans())
def test_a_resumed_run_draws_the_same(ahead: int, stopped: int, proposes: bool) -> None:
    options: dict[str, Any] = {"lookahead": ahead + 1}

    def made() -> CandidateStream:
        proposal = {"proposal": UniformProposal(seed=1), "read_ahead": 6} if proposes else {}
        return stream(**options, **proposal)

    whole = made()
    uninterrupted = [found for found, _ in run(whole, 18, ahead)]
    # The worth of a step depends on its number since the start, so stops are at multiples of three.
    states = [state for _, state in run(made(), 3 * (stopped // 2 + 1), ahead)]
    resumed = made()
    resumed.load_state_dict(states[-1])
    rest = run(resumed, 18 - len(states), ahead)
    assert [found for found, _ in rest] == uninterrupted[len(states) :]
    assert resumed.shares == whole.shares


def test_all_ranks_draw_by_the_shares_of_all() -> None:
    whole = stream(batch_size=8)
    parts = [stream(batch_size=4, rank=rank, ranks=2) for rank in range(2)]
    for step, samples in enumerate(islice(iter(whole), 12)):
        dealt = [next(iter(part)) for part in parts]
        joined = [sample for part in dealt for sample in part]
        assert sorted(ids(joined)) == sorted(ids(samples))
        worth = {"a": 1.0, "b": 0.0, "c": 0.5 * (step % 2)}
        whole.observe(samples, favouring(samples, worth))
        for part, own in zip(parts, dealt, strict=True):
            part.observe(own, favouring(joined, worth))
        for part in parts:
            assert part.shares == pytest.approx(whole.shares)


def test_a_state_of_other_shares_is_refused() -> None:
    state = stream().state_dict()
    for other in (stream(shares=None), stream(shares=LearnedShares(decay=0.9))):
        with pytest.raises(ValueError, match="shares"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="shares"):
        stream().load_state_dict(stream(shares=None).state_dict())


def test_wrong_shares_are_errors() -> None:
    with pytest.raises(TypeError, match="'learned' or a LearnedShares"):
        stream(shares="fixed")
    with pytest.raises(ValueError, match="source_field"):
        stream(source_field="kind")
    with pytest.raises(ValueError, match="decay must be in"):
        LearnedShares(decay=1.0)
    with pytest.raises(ValueError, match="no source starves"):
        LearnedShares(floor=0.0)
    candidates = stream()
    samples = next(iter(candidates))
    with pytest.raises(ValueError, match="a sample for each of the 9 candidates"):
        candidates.observe(samples, selection(1, n=9))
    with pytest.raises(ValueError, match="got one of 'other'"):
        candidates.observe([{"source": "other"}] * 4, selection(1, n=4))
