"""The vetted proposal: it leaves out a kind of records that is worth less, and nothing where there is one kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim.integrations.streaming._proposing import packed, unpacked
from ftw_optim.proposals import SimilarityProposal, VettedProposal
from ftw_optim.proposals.features import likeness_of
from ftw_optim.proposals.kinds import LEAST, REMEMBERED, two_kinds
from ftw_optim.proposals.scoring import ScoreRegression
from tests.support.grids import slow
from tests.support.selections import of_scores

_TARGET = [{"input_ids": list(range(20))}]
_REGRESSION: dict[str, Any] = {
    "dim": 8,
    "embedding": None,
    "use_source": False,
    "ridge": 8.0,
    "forgetting": 0.98,
    "prior": 0.0,
    "seed": 0,
    "by_likeness": False,
}
_OFFERED, _CHOSEN = 64, 8


def offered(generator: torch.Generator, *, damaged: float = 0.5) -> list[dict[str, Any]]:
    """Records of 8 prompt tokens, like the target's in different shares; a share has a placeholder as its answer."""
    records = []
    for _ in range(_OFFERED):
        like = float(torch.rand(1, generator=generator))
        prompt = [
            int(torch.randint(0, 20, (1,), generator=generator))
            + (0 if float(torch.rand(1, generator=generator)) < like else 20)
            for _ in range(8)
        ]
        spoilt = float(torch.rand(1, generator=generator)) < damaged
        answer = [90] if spoilt else torch.randint(40, 80, (6,), generator=generator).tolist()
        records.append({"input_ids": [*prompt, *answer], "labels": [-100] * 8 + answer, "spoilt": spoilt, "like": like})
    return records


