"""Whether likeness is borne out by scores: against weighted least squares, and what is proposed by it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftw_optim import (
    FilterStage,
    GreedyFilter,
    KeepAll,
    Matching,
    NonNegativeLeastSquares,
    SelectiveOptimizer,
    UniformWeights,
)
from ftw_optim.integrations.streaming._proposing import packed, unpacked
from ftw_optim.proposals import FilterUnless, SimilarityProposal, VettedProposal, WeightUnless
from ftw_optim.proposals.features import likeness_of
from ftw_optim.proposals.trust import LikenessTrust
from tests.support.grids import slow
from tests.support.selections import of_scores

_TARGET = [{"input_ids": list(range(20))}]
_OFFERED, _CHOSEN = 64, 8

numbers = st.floats(-1, 1, allow_nan=False, width=32)
a_step = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8)


def trust_of(steps: Sequence[Sequence[tuple[float, float]]]) -> LikenessTrust:
    trust = LikenessTrust()
    for step in steps:
        pairs = torch.tensor(step, dtype=torch.float64)
        trust.observe(pairs[:, 0], pairs[:, 1])
    return trust


def by_least_squares(steps: Sequence[Sequence[tuple[float, float]]], value: float) -> float:
    """The same from a regression with a constant for each step, each row by its weight, and the guess as a row more."""
    rows, wanted, weights = [], [], []
    for number, step in enumerate(steps):
        for likeness, score in step:
            rows.append([likeness, *(float(number == other) for other in range(len(steps)))])
            wanted.append(score)
            weights.append(0.95 ** (len(steps) - 1 - number))
    x, y, w = (torch.tensor(values, dtype=torch.float64) for values in (rows, wanted, weights))
    found = torch.linalg.lstsq(x * w.sqrt()[:, None], y * w.sqrt(), driver="gelsd").solution
    left = float((w * (y - x @ found).square()).sum())
    freedom = float(w.sum()) - sum(0.95**number for number in range(len(steps)))
    variance = (4.0 * 0.1**2 + left) / (4.0 + freedom)
    # The guess, 0.2 with an error of 0.3, is an observation of the slope alone.
    x = torch.cat([x, torch.eye(1, x.shape[1], dtype=torch.float64)])
    y, w = torch.cat([y, torch.tensor([0.2])]), torch.cat([w, torch.tensor([variance / 0.3**2])])
    scaled = x * w.sqrt()[:, None]
    slope = torch.linalg.solve(scaled.T @ scaled, scaled.T @ (y * w.sqrt()))[0]
    error = (variance * torch.linalg.inv(scaled.T @ scaled)[0, 0]).sqrt()
    return float(torch.special.ndtr((slope - value) / error))


@settings(max_examples=100)
@given(st.lists(a_step, min_size=1, max_size=4), numbers)
def test_the_slope_is_the_pooled_one_of_the_steps(steps: list[list[tuple[float, float]]], value: float) -> None:
    likeness = torch.cat([torch.tensor(step)[:, 0] - torch.tensor(step)[:, 0].mean() for step in steps])
    if float(likeness.norm()) < 1e-2:
        return
    assert trust_of(steps).slope_above(value) == pytest.approx(by_least_squares(steps, value), abs=1e-6)


@settings(max_examples=100)
@given(st.lists(a_step, max_size=4), numbers, st.floats(0, 1))
def test_a_shift_of_a_step_does_nothing_and_a_steeper_slope_is_no_less_probable(
    steps: list[list[tuple[float, float]]], shift: float, slope: float
) -> None:
    found = trust_of(steps).slope_above(0.0)
    assert 0.0 <= found <= 1.0
    shifted = trust_of(
        [[(likeness, score + number * shift) for likeness, score in step] for number, step in enumerate(steps)]
    )
    assert shifted.slope_above(0.0) == pytest.approx(found, abs=1e-6)
    steeper = trust_of([[(likeness, score + slope * likeness) for likeness, score in step] for step in steps])
    # What the slope leaves over stays what it was.
    assert steeper.slope_above(0.0) >= found - 1e-9


@pytest.mark.parametrize("steps", [[], [[(0.3, 0.2)]], [[(0.3, 0.2), (0.3, -0.4)]]], ids=["none", "one", "alike"])
def test_where_nothing_is_known_it_is_the_guess(steps: list[list[tuple[float, float]]]) -> None:
    trust = trust_of(steps)
    assert not trust.trusts
    assert trust.slope_above(0.05) == pytest.approx(float(torch.special.ndtr(torch.tensor(0.15 / 0.3))))
    assert trust.share() == 0.5


RISING = [(0.1 * number, 0.05 * number) for number in range(8)]
FLAT = [(likeness, 0.1 + 0.02 * (number % 2)) for number, (likeness, _) in enumerate(RISING)]
FALLING = [(likeness, 0.4 - score) for likeness, score in RISING]
HARMFUL = [(likeness, score - 2.0) for likeness, score in RISING]


def test_it_comes_where_scores_rise_and_are_positive_and_goes_where_they_fall_or_are_negative() -> None:
    assert [trust_of([RISING] * count).trusts for count in (0, 1, 2, 30)] == [False, True, True, True]
    assert not any(trust_of([step] * count).trusts for step in (FLAT, FALLING) for count in (1, 2, 5, 30))
    assert trust_of([HARMFUL] * 3).slope_above(0.0) > 0.99
    assert not trust_of([HARMFUL] * 3).trusts  # the most alike harm too, only less
    assert trust_of([RISING] * 3 + [FLAT] * 40).trusts
    assert not trust_of([RISING] * 3 + [FALLING] * 20).trusts
    assert not trust_of([RISING] * 3 + [HARMFUL] * 3).trusts
    assert trust_of([FALLING] * 3 + [RISING] * 20).trusts
    assert trust_of([RISING] * 5).share() > 0.95
    assert trust_of([FALLING] * 3).share() < 0.05
    assert trust_of([FLAT] * 30).share() < 0.05  # does no harm either
    assert trust_of([RISING] * 5 + [HARMFUL] * 3).share() == 0.5


def test_what_is_known_fades_without_an_end_to_the_arithmetic() -> None:
    trust = trust_of([FALLING] * 5)
    same, scores = torch.zeros(2), torch.tensor([0.0, 0.1])
    for _ in range(20_000):  # until the sums are denormal numbers, and then zero
        trust.observe(same, scores)
    assert trust.slope_above(0.0) == pytest.approx(trust_of([]).slope_above(0.0))


def offered(generator: torch.Generator) -> list[dict[str, Any]]:
    """Records that share between none and all of their tokens with the target."""
    records = []
    for _ in range(_OFFERED):
        like = float(torch.rand(1, generator=generator))
        alike = torch.rand(12, generator=generator) < like
        tokens = torch.randint(0, 20, (12,), generator=generator) + 20 * (~alike).long()
        records.append({"input_ids": tokens.tolist(), "like": like})
    return records


def mean_likeness(proposal: VettedProposal, count: int, *, slope: float, seed: int) -> list[float]:
    """Of what is proposed in some steps, where scores rise with likeness by a slope."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        records = offered(generator)
        chosen = [records[place] for place in proposal.propose(records, _CHOSEN).tolist()]
        like = torch.tensor([one["like"] for one in chosen], dtype=torch.float64)
        noise = 0.05 * torch.randn(_CHOSEN, generator=generator, dtype=torch.float64)
        proposal.observe(chosen, of_scores(0.1 + slope * (like - 0.5) + noise))
        found.append(float(like.mean()))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_likeness_is_followed_where_scores_rise_with_it(seed: int) -> None:
    helps, harms, tells_nothing = (VettedProposal(_TARGET, order="tested", dim=32, seed=seed) for _ in range(3))
    rising = mean_likeness(helps, 20, slope=0.3, seed=seed)
    assert mean(rising[5:]) > 0.8
    assert helps.trusts_likeness()
    falling = mean_likeness(harms, 20, slope=-0.3, seed=seed)
    assert mean(falling[5:]) < 0.6
    assert not harms.trusts_likeness()
    neither = mean_likeness(tells_nothing, 20, slope=0.0, seed=seed)
    assert not tells_nothing.trusts_likeness()
    assert mean(neither[5:]) < 0.6
    assert mean(mean_likeness(harms, 40, slope=0.3, seed=seed)[30:]) > 0.8  # what was not trusted may be, later
    assert harms.trusts_likeness()


