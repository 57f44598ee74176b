"""Rows that a model chooses inside: each is its own candidate's, or the step is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import KeepAll, NonNegativeLeastSquares, SelectiveOptimizer
from tests.support.models import seeded

VOCABULARY, WIDTH = 20, 6


class Unpadded(nn.Module):
    """Drops padding before some of its layers, and puts it back before the losses."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.embed, self.up, self.down = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, there: Tensor) -> Tensor:
        if self.where == "before the embedding":
            tokens = self.down(self.up(self.embed(input_ids[there])).tanh())
        elif self.where == "in one row":
            tokens = self.down(self.up(self.embed(input_ids)[there][None]).tanh())[0]
        elif self.where == "before the last layer":
            tokens = self.down(self.up(self.embed(input_ids)).tanh()[there])
        elif self.where == "by their numbers":
            numbers = there.flatten().nonzero().flatten()
            tokens = self.down(self.up(self.embed(input_ids).flatten(0, 1).index_select(0, numbers)).tanh())
        else:  # after the embedding
            tokens = self.down(self.up(self.embed(input_ids)[there]).tanh())
        scores: Tensor = tokens.new_zeros(*input_ids.shape, VOCABULARY).index_put((there,), tokens)
        return scores


WHERE = ["before the embedding", "before the last layer", "by their numbers", "after the embedding"]


@dataclass
class Problem:
    model: nn.Module
    ids: Tensor
    labels: Tensor

    def losses(self, there: Tensor) -> Tensor:
        logits = self.model(self.ids, there)
        each = functional.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), reduction="none")
        each = each.view(there.shape)
        return (each * there).sum(1) / there.sum(1).clamp(min=1)

    def gram(self, there: Tensor) -> Tensor:
        parameters = list(self.model.parameters())
        rows = [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in self.losses(there)
        ]
        flat = [
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(parameters, row, strict=True)
                ]
            )
            for row in rows
        ]
        return torch.stack(flat) @ torch.stack(flat).T


def problem(where: str, n: int, t: int, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(VOCABULARY, (n, t), generator=generator) for _ in range(2))
    return Problem(seeded(lambda: Unpadded(where)).double(), ids, labels)


def optimizer_of(one: Problem, there: Tensor, **options: Any) -> SelectiveOptimizer:
    return SelectiveOptimizer(
        torch.optim.SGD(one.model.parameters(), lr=0.1),
        one.model,
        lambda: one.losses(there)[:2],
        metric="euclidean",
        filter=KeepAll(),
        weight=NonNegativeLeastSquares(),
        **options,
    )


def mask_of(lengths: list[int], t: int) -> Tensor:
    return torch.arange(t) < torch.tensor(lengths)[:, None]