def steps(
    proposal: Any,
    count: int,
    *,
    sound: float = 0.15,
    spoilt: float | None = -0.02,
    noise: float = 0.08,
    damaged: float = 0.5,
    seed: int = 5,
) -> list[list[dict[str, Any]]]:
    """What is proposed in some steps. Sound records score the better the more like the target, spoilt ones never."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        records = offered(generator, damaged=damaged)
        chosen = [records[i] for i in proposal.propose(records, _CHOSEN).tolist()]
        scores = torch.tensor(
            [spoilt if one["spoilt"] and spoilt is not None else 2.0 * sound * one["like"] for one in chosen]
        )
        proposal.observe(chosen, of_scores(scores + noise * torch.randn(len(chosen), generator=generator)))
        found.append(chosen)
    return found


def share_spoilt(found: Sequence[Sequence[dict[str, Any]]]) -> float:
    chosen = [one for step in found for one in step]
    return sum(one["spoilt"] for one in chosen) / len(chosen)


@pytest.mark.parametrize("order", ["likeness", "uniform"])
@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_a_worse_kind_is_left_out_but_for_what_is_explored(order: Any, seed: int) -> None:
    proposal = VettedProposal(_TARGET, order=order, dim=64, seed=seed)
    found = steps(proposal, 40, seed=seed)
    assert share_spoilt(found[:4]) > 0.3
    assert proposal.vetoes
    assert share_spoilt(found[20:]) < 0.125 + 0.08


@pytest.mark.parametrize("damaged", [0.25, 0.5])
@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_two_kinds_are_told_apart_within_a_few_steps(damaged: float, seed: int) -> None:
    proposal = VettedProposal(_TARGET, dim=64, seed=seed)
    steps(proposal, 12, damaged=damaged, seed=seed)
    assert proposal.vetoes


@pytest.mark.parametrize(
    ("mean", "seeds"), [(0.0, range(4)), (0.05, range(4)), slow(0.0, range(4, 16)), slow(0.05, range(4, 16))]
)
def test_kinds_that_are_worth_the_same_are_hardly_ever_left_out(mean: float, seeds: range) -> None:
    """And seldom where scores are about zero, as those of a random stream are: there every shortfall is large."""
    vetoed = []
    for seed in seeds:
        proposal = VettedProposal(_TARGET, dim=64, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            records = offered(generator)
            chosen = [records[place] for place in proposal.propose(records, _CHOSEN).tolist()]
            scores = mean + 0.08 * torch.randn(_CHOSEN, generator=generator)
            proposal.observe(chosen, of_scores(scores, torch.ones(_CHOSEN)))
            vetoed.append(proposal.vetoes)
    assert sum(vetoed) <= 0.15 * len(vetoed)


def test_what_teaches_little_is_left_out_though_it_points_the_right_way() -> None:
    """Short gradients of the same direction, as of answers of a word or two by token, or of what is learned soon."""

    def vetoes(length: float) -> tuple[bool, float]:
        proposal = VettedProposal(_TARGET, dim=64)
        generator = torch.Generator().manual_seed(3)
        found = []
        for _ in range(40):
            records = offered(generator)
            chosen = [records[place] for place in proposal.propose(records, _CHOSEN).tolist()]
            scores = 0.1 + 0.08 * torch.randn(_CHOSEN, generator=generator)
            lengths = torch.tensor([length if one["spoilt"] else 1.0 for one in chosen])
            proposal.observe(chosen, of_scores(scores, lengths))
            found.append(chosen)
        return proposal.vetoes, share_spoilt(found[20:])

    (never, all_of_them), (soon, few) = vetoes(1.0), vetoes(0.2)
    assert not never
    assert soon
    assert all_of_them > 0.4
    assert few < 0.2


def test_the_expected_worth_is_the_expected_score_times_the_expected_length() -> None:
    """Each as by a regression of its own, on the same columns."""
    proposal = VettedProposal(_TARGET, dim=8)
    generator = torch.Generator().manual_seed(0)
    records = offered(generator)[: LEAST - 1]  # so few that no kinds are looked for
    scores, lengths = 0.3 * torch.rand(LEAST - 1, generator=generator), 0.2 + torch.rand(LEAST - 1, generator=generator)
    proposal.observe(records, of_scores(scores, lengths))
    one, other = ScoreRegression(_TARGET, **_REGRESSION), ScoreRegression(_TARGET, **_REGRESSION)
    columns = one.columns(one.features(records))
    one.learned.observe(columns, scores.double()[:, None])
    other.learned.observe(columns, (lengths / lengths.square().mean().sqrt()).log().double()[:, None])
    of_scores_, of_lengths = (columns @ each.coefficients([columns])[:, 0] for each in (one, other))
    torch.testing.assert_close(proposal._kinds.expected(columns), of_scores_ * of_lengths.exp(), rtol=1e-6, atol=1e-8)


def test_the_surer_a_veto_is_the_less_is_tried_of_what_it_leaves_out() -> None:
    def tried(noise: float) -> float:
        proposal = VettedProposal(_TARGET, dim=64)
        steps(proposal, 20, noise=noise)
        assert proposal.vetoes
        return share_spoilt(steps(proposal, 40, noise=noise, seed=6))

    assert tried(0.02) < tried(0.2) < 0.125
    assert tried(0.05) > 0.0


def test_no_more_is_tried_of_the_worse_kind_than_chance_would_take() -> None:
    proposal = VettedProposal(_TARGET, dim=64, order="uniform", explore=1.0)
    steps(proposal, 30)
    assert proposal.vetoes
    assert share_spoilt(steps(proposal, 20, damaged=0.25, seed=8)) < 0.4


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_among_records_of_one_kind_it_is_likeness_alone(seed: int) -> None:
    """Scores that differ by noise and by likeness alone say nothing more."""
    vetted = steps(VettedProposal(_TARGET, dim=64, seed=seed), 30, damaged=0.0, seed=seed)
    similar = steps(SimilarityProposal(_TARGET, seed=seed), 30, damaged=0.0, seed=seed)
    features = SimilarityProposal(_TARGET, seed=seed).features
    same = [
        torch.equal(likeness_of(features(a)).sort().values, likeness_of(features(b)).sort().values)
        for a, b in zip(vetted, similar, strict=True)
    ]
    assert sum(same) >= 28


def test_damage_that_does_no_harm_is_not_left_out() -> None:
    proposal = VettedProposal(_TARGET, dim=64)
    steps(proposal, 30, spoilt=None)
    assert not proposal.vetoes


@pytest.mark.slow
def test_what_turns_out_good_comes_back() -> None:
    proposal = VettedProposal(_TARGET, dim=64, forgetting=0.9)
    steps(proposal, 30)
    assert proposal.vetoes
    later = steps(proposal, 60, spoilt=0.3, sound=0.02, seed=6)
    assert share_spoilt(later[-10:]) > 0.3


@pytest.mark.parametrize("state", ["blind", "stale"])
def test_a_guide_that_is_not_honest_teaches_nothing(state: str) -> None:
    proposal, other = VettedProposal(_TARGET, dim=8), VettedProposal(_TARGET, dim=8)
    records = offered(torch.Generator().manual_seed(0))[:4]
    proposal.observe(records, of_scores(torch.arange(4.0) / 8, **{state: True}))
    assert packed(proposal.state_dict()) == packed(other.state_dict())


def test_the_state_in_the_midst_of_a_veto_goes_on_as_it_would_have() -> None:
    one = VettedProposal(_TARGET, dim=64)
    steps(one, 25)
    assert one.vetoes
    other = VettedProposal(_TARGET, dim=64)
    other.load_state_dict(unpacked(packed(one.state_dict())))
    first, second = steps(one, 5, seed=9), steps(other, 5, seed=9)
    assert first == second
    with pytest.raises(ValueError, match="settings"):
        VettedProposal(_TARGET, dim=64, explore=0.2).load_state_dict(one.state_dict())
    broken = one.state_dict()
    broken["kinds"] = {**broken["kinds"], "worse": torch.zeros(3, 2, dtype=torch.float64)}
    short = one.state_dict()
    short["learned"] = {**short["learned"], "cross": short["learned"]["cross"][:, :1]}
    before = packed(other.state_dict())
    with pytest.raises(ValueError, match="columns of each remembered record"):
        other.load_state_dict(broken)
    with pytest.raises(ValueError, match="Expected sums of"):
        other.load_state_dict(short)
    with pytest.raises(ValueError, match="the state of another release"):
        other.load_state_dict({**one.state_dict(), "kinds": {"vetoes": True, "least": 0.0}})
    assert packed(other.state_dict()) == before


def test_both_kinds_stay_in_memory() -> None:
    proposal = VettedProposal(_TARGET, dim=64)
    steps(proposal, 90)
    kinds = proposal._kinds
    assert len(kinds._worse) + len(kinds._better) == REMEMBERED
    lower, upper = (kinds.expected(kind) for kind in (kinds._worse, kinds._better))
    assert float(lower.mean()) < kinds._border < float(upper.mean())
    # As each was found by the numbers of its time.
    assert float((lower <= kinds._border).double().mean()) > 0.9
    assert float((upper > kinds._border).double().mean()) > 0.9


def test_nothing_is_told_of_few_records() -> None:
    proposal = VettedProposal(_TARGET, dim=64)
    steps(proposal, LEAST // _CHOSEN, noise=0.01)
    assert not proposal.vetoes


def test_where_all_are_of_the_worse_kind_they_are_proposed() -> None:
    proposal = VettedProposal(_TARGET, dim=64)
    steps(proposal, 30)
    records = [one for one in offered(torch.Generator().manual_seed(3)) if one["spoilt"]]
    assert len(proposal.propose(records, _CHOSEN)) == _CHOSEN
    assert len(proposal.propose([], _CHOSEN)) == 0
    assert sorted(proposal.propose(records[:3], _CHOSEN).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"order": "best"}, "order must be"),
        ({"target_samples": None}, "needs target_samples"),
        ({"explore": 2.0}, "explore must be"),
        ({"dim": 0}, "dim must be"),
        ({"ridge": 0.0}, "ridge must be"),
    ],
    ids=str,
)
def test_bad_arguments_are_told(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VettedProposal(**{"target_samples": _TARGET, **arguments})


@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=40))
def test_two_kinds_are_those_with_the_least_variance_within(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    point, apart = two_kinds(values)
    ordered, n = values.sort().values, len(values)
    least = max(1, n // 10)

    def within(at: int) -> float:
        return sum(float((part - part.mean()).square().sum()) for part in (ordered[:at], ordered[at:]))

    best = min(within(at) for at in range(least, n - least + 1))
    low, high = values[values <= point], values[values > point]
    assert apart >= 0.0
    if apart > 1e-3 and len(high):  # equal numbers are of no kind
        found = sum(float((part - part.mean()).square().sum()) for part in (low, high))
        assert found == pytest.approx(best, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_numbers_that_differ_by_rounding_alone_are_of_one_kind(value: float) -> None:
    assert two_kinds(torch.full((24,), value, dtype=torch.float64))[1] == 0.0
    assert two_kinds(torch.tensor([value] * 12 + [value * (1 + 2e-16)] * 12, dtype=torch.float64))[1] == 0.0


def test_how_far_apart_the_halves_of_a_normal_distribution_are() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 2 * math.sqrt(2 / math.pi) / math.sqrt(1 - 2 / math.pi)
    assert two_kinds(values)[1] == pytest.approx(expected, rel=0.01)
    assert isinstance(values, Tensor)
