"""Which axis is the candidate's: rows, shared rows, folded rows, packed rows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, register_layer
from ftw_optim._capture.layouts import Grid
from ftw_optim._factors.factors import weighted_sum
from tests.support.capturing import captured, check_every_candidate, rows_of
from tests.support.models import drawn, seeded


class Folding(nn.Module):
    """Runs a layer on all positions of all rows at once, as routers and flattened projections do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(3, 4), layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        folded: Tensor = self.layer(hidden.flatten(0, 1))
        scores: Tensor = self.last(folded.view_as(hidden))
        return scores


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) + self.shift


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(4, 4),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "Conv1d": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten()),
    "Conv1d, many channels": lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), nn.Flatten()),
    "fallback": Own,
}


@pytest.mark.parametrize("name", LAYERS)
@given(st.integers(1, 5), st.integers(0, 4))
def test_folded_rows(name: str, n: int, t: int) -> None:
    model = seeded(lambda: Folding(LAYERS[name]())).double()
    x = drawn(n, t, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), n)


@given(st.integers(1, 5), st.integers(0, 4))
def test_folded_indices(n: int, t: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

        def forward(self, ids: Tensor) -> Tensor:
            scores: Tensor = self.head(torch.tanh(self.tokens(ids.flatten())).view(*ids.shape, 3))
            return scores

    if n == 1 and t:
        t += 1  # of one row, a flat index of t is read as positions, which comes to the same
    model = seeded(Tokens).double()
    ids = torch.randint(7, (n, t), generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(ids, rows)).square().sum((1, 2)), n)


def test_windows_of_a_row_are_folded_in_front() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.own, self.last = nn.Linear(3, 4), Own(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            windows = x.unflatten(1, (2, -1)).flatten(0, 1)  # (2 n, t / 2, d)
            hidden = self.own(self.inner(windows))
            scores: Tensor = self.last(hidden.unflatten(0, (-1, 2)).flatten(1, 2))
            return scores

    model = seeded(Windows).double()
    for n, t in ((3, 4), (4, 4), (2, 8)):
        x = drawn(n, t, 3)
        check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), n)  # noqa: B023


class TimeMajor(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.layer(x.transpose(0, 1)).transpose(0, 1))
        return scores


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), Own], ids=["Linear", "fallback"])
@pytest.mark.parametrize("t", [4, 6, 7])
def test_time_first_is_refused_also_where_it_divides(build: Callable[[], nn.Module], t: int) -> None:
    model = seeded(lambda: TimeMajor(build())).double()
    message = r"Expected layer 'layer' to take inputs with the 3 candidates first, not the time \(batch_first=True\)"
    with pytest.raises(NotImplementedError, match=message):
        captured(model, lambda: model(drawn(3, t, 4)).square().sum((1, 2)))


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), Own], ids=["Linear", "fallback"])
def test_time_first_is_found_out_where_there_are_as_many_positions_as_candidates(
    build: Callable[[], nn.Module],
) -> None:
    model = seeded(lambda: TimeMajor(build())).double()
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Self-check: the captured.*layer\.weight"):
        captured(model, lambda: (model(drawn(4, 4, 4)).square().sum((1, 2)) + 1.0).log() * scale)


def test_a_layer_on_another_number_of_rows_is_refused_by_name() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            chosen = x.flatten(0, 1)[:7]
            hidden = x.flatten(0, 1).index_copy(0, torch.arange(7), self.expert(chosen)).view_as(x)
            scores: Tensor = self.last(hidden)
            return scores

    model = seeded(Routed).double()
    with pytest.raises(NotImplementedError, match=r"Expected layer 'expert'.*got shape \(7, 3\).*scored="):
        captured(model, lambda: model(drawn(3, 4, 3)).square().sum((1, 2)))
    # By the common graph it is updated all the same.
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(drawn(2, 4, 3)).square().sum((1, 2)),
        scored=lambda name, parameter: "last" in name,
        combine="graph",
        filter=KeepAll(),
    )
    optimizer.backward(lambda: model(drawn(3, 4, 3)).square().sum((1, 2)))
    assert model.expert.weight.grad is not None  # type: ignore[union-attr]

    class Prompted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = x + self[0](torch.ones(3))
            return scores

    prompted = Prompted(nn.Linear(3, 3))
    with pytest.raises(NotImplementedError, match=r"Expected layer '0'.*got shape \(3,\)"):
        captured(prompted, lambda: prompted(torch.ones(2, 3)).sum(1))


