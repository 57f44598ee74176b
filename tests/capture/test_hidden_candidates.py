"""Candidates that are hard to see in a layer's inputs: found all the same, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftw_optim import SelectiveOptimizer, coverage
from ftw_optim._factors.factors import weighted_sum
from tests.support.capturing import captured, check_common_graph, check_every_candidate, rows_of, squares
from tests.support.layers import Scale
from tests.support.models import drawn, seeded


def test_prompts_expanded_by_the_model_itself() -> None:
    class Prompts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))

        def forward(self, rows: int) -> Tensor:
            return torch.tanh(self.table.expand(rows, -1, -1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.prompts, self.last = nn.Linear(3, 3), Prompts(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.last(torch.tanh(self.first(torch.cat([self.prompts(len(x)), x], dim=1))))
            return scores

    for frozen in (False, True):
        model = seeded(Model).double()
        model.first.requires_grad_(not frozen)  # type: ignore[operator,union-attr]
        model.last.requires_grad_(not frozen)  # type: ignore[operator,union-attr]
        x = drawn(3, 5, 3)
        check_every_candidate(model, lambda rows: squares(model, rows_of(x, rows)), 3)  # noqa: B023


@pytest.mark.parametrize("t", [3, 4, 5])
def test_labels_and_contexts_where_there_are_as_many_positions_as_candidates(t: int) -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.labels, self.first, self.last = nn.Embedding(7, 4), nn.Linear(3, 4), nn.Linear(4, 2)
            self.middle = Scale(function=lambda x: torch.tanh(x) * self.context)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            self.context = x[..., :1]
            scores: Tensor = self.last(self.middle(self.first(x) + self.labels(labels)[:, None]))
            return scores

    model = seeded(Conditioned).double()
    x, labels = drawn(4, t, 3), torch.tensor([1, 1, 3, 0])
    check_common_graph(model, lambda: model(x, labels).square().sum((1, 2)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_positions_looked_up_inside_of_a_checkpoint(reentrant: bool) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.first, self.last = nn.Embedding(9, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, *, plain: bool = False) -> Tensor:
            def block(hidden: Tensor) -> Tensor:
                return torch.tanh(self.first(hidden + self.positions(torch.arange(hidden.shape[1]))))

            hidden = block(x) if plain else checkpoint(block, x, use_reentrant=reentrant)
            scores: Tensor = self.last(hidden)
            return scores

    model = seeded(Inside).double()
    x = drawn(3, 5, 3).requires_grad_()
    found = captured(model, lambda: model(x).square().sum((1, 2)))
    expected = captured(model, lambda: model(x, plain=True).square().sum((1, 2)))
    for name, parameter in model.named_parameters():
        for row in torch.eye(3, dtype=torch.float64):
            torch.testing.assert_close(
                weighted_sum(found[name], row, parameter.shape), weighted_sum(expected[name], row, parameter.shape)
            )
    for combine in ("factors", "graph"):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: squares(model, x[:2]), combine=combine
        )
        optimizer.step(lambda: squares(model, x))


def test_a_parameter_shared_by_a_linear_layer_and_a_module_run_again() -> None:
    class Reads(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x @ self.weight)

    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(linear, nn.Tanh(), Reads(linear.weight)).double()
    x = drawn(3, 5, 4)
    check_every_candidate(model, lambda rows: squares(model, rows_of(x, rows)), 3)
    assert coverage(model)["0.weight"].rule == "Linear + fallback"


def test_attention_over_queries_that_all_candidates_share() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 2, 4))
            self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            pooled, _ = self.attention(self.queries, self.queries, self.queries)
            scores: Tensor = self.last(x) + pooled.sum(1, keepdim=True)
            return scores

    model = seeded(Pooled).double()
    x = drawn(3, 5, 3)
    check_every_candidate(model, lambda rows: squares(model, rows_of(x, rows)), 3)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], str]] = {
    "pruned": (
        lambda: nn.utils.prune.random_unstructured(nn.Linear(3, 2), "weight", 0.3),  # type: ignore[no-untyped-call]
        lambda layer, x: layer(x),
        "a hook before the call prunes its weight",
    ),
    "traced": (
        lambda: torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)),  # type: ignore[no-untyped-call]
        lambda layer, x: layer(x.float()).double(),
        "torch.jit compiled it",
    ),
    "unbatched": (
        lambda: nn.Conv1d(5, 4, 2).double(),
        lambda layer, x: torch.stack([layer(row) for row in x]),
        r"Expected layer 'layer' to take inputs with the 3 candidates",
    ),
    "packed sequence": (
        lambda: nn.LSTM(3, 4, batch_first=True).double(),
        lambda layer, x: layer(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True))[1][0][
            0
        ],
        "not a PackedSequence",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore:.*torch.jit")
@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_name_the_reason(kind: str) -> None:
    build, call, message = REFUSALS[kind]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build()

        def forward(self, x: Tensor) -> Tensor:
            return call(self.layer, x)

    model = Model()
    if kind == "pruned":
        model.double()
    with pytest.raises(NotImplementedError, match=message):
        captured(model, lambda: squares(model, drawn(3, 5, 3)))


def test_the_positions_behind_the_last_bag_belong_to_nobody() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(7, 3, mode="mean", include_last_offset=True)

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            scores: Tensor = self.bag(ids, offsets)
            return scores

    model = seeded(Bags).double()
    ids, offsets = torch.tensor([1, 2, 3, 3, 0, 6, 5]), torch.tensor([0, 2, 2, 5])
    # Autograd's own gradient of the rows behind the last offset is whatever lies in memory: no oracle.
    found = captured(model, lambda: model(ids, offsets).sum(1), self_check=False)
    given = torch.stack([weighted_sum(found["bag.weight"], row, torch.Size((7, 3))) for row in torch.eye(3)])[
        ..., 0
    ].double()
    expected = torch.zeros(3, 7, dtype=torch.float64)
    expected[0, 1] = expected[0, 2] = 1 / 2
    expected[2, 3], expected[2, 0] = 2 / 3, 1 / 3
    torch.testing.assert_close(given, expected)


def test_leaves_outside_of_the_model_get_one_gradient_from_a_reentrant_pass() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = checkpoint(lambda h: torch.tanh(self.middle(h)), self.first(x), use_reentrant=True)
            return hidden

    model, outside = seeded(Checkpointed).double(), seeded(lambda: nn.Linear(4, 2)).double()
    x = drawn(3, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: squares(nn.Sequential(model, outside), x[:2])
    )
    optimizer.step(lambda: squares(nn.Sequential(model, outside), x))
    assert outside.weight.grad is None