@settings(max_examples=12, deadline=None)
@given(
    where=st.sampled_from(WHERE),
    lengths=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    first=st.sampled_from(["full", "equal"]),
    combine=st.sampled_from(["factors", "graph"]),
    seed=st.integers(0, 100),
)
def test_dropped_padding_is_refused_or_right(
    where: str, lengths: list[int], first: str, combine: str, seed: int
) -> None:
    """After a batch whose rows do divide equally; also where the same number of rows divides otherwise."""
    n, t = len(lengths), 7
    one = problem(where, n, t, seed)
    equal = mask_of([t if first == "full" else max(1, sum(lengths) // n)] * n, t)
    optimizer = optimizer_of(one, equal, combine=combine)
    for there in (equal, mask_of(lengths, t)):
        expected = one.gram(there)
        try:
            optimizer.backward(lambda there=there: one.losses(there))
        except RuntimeError:  # a row of tokens as long as one row is taken for one for all
            assert len(set(there.sum(1).tolist())) > 1, "rows that divide equally are known"
            continue
        assert optimizer.selection is not None
        torch.testing.assert_close(optimizer.selection.gram.double(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("where", [*WHERE, "in one row"])
def test_with_sample_ids_every_length_is_right(where: str, combine: str) -> None:
    for seed, lengths in enumerate(([7, 7, 7, 7], [7, 4, 2, 6], [1, 1, 7, 3], [5, 5, 5, 5])):
        there = mask_of(lengths, 7)
        one = problem(where, 4, 7, seed)
        optimizer = optimizer_of(one, there, combine=combine)
        ids = torch.arange(4)[:, None].expand(4, 7).masked_fill(~there, -1).contiguous()
        optimizer.backward(lambda there=there, one=one: one.losses(there), sample_ids=ids)
        assert optimizer.selection is not None
        torch.testing.assert_close(optimizer.selection.gram.double(), one.gram(there), rtol=1e-9, atol=1e-12)


class Answering(nn.Module):
    """A head that runs on some positions only, which the model chooses by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.rows = torch.zeros(0, dtype=torch.int64)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.body(self.embed(input_ids)).tanh()
        chosen = input_ids > VOCABULARY // 2
        self.rows = chosen.nonzero()[:, 0]
        each = self.head(hidden[chosen]).square().sum(1)
        return each.new_zeros(len(input_ids)).index_add(0, self.rows, each)


def counts_of(counts: list[int], t: int = 4) -> Tensor:
    """Token ids of which so many in each row are chosen."""
    large = torch.arange(t) < torch.tensor(counts)[:, None]
    return torch.where(large, VOCABULARY - 1 - torch.arange(t), torch.arange(t))


@pytest.mark.parametrize("counts", [[2, 0, 1], [0, 0, 3], [3, 3, 0], [1, 2, 3], [4, 1, 1], [0, 2, 1]])
@pytest.mark.parametrize("first", [[1, 1, 1], [2, 2, 2]])
def test_a_head_on_some_positions_is_refused_or_given_its_rows(first: list[int], counts: list[int]) -> None:
    model = seeded(Answering).double()
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(counts_of([1, 1])),
        metric="euclidean",
        filter=KeepAll(),
    )
    optimizer.backward(lambda: model(counts_of(first)))
    with pytest.raises(NotImplementedError, match=r"layer 'head'.*(sample_ids|candidates)"):
        optimizer.backward(lambda: model(counts_of(counts)))
    rows = torch.arange(3).repeat_interleave(torch.tensor(counts))
    parameters = list(model.parameters())
    losses = model(counts_of(counts))
    alone = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in alone])
    for ids in ({"head": rows}, {"head": lambda: model.rows}):
        optimizer.backward(lambda: model(counts_of(counts)), sample_ids=ids)
        assert optimizer.selection is not None
        torch.testing.assert_close(optimizer.selection.gram.double(), flat @ flat.T, rtol=1e-9, atol=1e-12)


def test_ids_of_a_layer_that_is_not_there() -> None:
    model = seeded(Answering).double()
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: model(counts_of([1, 1])), metric="euclidean"
    )
    with pytest.raises(ValueError, match=r"names of the model's modules, as in model\.named_modules\(\), got 'heads'"):
        optimizer.backward(lambda: model(counts_of([1, 1])), sample_ids={"heads": torch.arange(2)})


def test_pooled_rows_need_no_proof() -> None:
    """The first position of every row, as classifiers take it, and the mean over positions."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.pool, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, input_ids: Tensor, *, first: bool) -> Tensor:
            hidden = self.embed(input_ids)
            scores: Tensor = self.head(self.pool(hidden[:, 0] if first else hidden.mean(1)).tanh())
            return scores

    model, ids = seeded(Pooled).double(), counts_of([1, 2, 3])
    passes: list[int] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: passes.append(1))

    model.embed.register_forward_hook(count)
    for first in (True, False):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: model(ids[:1], first=True).square().sum(1)
        )

        def losses(first: bool = first) -> Tensor:
            return model(ids, first=first).square().sum(1)

        optimizer.backward(losses)
        passes.clear()
        optimizer.backward(losses)
        assert len(passes) == 2, "the target's, and the candidates'"


# ---------------------------------------------------------------------- what changes in mid-run

Losses = Callable[[nn.Module, Tensor], Tensor]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


MIXING: dict[str, Losses] = {
    "in-batch negatives": lambda model, x: functional.cross_entropy(
        model(x) @ model(x).T, torch.arange(len(x)), reduction="none"
    ),
    "centred by the batch": lambda model, x: (model(x) - model(x).mean(0)).square().sum(1),
    "scaled by the largest": lambda model, x: (model(x) / model(x).abs().max()).sum(1),
    "neighbours": lambda model, x: (model(x) * model(x).roll(1, 0)).sum(1),
    "a softmax over rows": lambda model, x: model(x).softmax(0).sum(1).exp() * model(x).sum(1),
    "ranked": lambda model, x: model(x).sort(0).values.square().sum(1) + model(x).cumsum(0).sum(1),
}


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("kind", MIXING)
def test_losses_that_begin_to_mix_rows_are_found_out_when_they_begin(kind: str, combine: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))).double()
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, lambda: alone(model, X[:2]), combine=combine
    )
    for _ in range(3):
        optimizer.step(lambda: alone(model, X))
    with pytest.raises(RuntimeError, match="Self-check"):
        optimizer.step(lambda: MIXING[kind](model, X))