def test_a_call_that_no_gradient_comes_back_to_may_have_any_layout() -> None:
    """As DoRA's: the layer also runs on the identity, for a norm that is detached."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.layer(torch.eye(3, dtype=x.dtype)).norm().detach()
            for shape in ((), (0,), (7, 5, 1)):
                self.layer(torch.ones(*shape, 3, dtype=x.dtype))
            scores: Tensor = self.layer(x) / norm
            return scores

    model = seeded(Model).double()
    for n in (1, 2, 3):
        x = drawn(n, 5, 3)
        check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), n)  # noqa: B023


def test_bags_of_any_length_have_their_candidates_in_the_offsets() -> None:
    class Bags(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(7, 3, **options), nn.Linear(3, 2)

        def forward(self, offsets: Tensor, ids: Tensor) -> Tensor:
            scores: Tensor = self.head(torch.tanh(self.bag(ids, offsets)))
            return scores

    ids = torch.tensor([1, 1, 2, 6, 3, 0, 5])
    for mode in ("sum", "mean"):
        model = seeded(lambda: Bags(mode=mode, padding_idx=1)).double()  # noqa: B023
        whole = torch.tensor([0, 3, 3, 5])
        found = captured(model, lambda: model(whole, ids).square().sum(1))  # noqa: B023
        rows = model(whole, ids).square().sum(1)
        for row in range(4):
            expected = torch.autograd.grad(rows[row], list(model.parameters()), retain_graph=True)
            weights = torch.eye(4, dtype=torch.float64)[row]
            for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
                torch.testing.assert_close(weighted_sum(found[name], weights, parameter.shape), gradient)


class Packed(nn.Module):
    """Two documents or more in a row, through folded and plain layers of all kinds that know no neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.router = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.own, self.folded, self.head = Own(), Own(), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.tokens(ids))
        hidden = self.router(hidden.flatten(0, 1)).view_as(hidden)
        hidden = self.folded(self.own(hidden).flatten(0, 1)).view_as(hidden)
        scores: Tensor = self.head(torch.tanh(hidden))
        return scores


def test_packed_rows_have_one_gram_row_for_each_document() -> None:
    model = seeded(Packed).double()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    documents = torch.tensor([[0, 0, 0, 2, 2, -1], [1, 3, 1, 1, -1, -1]])

    def losses(rows: Tensor | None = None) -> Tensor:
        values = model(ids).square().sum(-1)
        every = torch.stack([(values * (documents == document)).sum() for document in range(4)])
        return rows_of(every, rows)

    check_every_candidate(model, losses, 4, sample_ids=documents)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: losses()[:2], metric="euclidean"
    )
    optimizer.backward(losses, sample_ids=documents)
    gradients = []
    for row in range(4):
        found = torch.autograd.grad(losses()[row], list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    assert optimizer.selection is not None
    torch.testing.assert_close(optimizer.selection.gram, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_packed_rows_of_several_micro_batches_make_one_selection(combine: str) -> None:
    """Gram matrix and gradient of documents that lie in rows of different lengths."""
    model = seeded(Packed).double()
    batches = [torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[6, 5, 4, 3], [1, 1, 2, 6]])]
    documents = [torch.tensor([[0, 0, 0, 2, 1, -1]]), torch.tensor([[1, 0, 1, 1], [-1, 2, 2, 2]])]

    def losses() -> Iterator[Tensor]:
        for ids, owners in zip(batches, documents, strict=True):
            values = model(ids).square().sum(-1)
            yield torch.stack([(values * (owners == document)).sum() for document in range(3)])

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: next(losses())[:2],
        metric="euclidean",
        combine=combine,
        filter=GreedyFilter(keep=3),
    )
    optimizer.backward(losses, sample_ids=documents)
    gradients = []
    for loss in torch.cat(list(losses())):
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    every = torch.stack(gradients)
    selection = optimizer.selection
    assert selection is not None
    torch.testing.assert_close(selection.gram, every @ every.T, rtol=1e-10, atol=1e-10)
    combined = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(combined, selection.weights @ every[selection.kept], rtol=1e-10, atol=1e-10)

    with pytest.raises(ValueError, match="one for each micro-batch, got 1 for at least 2"):
        optimizer.backward(losses, sample_ids=documents[:1])
    with pytest.raises(ValueError, match="one for each micro-batch, got 3 for 2"):
        optimizer.backward(losses, sample_ids=[*documents, documents[0]])
    with pytest.raises(ValueError, match="one tensor of sample_ids for one batch"):
        optimizer.backward(lambda: next(losses()), sample_ids=documents)


def test_packed_rows_through_a_layer_whose_positions_are_others_are_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Conv1d(6, 6, 2), nn.Linear(3, 2))).double()
    documents = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"Expected layer '1'.*sample_ids"):
        captured(model, lambda: model(drawn(2, 6, 3)).square().sum()[None], sample_ids=documents)


@pytest.mark.parametrize(
    ("shape", "index", "reading"),
    [
        ((3, 5, 2), False, "rows"),
        ((1, 5, 2), False, "one row for all"),
        ((15, 2), False, "folded"),
        ((6, 4, 2), False, "folded"),
        ((5, 3, 2), False, "time first"),
        ((7, 3, 2), False, "time first"),
        ((1, 3, 2), False, "time first"),
        ((6, 3, 2), False, "folded"),
        ((4, 2), False, "unknown"),
        ((2,), False, "unknown"),
        ((5,), True, "positions"),
        ((15,), True, "folded"),
        ((3,), True, "rows"),
        ((7, 7), True, "unknown"),
    ],
)
def test_readings(shape: tuple[int, ...], index: bool, reading: str) -> None:
    x = torch.zeros(shape, dtype=torch.int64 if index else torch.float32)
    layout = Grid(n=3, positions=5).layout(x, None)
    assert layout.reading == reading
    assert (layout.trouble is not None) == (reading in ("unknown", "time first"))


@pytest.mark.usefixtures("restored_rules")
def test_a_rule_for_rows_alone_serves_folded_rows_too() -> None:
    register_layer(Own)(
        lambda module, inputs, grad: {
            "weight": torch.einsum("ni,no->nio", inputs[0], grad * (1 - torch.tanh(inputs[0] @ module.weight) ** 2)),
            "shift": grad,
        }
    )
    model = seeded(lambda: Folding(Own())).double()
    x = drawn(3, 5, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)