@pytest.mark.parametrize("contrast", [True, False])
def test_at_first_half_are_the_most_alike_and_the_others_come_at_random(contrast: bool) -> None:
    """Also beyond the stream: by likeness alone, which is tested, the first steps would be of other records."""
    proposal = VettedProposal(_TARGET, order="tested", contrast=contrast, dim=8)
    alike = SimilarityProposal(_TARGET, contrast=contrast)
    records = offered(torch.Generator().manual_seed(1))
    rank = alike.propose(records, _OFFERED).argsort().double()
    chosen = proposal.propose(records, 32)
    assert not proposal.trusts_likeness()
    assert sorted(rank[chosen[:16]].tolist()) == list(range(16))
    assert float(rank[chosen[16:]].mean()) > 30.0  # 39.5 on average


@pytest.mark.parametrize("floor", [0.0, 0.125, 0.3, 1.0])
def test_however_much_likeness_is_trusted_a_share_comes_at_random(
    floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 of 64 records at a call, those of the 48 least alike."""
    monkeypatch.setattr(LikenessTrust, "share", lambda trust: 1.0)
    proposal = VettedProposal(_TARGET, order="tested", dim=8, floor=floor)
    records = offered(torch.Generator().manual_seed(1))
    like = likeness_of(proposal.features(records)) + torch.arange(_OFFERED) * 1e-9  # no two alike
    found = torch.zeros(_OFFERED)
    calls = 400
    for _ in range(calls):
        chosen = proposal.propose(records, _CHOSEN)
        assert len(set(chosen.tolist())) == _CHOSEN
        found[chosen] += 1 / calls
    rare = like.argsort()[: _OFFERED - _CHOSEN - 8]
    at_random, left = floor * _CHOSEN, _OFFERED - (1 - floor) * _CHOSEN
    assert float(found[rare].sum()) == pytest.approx(at_random * len(rare) / left, abs=0.2)
    assert (float(found[rare].max()) > 0.0) == (floor > 0.0)
    if floor:
        assert float(found[rare].min()) > 0.0, "nothing starves unseen"


def test_the_longer_only_alike_ones_are_seen_the_more_others_come() -> None:
    generator = torch.Generator().manual_seed(0)
    trust = LikenessTrust()
    for _ in range(20):
        likeness = torch.rand(12, generator=generator)
        trust.observe(likeness, 0.1 + 0.4 * likeness + 0.02 * torch.randn(12, generator=generator))
    assert trust.trusts
    shares = [trust.share()]
    for _ in range(8):
        for _ in range(40):
            trust.observe(torch.full((12,), 0.9), 0.4 + 0.02 * torch.randn(12, generator=generator))
        shares.append(trust.share())
    assert shares[0] > 0.999
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.85


def test_a_floor_that_is_no_share_and_one_of_another_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floor must be a share, from 0 to 1, got 1\.5"):
        VettedProposal(_TARGET, order="tested", floor=1.5)
    state = VettedProposal(_TARGET, order="tested").state_dict()
    with pytest.raises(ValueError, match="floor"):
        VettedProposal(_TARGET, order="tested", floor=0.2).load_state_dict(state)


def test_without_trust_no_kind_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    proposal = VettedProposal(_TARGET, order="tested", dim=16)
    proposal._trust.trusts = True
    records = offered(torch.Generator().manual_seed(2))
    columns = proposal._regression.columns(proposal.features(records))
    judged = torch.zeros(len(records), dtype=torch.float64), torch.arange(len(records)) % 2 == 0
    monkeypatch.setattr(proposal._kinds, "judged", lambda some: judged if len(some) == len(columns) else None)
    assert float((proposal.propose(records, 24) % 2 == 0).double().mean()) < 0.2
    proposal._trust.trusts = False
    assert 0.2 < float((proposal.propose(records, 24) % 2 == 0).double().mean()) < 0.8


def test_the_state_goes_on_as_it_would_have() -> None:
    one, other = (VettedProposal(_TARGET, order="tested", dim=16) for _ in range(2))
    mean_likeness(one, 3, slope=0.1, seed=0)
    assert one._trust.share() not in (0.0, 1.0)
    other.load_state_dict(unpacked(packed(one.state_dict())))
    assert other._trust.share() == one._trust.share()
    assert mean_likeness(one, 4, slope=0.1, seed=3) == mean_likeness(other, 4, slope=0.1, seed=3)
    state, before = one.state_dict(), packed(other.state_dict())
    for trust, said in (
        ({"rows": 1.0}, "Expected the sums rows, spread, .*, got rows: begin anew"),
        ({**state["trust"], "rows": -1.0}, "Expected finite sums of squares"),
        ({**state["trust"], "cross": math.nan}, "Expected finite sums of squares"),
    ):
        with pytest.raises(ValueError, match=said):
            other.load_state_dict({**state, "trust": trust})
    assert packed(other.state_dict()) == before


# --- the stages that go with it


@pytest.mark.parametrize("condition", [True, False])
def test_stages_choose_unless_the_condition_holds(condition: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    target = factors[0] + 0.1 * factors[1]
    matching = Matching(
        gram=factors @ factors.T,
        cross_gram=factors @ target,
        target_energy=float(target @ target),
        losses=torch.ones(6),
        generator=generator,
    )
    keep, fit = GreedyFilter(keep=2), NonNegativeLeastSquares(normalize="norm")
    filtering, weighing = (
        FilterUnless(condition=lambda: condition, filter=keep),
        WeightUnless(condition=lambda: condition, weight=fit),
    )
    kept = filtering(matching)
    assert torch.equal(kept, (KeepAll() if condition else keep)(matching))
    found, expected = ((stage)(matching.restrict(kept)) for stage in (weighing, UniformWeights() if condition else fit))
    assert torch.equal(found.weights, expected.weights)
    assert weighing.normalize == "norm"


@pytest.mark.parametrize(
    "make",
    [
        lambda: FilterUnless(condition=True),  # type: ignore[arg-type]
        lambda: FilterUnless(condition=lambda: True, filter=GreedyFilter),  # type: ignore[arg-type]
        lambda: WeightUnless(condition=lambda: True, weight=None),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_stage_is_refused_at_once(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a stage or a function, got (True|<class|None)"):
        make()


def test_a_copy_asks_the_same_condition_and_what_is_unpickled_says_that_it_has_none() -> None:
    proposal = VettedProposal(_TARGET, order="tested", dim=8)
    for stage in (
        FilterUnless(condition=proposal.trusts_likeness, filter=GreedyFilter(keep=3)),
        WeightUnless(condition=proposal.trusts_likeness, weight=NonNegativeLeastSquares(ridge=0.1)),
    ):
        copied = copy.deepcopy(stage)
        assert copied == stage
        assert copied.condition.__self__ is proposal
        unpickled = pickle.loads(pickle.dumps(stage))
        inner = "filter" if isinstance(stage, FilterUnless) else "weight"
        assert getattr(unpickled, inner) == getattr(stage, inner)
        with pytest.raises(RuntimeError, match="Give the optimizer new ones"):
            unpickled.condition()


def test_records_of_the_kind_left_out_say_nothing_of_likeness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scores are low whatever their likeness, and some of them are tried."""
    proposal = VettedProposal(_TARGET, order="tested", dim=16)
    records = offered(torch.Generator().manual_seed(3))[:8]
    like = likeness_of(proposal.features(records))
    worse = torch.arange(8) >= 4
    monkeypatch.setattr(proposal._kinds, "judged", lambda columns: (torch.zeros(8, dtype=torch.float64), worse))
    proposal.observe(records, of_scores(torch.where(worse, 1.0 - like, like)))
    expected = LikenessTrust()
    expected.observe(like[:4], like[:4])
    assert proposal._trust.slope_above(0.0) == pytest.approx(expected.slope_above(0.0), abs=1e-6)


def test_stages_ask_for_the_metrics_of_those_within() -> None:
    class Euclidean(FilterStage):
        metrics = ("euclidean",)

        def __call__(self, matching: Matching, *more: Matching) -> Tensor:
            return torch.arange(len(more[0]))

    assert FilterUnless(condition=lambda: False, filter=Euclidean()).metrics == ("euclidean",)
    assert WeightUnless(condition=lambda: False).metrics == ()


@pytest.mark.parametrize("trusted", [True, False])
def test_a_run_leaves_the_choice_to_likeness_unless_it_harms(trusted: bool) -> None:
    """With an optimizer and its scores, and a target whose tokens either the records like it share, or the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40)).double()
    proposal = VettedProposal(_TARGET, order="tested", dim=16)
    target = torch.randint(0, 20, (4, 9)) + (0 if trusted else 20)

    def losses(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none").mean(1)

    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        model,
        target=lambda: losses(target),
        filter=FilterUnless(condition=proposal.trusts_likeness, filter=GreedyFilter(keep=2)),
        weight=WeightUnless(condition=proposal.trusts_likeness),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        records = offered(generator)
        chosen = [records[place] for place in proposal.propose(records, _CHOSEN).tolist()]
        batch = torch.tensor([one["input_ids"] for one in chosen])
        before = proposal.trusts_likeness()
        optimizer.step(lambda batch=batch: losses(batch))
        kept = len(optimizer.selection.kept)
        assert kept == _CHOSEN if before else kept <= 2
        proposal.observe(chosen, optimizer.selection)
    assert proposal.trusts_likeness() == trusted