@pytest.mark.parametrize(
    ("self_check", "found"), [(3, 6), (1, 4), (True, 4), ("first", None), (False, None), (100, None)]
)
def test_the_check_is_repeated_as_often_as_was_asked(self_check: Any, found: int | None) -> None:
    """Of a share of other rows that grows from nothing at the fourth step, in the same operations."""
    model = seeded(lambda: nn.Linear(4, 3)).double()
    share = torch.zeros((), dtype=torch.float64)

    def losses(x: Tensor = X) -> Tensor:
        scores = model(x)
        values: Tensor = (scores - share * scores.mean(0)).square().sum(1)
        return values

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, lambda: losses(X[:2]), self_check=self_check
    )
    seen = None
    for step in range(9):
        if step == 4:
            share.fill_(0.5)
        try:
            optimizer.step(losses)
        except RuntimeError:
            seen = step
            break
    assert seen == found


@pytest.mark.parametrize("value", ["often", -1, 2.5, None])
def test_an_unknown_self_check_is_refused(value: Any) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match='self_check must be "first"'):
        SelectiveOptimizer(torch.optim.SGD(model.parameters()), model, lambda: alone(model, X), self_check=value)


# ---------------------------------------------------------------------- batch objects, patches, inputs in another order


@pytest.mark.parametrize("counts", [(1, 5), (1, 2), (3, 5), (5, 3), (1, 4)])
@pytest.mark.parametrize("kind", ["object", "method"])
def test_a_check_of_some_losses_vouches_for_no_other_number(kind: str, counts: tuple[int, int]) -> None:
    @dataclass
    class Batch:
        x: Tensor

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, batch: Batch) -> Tensor:
            return self.score(batch.x)

        def score(self, x: Tensor) -> Tensor:
            hidden = self.one(x)
            mixed = hidden - hidden.mean(0) / 2 if len(x) == counts[1] else hidden - hidden.mean().detach() * 0
            scores: Tensor = self.two(mixed.tanh())
            return scores.square().sum(1)

    model = seeded(Mixing).double()

    def losses(count: int) -> Tensor:
        found: Tensor = model(Batch(X[:count])) if kind == "object" else model.score(X[:count])
        return found

    optimizer = SelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: losses(counts[0]))
    optimizer.backward(lambda: losses(counts[0]))
    with pytest.raises(RuntimeError, match=r"Self-check|in order and in equal parts"):
        optimizer.backward(lambda: losses(counts[1]))


