"""Rows that are grouped to candidates: every grouping, in all kinds of layers and models, against autograd."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import Factors, token_losses
from ftw_optim._factors.row_groups import RowGroups
from tests.support.capturing import check_common_graph
from tests.support.grids import slow
from tests.support.models import CASES, Gain, drawn, precision, seeded
from tests.support.oracles import gradients


@st.composite
def groupings(draw: st.DrawFn, rows: int | None = None) -> tuple[Tensor, int]:
    """The candidates of some rows, in any order and of any sizes, some rows of none; and how many candidates."""
    r = draw(st.integers(1, 7)) if rows is None else rows
    n = draw(st.integers(1, r))
    others = draw(st.lists(st.integers(-1, n - 1), min_size=r - n, max_size=r - n))
    return torch.tensor(draw(st.permutations([*range(n), *others]))), n


def grouped_losses(rows: Tensor, ids: Tensor, n: int) -> Tensor:
    """Losses in which the rows of a candidate are multiplied with each other."""
    return torch.stack([rows[ids == i].sum().square() / 2 for i in range(n)])


@settings(max_examples=30)
@given(
    groupings(),
    st.integers(1, 4),
    st.sampled_from(["outer", "sum", "indexed", "whole"]),
    st.integers(0, 99),
    st.booleans(),
)
def test_gradients_of_candidates_are_sums_over_their_rows(
    grouping: tuple[Tensor, int], t: int, kind: str, seed: int, small: bool
) -> None:
    ids, n = grouping
    r = len(ids)
    if kind == "indexed":
        index = torch.randint(3, (r, t), generator=torch.Generator().manual_seed(seed))
        factors = Factors(left=index, right=drawn(r, t, 2, seed=seed), rows=3)
    elif kind == "whole":
        factors = Factors.explicit(drawn(r, 3, 2, seed=seed), torch.empty(3, 2))
    else:
        right = drawn(r, t, 2, seed=seed + 1) if kind == "outer" else None
        factors = Factors(left=drawn(r, t, 3, seed=seed), right=right)
    groups = RowGroups(ids)
    groups.check(n)
    with patch("ftw_optim._factors.row_groups.certainly_small", lambda size: small):
        found, rows = gradients(groups.grouped(factors)), gradients(factors)
    expected = torch.zeros_like(found).index_add(0, ids[ids >= 0], rows[ids >= 0])
    torch.testing.assert_close(found, expected)


class AllKinds(nn.Module):
    """Tokens, positions looked up once for all, folded and plain layers, and a module that is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.norm, self.router, self.own = nn.LayerNorm(4), nn.Linear(4, 4), Gain(4)
        self.conv, self.head = nn.Conv1d(4, 4, 2, padding=1), nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        hidden = self.own(self.router(hidden.flatten(0, 1)).view_as(hidden))
        hidden = torch.tanh(self.conv(hidden.mT).mT)
        scores: Tensor = self.head(hidden)[..., 0].sum(1)
        return scores


@settings(max_examples=30)
@given(groupings(), st.integers(1, 5), st.integers(0, 99))
def test_every_candidate_has_the_gradient_of_its_own_loss(grouping: tuple[Tensor, int], t: int, seed: int) -> None:
    ids, n = grouping
    model = seeded(AllKinds).double()
    tokens = torch.randint(7, (len(ids), t), generator=torch.Generator().manual_seed(seed))
    check_common_graph(model, lambda: grouped_losses(model(tokens), ids, n), sample_ids=ids)


@pytest.mark.parametrize("name", [name if name in ("mlp", "small-gpt") else slow(name) for name in CASES])
@pytest.mark.parametrize("ids", [[0, 1, 2, 0, 1, 2], [1, 0, -1, 2, 0, 0], [0] * 6], ids=["pairs", "ragged", "one"])
def test_in_whole_models(name: str, ids: list[int]) -> None:
    with precision(torch.float64):
        case, groups = CASES[name](torch.float64, 6), torch.tensor(ids)
        check_common_graph(
            case.model, lambda: grouped_losses(case.losses(), groups, max(ids) + 1), rtol=1e-8, sample_ids=groups
        )


@pytest.mark.parametrize("name", ["llama", slow("gpt2-tied")])
def test_an_output_layer_that_runs_on_label_positions(name: str) -> None:
    """There the positions that the library has chosen itself are attributed by the rows that they are in."""
    with precision(torch.float64):
        case = CASES[name](torch.float64, 6)
        labels = case.candidates["labels"].clone()
        labels[torch.arange(6), torch.arange(6)] = -100
        batch, ids = {**case.candidates, "labels": labels}, torch.tensor([0, 1, 2, 0, 1, 2])

        def losses() -> Tensor:
            chosen, rejected = token_losses(case.model, batch, head="labels").chunk(2)
            return -functional.logsigmoid(rejected - chosen)

        check_common_graph(case.model, losses, rtol=1e-8, sample_ids=ids)
