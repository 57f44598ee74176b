"""Kernel herding: each record chosen brings the mean of all chosen nearest to that of the target rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ftw_optim.integrations.streaming._proposing import packed
from ftw_optim.proposals import Proposal, SimilarityProposal, VettedProposal
from ftw_optim.proposals.features import likeness_of
from ftw_optim.proposals.herding import Herding

ASPECTS = [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]]
"""Tokens of three kinds of target rows, of which the first is the most frequent."""
TARGET = [{"input_ids": ASPECTS[0]}] * 3 + [{"input_ids": ASPECTS[1]}] * 2 + [{"input_ids": ASPECTS[2]}]


def points(n: int, d: int, *, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_after_the_other(target: Tensor, columns: Tensor, before: Tensor, count: int) -> list[int]:
    """The records that leave the least squared distance of the means, each tried in its turn."""
    units, chosen, found = functional.normalize(columns, dim=1), before, []
    for _ in range(count):
        left = [at for at in range(len(units)) if at not in found]
        distances = [float((target - torch.cat([chosen, units[at : at + 1]]).mean(0)).square().sum()) for at in left]
        found.append(left[distances.index(min(distances))])
        chosen = torch.cat([chosen, units[found[-1] : found[-1] + 1]])
    return found


@settings(max_examples=60)
@given(
    n=st.integers(1, 40), d=st.integers(1, 6), before=st.integers(0, 10), count=st.integers(1, 6), seed=st.integers()
)
def test_each_choice_leaves_the_least_distance(n: int, d: int, before: int, count: int, seed: int) -> None:
    seed %= 2**31
    columns, earlier = points(n, d, seed=seed), points(before, d, seed=seed + 1)
    target = functional.normalize(points(5, d, seed=seed + 2), dim=1).mean(0)
    herding = Herding(target)
    herding.note(earlier)
    count = min(count, n)
    scores = herding.scores(columns, torch.arange(n), count, salt=seed)
    chosen = scores.argsort(descending=True)[:count].tolist()
    expected = one_after_the_other(target, columns, functional.normalize(earlier, dim=1), count)
    if d > 1:  # on a line all points of one side are equal
        assert chosen == expected
    assert sorted(scores.tolist(), reverse=True)[:count] == list(range(count, 0, -1))
    assert sum(score == -1.0 for score in scores.tolist()) == n - count


def test_equal_records_are_chosen_by_their_keys_alone() -> None:
    columns = points(1, 4, seed=0).expand(50, 4)
    keys = torch.arange(50)
    herding = Herding(columns[0])
    first = {int(herding.scores(columns, keys, 1, salt=salt).argmax()) for salt in range(60)}
    assert len(first) > 20
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    for salt in range(5):
        one, other = herding.scores(columns, keys, 3, salt), herding.scores(columns[order], keys[order], 3, salt)
        assert torch.equal(one[order], other)


def offered(generator: torch.Generator, counts: Sequence[int]) -> list[dict[str, Any]]:
    """As many records of each kind of target row, with three of its four tokens, and twice as many of none."""
    records = []
    for aspect, count in zip([*ASPECTS, range(40, 80)], [*counts, 2 * sum(counts)], strict=True):
        for _ in range(count):
            some = torch.randperm(len(aspect), generator=generator)[:3].tolist()
            records.append({"input_ids": [*(aspect[place] for place in some), 90 + len(records)]})
    return records


def kinds_of(chosen: Sequence[dict[str, Any]]) -> list[float]:
    """The share of each kind of target row."""
    kinds = [next((k for k, aspect in enumerate(ASPECTS) if one["input_ids"][0] in aspect), 3) for one in chosen]
    return [kinds.count(kind) / len(kinds) for kind in range(4)]


@pytest.mark.parametrize(
    "make",
    [SimilarityProposal, lambda *a, **k: VettedProposal(*a, **k), lambda *a, **k: VettedProposal(*a, explore=0.0, **k)],
    ids=["similar", "vetted", "vetted, unexplored"],
)
def test_what_is_chosen_comes_in_the_shares_of_the_target(make: Callable[..., Proposal]) -> None:
    def shares(*, herding: bool) -> list[float]:
        proposal, generator, chosen = make(TARGET, herding=herding), torch.Generator().manual_seed(0), []
        for _ in range(20):
            records = offered(generator, (8, 8, 8))
            chosen += [records[place] for place in proposal.propose(records, 6).tolist()]
        return kinds_of(chosen)

    assert shares(herding=True) == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0.0], abs=0.08)
    assert shares(herding=False) == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=0.01)


def test_copies_of_one_record_do_not_crowd_out_the_others() -> None:
    copies = [{"input_ids": [1, 2, 3, 4]}] * 20
    others = [{"input_ids": [*aspect[:2], 50 + i]} for i in range(4) for aspect in ASPECTS]
    records = copies + others
    alone = SimilarityProposal(TARGET, herding=False).propose(records, 8)
    assert bool((alone < 20).all())
    assert int((SimilarityProposal(TARGET).propose(records, 8) < 20).sum()) <= 4


def test_the_first_choice_is_the_most_alike() -> None:
    records = [{"input_ids": ids} for ids in ([50, 51], [1, 50], [1, 2, 3, 11], [21, 51])]
    proposal = SimilarityProposal(TARGET, dim=4096)
    assert int(proposal.propose(records, 1)) == int(likeness_of(proposal.features(records)).argmax()) == 2


def test_where_nothing_is_like_the_target_all_come() -> None:
    proposal, generator = SimilarityProposal(TARGET), torch.Generator().manual_seed(0)
    found = set()
    for _ in range(40):
        found |= set(proposal.propose(offered(generator, (0, 0, 1)), 2).tolist())
    assert len(found) == 3


def test_records_drawn_at_random_count_as_chosen_too() -> None:
    """They are trained on as the others."""
    records = offered(torch.Generator().manual_seed(0), (4, 4, 4))
    proposal = SimilarityProposal(TARGET, explore=0.5)
    tested = VettedProposal(TARGET, order="tested", floor=0.5)
    for made in (proposal, tested):
        for _ in range(3):
            made.propose(records, 4)
        assert made.state_dict()["chosen"]["count"] == 12


@pytest.mark.parametrize("make", [SimilarityProposal, VettedProposal], ids=["similar", "vetted"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(make: Callable[..., Proposal]) -> None:
    proposal = make(TARGET, dim=8)
    proposal.propose(offered(torch.Generator().manual_seed(0), (2, 2, 2)), 3)
    state = proposal.state_dict()
    before = packed(state)
    for broken in (torch.zeros(7), torch.full((8,), torch.nan)):
        with pytest.raises(ValueError, match="Expected the sum of the records chosen so far as 8 finite numbers"):
            proposal.load_state_dict({**state, "chosen": {"sum": broken, "count": 3}})
    with pytest.raises(ValueError, match="settings"):
        proposal.load_state_dict(make(TARGET, dim=8, herding=False).state_dict())
    assert packed(proposal.state_dict()) == before