PATCHES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Callable[[Tensor], Tensor]]]] = {
    "doubled input": (lambda: nn.Linear(4, 4), lambda m: lambda x: functional.linear(2 * x, m.weight, m.bias)),
    "squared weight": (lambda: nn.Linear(4, 4), lambda m: lambda x: functional.linear(x, m.weight**2, m.bias)),
    "scaled bias": (lambda: nn.Linear(4, 4), lambda m: lambda x: functional.linear(x, m.weight, 3 * m.bias)),
    "norm without a mean": (lambda: nn.LayerNorm(4), lambda m: lambda x: x * m.weight + m.bias),
    "a frozen half": (
        lambda: nn.Linear(4, 4),
        lambda m: lambda x: functional.linear(x, m.weight) + functional.linear(x, m.weight.detach(), m.bias),
    ),
    "an original that is kept": (lambda: nn.Linear(4, 4), lambda m: lambda x, own=m.forward: own(x).sin() * 2),
}


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("kind", PATCHES)
def test_a_forward_that_is_replaced_on_the_instance_is_run_again(kind: str, when: int) -> None:
    build, patch = PATCHES[kind]
    model = seeded(lambda: nn.Sequential(build(), nn.Tanh(), nn.Linear(4, 3))).double()
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: alone(model, X[:2]),
        metric="euclidean",
        filter=KeepAll(),
    )
    for step in range(2):
        if step == when:
            model[0].forward = patch(model[0])
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in alone(model, X)]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        optimizer.backward(lambda: alone(model, X))
        assert optimizer.selection is not None
        torch.testing.assert_close(optimizer.selection.gram.double(), flat @ flat.T, rtol=1e-9, atol=1e-12)


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((4, 6), (3, 4, 5)),
    ((2, 4, 6), (5, 2, 4, 5)),
    ((1, 6), (3, 4, 5)),
    ((6,), (2, 3, 5)),
    ((7, 1, 6), (2, 7, 3, 5)),
    ((3, 6), (1, 3, 5)),
]


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize(("shared", "own"), SHAPES)
def test_the_candidates_need_not_come_first(shared: tuple[int, ...], own: tuple[int, ...], keyword: bool) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, scales: Tensor, x: Tensor) -> Tensor:
            scores: Tensor = self.two((self.one(x) * scales).tanh())
            return scores.square().flatten(1).sum(1)

    generator = torch.Generator().manual_seed(1)
    scales, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in (shared, own))
    model = seeded(Shared).double()

    def losses() -> Tensor:
        found: Tensor = model(scales=scales, x=x) if keyword else model(scales, x)
        return found

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, losses, metric="euclidean", filter=KeepAll()
    )
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses()]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    optimizer.backward(losses)
    assert optimizer.selection is not None
    torch.testing.assert_close(optimizer.selection.gram.double(), flat @ flat.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("later", [[[0, 0, 1, 1]], [[0, 1, 2, 2]], [[0, 1, 0, 1]], [[-1, 0, 1, 1]], [[0, 0, 0, 1]]])
@pytest.mark.parametrize("first", [[[0, 0, 0, 0]], [[0, 0, 0, -1]], [[0, 0, -1, -1]]])
def test_rows_of_one_document_vouch_for_no_rows_of_several(first: list[list[int]], later: list[list[int]]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            scores: Tensor = self.down(self.up(self.embed(ids)).cumsum(1).tanh())
            return scores

    model, ids = seeded(Recurrent).double(), torch.tensor([[3, 7, 1, 12]])

    def losses(documents: Tensor) -> Tensor:
        each = model(ids).square().sum(2).flatten()
        owners = documents.where(documents >= 0, 9).flatten()
        return each.new_zeros(10).index_add(0, owners, each)[: int(documents.max()) + 1]

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: losses(torch.tensor(first))
    )
    optimizer.backward(lambda: losses(torch.tensor(first)), sample_ids=torch.tensor(first))
    with pytest.raises(RuntimeError, match="Self-check"):
        optimizer.backward(lambda: losses(torch.tensor(later)), sample_ids=torch.tensor(later))
