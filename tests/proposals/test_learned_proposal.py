"""The learned proposal: it finds what scores well, whatever likeness says, and its regression is that of a textbook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import Selection
from ftw_optim.integrations.streaming._proposing import packed
from ftw_optim.proposals import LearnedProposal, SimilarityProposal, UniformProposal, scoring
from ftw_optim.proposals.regression import Regression
from ftw_optim.proposals.scoring import ScoreRegression
from tests.support.selections import of_scores, selection

_OFFERED, _CHOSEN, _STEPS = 64, 8, 30
_TARGET = [{"input_ids": list(range(20))}]


def offered(generator: torch.Generator) -> list[dict[str, Any]]:
    """Records of 12 tokens: a share of each, different for each record, comes from the target's 20 tokens of 40."""
    share = torch.rand(_OFFERED, 1, generator=generator)
    of_target = torch.rand(_OFFERED, 12, generator=generator) < share
    ids = torch.randint(0, 20, (_OFFERED, 12), generator=generator) + torch.where(of_target, 0, 20)
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def utilities(records: Sequence[Mapping[str, Any]], value: Tensor) -> Tensor:
    return torch.stack([value[torch.tensor(record["input_ids"])].mean() for record in records])


def chosen_utility(proposal: Any, value: Tensor) -> float:
    """The mean utility of what is proposed in the last third of the steps; scores are utilities with noise."""
    generator = torch.Generator().manual_seed(5)
    last = []
    for _ in range(_STEPS):
        records = offered(generator)
        chosen = [records[i] for i in proposal.propose(records, _CHOSEN).tolist()]
        useful = utilities(chosen, value)
        proposal.observe(chosen, of_scores(useful + 0.05 * torch.randn(len(chosen), generator=generator)))
        last.append(float(useful.mean()))
    return sum(last[-_STEPS // 3 :]) / (_STEPS // 3)


_HIDDEN = 0.4 * torch.randn(40, generator=torch.Generator().manual_seed(8))  # what each token is worth
_ALIKE = torch.cat([torch.full((20,), 0.3), torch.full((20,), -0.3)])  # what the target has is worth something


@pytest.mark.parametrize("embedding", [None, torch.eye(40)], ids=["hashed", "embedding"])
@pytest.mark.parametrize("target", [None, _TARGET], ids=["no target", "target"])
def test_what_scores_well_is_found(target: Any, embedding: Tensor | None) -> None:
    """Utilities of records have a standard deviation of about 0.11, so the best 8 of 64 lie 0.18 above their mean."""
    found = chosen_utility(LearnedProposal(target, embedding=embedding, explore=0.0), _HIDDEN)
    uniform = chosen_utility(UniformProposal(), _HIDDEN)
    assert found > uniform + 0.1


def test_likeness_is_believed_at_first_and_refuted_by_scores() -> None:
    similar = chosen_utility(SimilarityProposal(_TARGET, contrast=False), -_ALIKE)
    learned = chosen_utility(LearnedProposal(_TARGET), -_ALIKE)
    assert similar < -0.15
    assert learned > 0.1
    records = offered(torch.Generator().manual_seed(6))
    first = LearnedProposal(_TARGET, explore=0.0).propose(records, _CHOSEN)
    alike = utilities(records, _ALIKE)
    assert float(alike[first].mean()) > float(alike.mean()) + 0.05
    trusting = LearnedProposal(_TARGET, explore=0.0, prior=100.0).propose(records, _CHOSEN)
    assert set(trusting.tolist()) == set(SimilarityProposal(_TARGET, contrast=False).propose(records, _CHOSEN).tolist())


def test_what_was_useful_is_forgotten_where_it_is_no_longer() -> None:
    proposal = LearnedProposal(explore=0.125, forgetting=0.8)
    assert chosen_utility(proposal, _ALIKE) > 0.1
    assert chosen_utility(proposal, -_ALIKE) > 0.1


@pytest.mark.parametrize(
    ("spoilt", "changes"),
    [
        ({"cross_gram": float("nan")}, {}),
        ({"cross_gram": float("inf")}, {}),
        ({"gram": 0.0}, {}),
        ({"gram": float("nan")}, {}),
        ({"gram": -1.0}, {}),
        ({}, {"rejected": torch.tensor([1])}),
    ],
    ids=str,
)
def test_candidates_without_a_score_teach_nothing(spoilt: dict[str, float], changes: dict[str, Any]) -> None:
    records = offered(torch.Generator().manual_seed(1))[:3]
    of_all = of_scores(torch.tensor([0.1, 0.2, 0.3]))
    for name, value in spoilt.items():
        entry = (1,) if name == "cross_gram" else (1, 1)
        getattr(of_all, name)[entry] = value
    of_all = selection(0, **{**vars(of_all), "n": 3, "keep": 1, **changes})
    others = torch.tensor([0, 2])
    of_others = selection(
        0,
        n=2,
        keep=1,
        gram=of_all.gram[others][:, others],
        cross_gram=of_all.cross_gram[others],
        target_energy=of_all.target_energy,
    )
    one, other, untaught = LearnedProposal(dim=8), LearnedProposal(dim=8), LearnedProposal(dim=8)
    one.observe(records, of_all)
    other.observe([records[0], records[2]], of_others)
    assert packed(one.state_dict()) == packed(other.state_dict())
    assert packed(one.state_dict()) != packed(untaught.state_dict())


@pytest.mark.parametrize("energy", [0.0, float("nan"), float("inf"), -1.0])
def test_a_step_without_a_target_gradient_changes_nothing(energy: float) -> None:
    records = offered(torch.Generator().manual_seed(1))[:3]
    proposal = LearnedProposal(dim=8)
    proposal.observe(records, of_scores(torch.tensor([0.1, 0.2, 0.3])))
    before = packed(proposal.state_dict())
    proposal.observe(records, of_scores(torch.zeros(3), target_energy=energy))
    proposal.observe(records, Selection.nothing(torch.ones(3), torch.ones(3, dtype=torch.bool)))
    assert packed(proposal.state_dict()) == before


@pytest.mark.parametrize("guide", ["blind", "stale"])
def test_a_guide_that_is_blind_or_stale_teaches_nothing(guide: str) -> None:
    records = [{"input_ids": [i, i + 1, 7]} for i in range(4)]
    proposal = LearnedProposal(dim=8)
    proposal.observe(records, of_scores(torch.tensor([0.1, 0.5, -0.2, 0.3])))
    before = packed(proposal.state_dict())
    proposal.observe(records, of_scores(torch.tensor([0.4, -0.5, 0.2, 0.3]), **{guide: True}))
    assert packed(proposal.state_dict()) == before
    proposal.observe(records, of_scores(torch.tensor([0.4, -0.5, 0.2, 0.3])))
    assert packed(proposal.state_dict()) != before


def test_what_is_expected_is_the_same_at_every_call_and_what_is_drawn_is_not() -> None:
    records = offered(torch.Generator().manual_seed(1))
    found = {}
    for thompson in (0.0, 1.0):
        proposal = LearnedProposal(_TARGET, explore=0.0, thompson=thompson)
        proposal.observe(records[:4], of_scores(torch.tensor([0.1, 0.5, -0.2, 0.3])))
        found[thompson] = {tuple(sorted(proposal.propose(records, _CHOSEN).tolist())) for _ in range(6)}
    assert len(found[0.0]) == 1
    assert len(found[1.0]) > 1
    with pytest.raises(ValueError, match="thompson must be finite and not negative"):
        LearnedProposal(thompson=-1.0)


def test_scores_of_a_sketch_are_at_most_one() -> None:
    records = offered(torch.Generator().manual_seed(1))[:2]
    one, other = LearnedProposal(dim=8), LearnedProposal(dim=8)
    one.observe(records, of_scores(torch.tensor([1.7, -1.2])))
    other.observe(records, of_scores(torch.tensor([1.0, -1.0])))
    torch.testing.assert_close(one.state_dict()["learned"], other.state_dict()["learned"])


@settings(max_examples=40)
@given(
    batches=st.lists(st.integers(1, 5), max_size=4),
    forgetting=st.sampled_from([1.0, 0.9, 0.3]),
    responses=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_posterior_is_that_of_a_weighted_regression(
    batches: list[int], forgetting: float, responses: int, seed: int
) -> None:
    """Every observation is a row of one least-squares problem, and so is the prior, in the units it is given in."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = 4
    regression = Regression(width, forgetting=forgetting, responses=responses)
    rows, targets, weights = (torch.empty(0, *shape).double() for shape in ((width,), (responses,), ()))
    for n in batches:
        columns = torch.cat([torch.ones(n, 1), normal(n, width - 1)], dim=1)
        scores = normal(n, responses)
        regression.observe(columns, scores)
        rows, targets = torch.cat([rows, columns]), torch.cat([targets, scores])
        weights = torch.cat([weights * forgetting, torch.ones(n, dtype=torch.float64)])
    shift, scale = normal(width), normal(width).exp()
    shift[0], scale[0] = 0.0, 1.0
    prior, precision = normal(width, responses), normal(width).exp()
    mean = regression.draw(shift, scale, prior, precision, torch.zeros(width, responses, dtype=torch.float64))

    standard = (rows - shift) / scale
    system = torch.cat([weights.sqrt()[:, None] * standard, torch.diag(precision.sqrt())])
    sought = torch.cat([weights.sqrt()[:, None] * targets, precision.sqrt()[:, None] * prior])
    expected = torch.linalg.lstsq(system, sought).solution
    test = torch.cat([torch.ones(6, 1), normal(6, width - 1)], dim=1)
    torch.testing.assert_close(test @ mean, (test - shift) / scale @ expected, atol=1e-8, rtol=1e-8)

    left = weights @ (targets - standard @ expected).square() + precision @ (expected - prior).square()
    variance = (4.0 * 0.1**2 + left) / (4.0 + weights.sum())
    noise = normal(width, responses)
    drawn = regression.draw(shift, scale, prior, precision, noise) - mean
    units = torch.diag(1.0 / scale)
    units[0] -= shift / scale
    error = torch.linalg.solve(units, drawn)
    # In the metric of the posterior's precision a draw is as far from the mean as the noise is long.
    moved = (system @ error).square().sum(0)
    torch.testing.assert_close(moved, variance * noise.square().sum(0), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 900])
def test_many_records_have_the_moments_and_the_scores_that_all_at_once_have(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    regression = ScoreRegression(
        offered(generator)[:8], dim=8, embedding=None, use_source=True, ridge=4.0, forgetting=0.9, prior=0.1, seed=0
    )
    records = [record for _ in range(15) for record in offered(generator)][:n]
    features = regression.features(records)
    columns = regression.columns(features)
    scores = torch.randn(len(columns[:64]), 1, dtype=torch.float64, generator=generator)
    regression.learned.observe(columns[:64], scores)
    found = regression.coefficients(regression.parts(features))
    torch.testing.assert_close(found, regression.coefficients([columns]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(regression.expected(features, found), columns @ found, rtol=1e-12, atol=1e-12)
    variance, mean = torch.var_mean(columns, 0, correction=0)
    one, other = scoring._moments(regression.parts(features))
    torch.testing.assert_close(one, variance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other, mean, rtol=1e-12, atol=1e-12)


def test_draws_spread_until_scores_are_known() -> None:
    records = offered(torch.Generator().manual_seed(2))
    proposal = LearnedProposal(explore=0.0)

    def different() -> int:
        return len({tuple(sorted(proposal.propose(records, _CHOSEN).tolist())) for _ in range(10)})

    assert different() == 10
    useful = utilities(records, _HIDDEN)
    for _ in range(300):
        proposal.observe(records, of_scores(useful))
    assert different() < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"ridge": 0.0}, "ridge must be positive and finite, got 0.0"),
        ({"forgetting": 0.0}, r"forgetting must be in \(0, 1\], got 0.0"),
        ({"forgetting": 1.1}, "forgetting must be in"),
        ({"prior": -0.1}, "prior must be finite and not negative"),
        ({"explore": 2.0}, "explore must be in"),
        ({"target_samples": []}, "Expected target samples, got none"),
    ],
)
def test_settings_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedProposal(**arguments)


def test_observed_samples_are_the_candidates() -> None:
    proposal = LearnedProposal(dim=8)
    with pytest.raises(ValueError, match="Expected the 3 candidates of the selection"):
        proposal.observe([{"input_ids": [1]}], of_scores(torch.zeros(3)))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_records_that_are_all_alike_are_chosen_from(n: int) -> None:
    """Columns without variance have no unit; they are left as they are."""
    proposal = LearnedProposal(_TARGET, dim=8, use_source=True)
    records = [{"input_ids": [3, 4]}] * n
    for _ in range(3):
        chosen = proposal.propose(records, 4).tolist()
        assert len(set(chosen)) == min(n, 4)
        proposal.observe(records, of_scores(torch.full((n,), 0.1)))
