"""Modules that are run again for their own parameters: which way is taken, and when none is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights, coverage
from ftw_optim._capture.replay.fallback import ways_taken
from ftw_optim.testing import check_layer
from tests.support.capturing import captured, check_every_candidate, rows_of
from tests.support.layers import Scale, model_with
from tests.support.models import drawn, seeded


def check(layer: nn.Module, way: str, *, n: int = 3, t: int = 5) -> None:
    model = model_with(layer)
    x = drawn(n, t, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), n)
    assert ways_taken(layer, alone=False) == {way}


def test_plain_modules_run_vectorised() -> None:
    check(Scale(), "vectorised")


def test_control_flow_that_depends_on_data_runs_row_by_row() -> None:
    check(Scale(function=lambda x: x.exp() if x.sum() > 0 else x.sin()[..., :]), "row by row", n=1 + 1)

    def routed(x: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for index in (x.abs() > 1.0).nonzero():
            output[tuple(index)] = x[tuple(index)] ** 2
        return output + x

    check(Scale(function=routed), "row by row")


def test_what_depends_on_the_size_of_its_batch_runs_whole() -> None:
    check_batch = Scale(function=lambda x: torch.tanh(x) if len(x) > 1 else torch.sin(x))
    model = model_with(check_batch)
    x = drawn(3, 5, 3)
    found = captured(model, lambda: model(x).square().sum((1, 2)))
    losses = model(x).square().sum((1, 2))
    for row in range(3):
        (expected,) = torch.autograd.grad(losses[row], [check_batch.scale], retain_graph=True)
        torch.testing.assert_close(found["1.scale"][0].left[row, 0], expected)
    assert ways_taken(check_batch) == {"together"}


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_random_numbers_are_drawn_again_as_they_were(combine: str) -> None:
    """Candidates have the gradients of the one forward pass with its masks, and a training run is the bare one."""
    layer = Scale(function=lambda x: functional.dropout(torch.tanh(x), 0.5))
    model = model_with(layer)
    x = drawn(3, 5, 3)

    def losses() -> Tensor:
        torch.manual_seed(7)
        values: Tensor = model(x).square().sum((1, 2))
        return values

    found = captured(model, losses)
    rows = losses()
    for row in range(3):
        (expected,) = torch.autograd.grad(rows[row], [layer.scale], retain_graph=True)
        torch.testing.assert_close(found["1.scale"][0].left[row, 0], expected)
    assert ways_taken(layer) == {"together"}

    runs = []
    for selective in (False, True):
        model = model_with(Scale(function=lambda x: functional.dropout(torch.tanh(x), 0.5)))
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
        if selective:
            optimizer = SelectiveOptimizer(
                optimizer,
                model,
                lambda: model(x[:2]).square().sum((1, 2)),  # noqa: B023
                filter=KeepAll(),
                weight=UniformWeights(),
                combine=combine,
            )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for _ in range(5):
                if selective:
                    optimizer.step(lambda: model(x).square().sum((1, 2)))  # noqa: B023
                else:
                    optimizer.zero_grad()
                    model(x).square().sum((1, 2)).mean().backward()
                    optimizer.step()
        runs.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


def test_buffers_that_a_call_changes_are_changed_once() -> None:
    class Counting(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            self.calls += 1.0
            return super().forward(x)

    layer = Counting()
    model = model_with(layer)
    captured(model, lambda: model(drawn(3, 5, 3)).square().sum((1, 2)))
    assert layer.calls == 1.0
    state = torch.get_rng_state()
    captured(model, lambda: model(drawn(3, 5, 3)).square().sum((1, 2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_that_gives_something_else_is_refused_by_name() -> None:
    class Alternating(Scale):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            return super().forward(x) * self.calls

    model = model_with(Alternating())
    message = r"Expected to run Alternating \(layer '1'\) again.*gradients of 1\.scale.*its output differed.*scored="
    with pytest.raises(NotImplementedError, match=message):
        captured(model, lambda: model(drawn(3, 5, 3)).square().sum((1, 2)))


class Several(nn.Module):
    """Returns a structure, whose second tensor is made from the first, and a third that depends on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, *, gate: Tensor | None = None) -> dict[str, Any]:
        first = torch.sin(x * self.scale)
        return {"first": first, "rest": (first.exp() + self.shift, x, None, "name")}


def test_several_outputs_of_which_one_is_made_from_another() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.several, self.after = nn.Linear(3, 4), Several(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found = self.several(self.before(x), gate=None)
            second, third = found["rest"][:2]
            logits: Tensor = self.after(found["first"] * second + third.square())
            return logits

    model = seeded(Model).double()
    x = drawn(3, 5, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)
    check_layer(Several(), drawn(3, 5, 4))


class Learned(nn.Module):
    """Positions that all rows share, with an axis for them or without."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 27).view(9, 3))
        self.shape = shape

    def forward(self, t: int | Tensor) -> Tensor:
        length = t if isinstance(t, int) else t.shape[1]
        return self.table[:length].sin().view(*self.shape, length, 3)


class Placed(nn.Module):
    def __init__(self, shape: tuple[int, ...], *, count: bool) -> None:
        super().__init__()
        self.positions, self.count, self.head = Learned(shape), count, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(x + self.positions(x.shape[1] if self.count else x)))
        return scores


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["t x d", "1 x t x d"])
def test_an_output_that_all_candidates_share_is_told_apart_by_row(shape: tuple[int, ...], n: int, count: bool) -> None:
    model = seeded(lambda: Placed(shape, count=count)).double()
    x = drawn(n, 4, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), n)
    assert coverage(model)["positions.table"].again == ("Learned",)


class Looked(nn.Embedding):
    """Positions by an index with one axis, in a module of its own."""

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index + 1).sin()


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_positions_looked_up_by_an_index_for_all_candidates(n: int, start: int) -> None:
    """Also where as many candidates as positions, or candidates that divide them, could be meant."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.head = nn.Embedding(9, 3), Looked(9, 3), nn.Linear(3, 2)

        def forward(self, ids: Tensor) -> Tensor:
            places = self.places(torch.arange(start, start + ids.shape[1]))
            scores: Tensor = self.head(torch.tanh(self.words(ids) + places))
            return scores

    model = seeded(Model).double()
    ids = torch.randint(9, (n, 4), generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(ids, rows)).square().sum((1, 2)), n)
    assert coverage(model)["places.weight"].again == ("Looked",)


def test_a_number_of_rows_may_be_that_of_the_candidates() -> None:
    """A module that is asked for rows, of several axes each, gives one to each candidate."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))

        def forward(self, rows: int) -> Tensor:
            return self.queries.sin().expand(rows, 2, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.head = Queries(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.queries(len(x)) @ self.head(x).mT

    model, x = seeded(Model).double(), drawn(4, 4, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 4)


def test_a_model_that_cannot_take_one_row_for_each_says_whose_output_was_expanded() -> None:
    class Picky(Placed):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.positions(x).unbind(0)
            scores: Tensor = self.head(x + torch.stack(rows).view(x.shape[1], 3))
            return scores

    model = seeded(lambda: Picky((), count=False)).double()
    with pytest.raises(RuntimeError) as caught:
        captured(model, lambda: model(drawn(3, 4, 3)).square().sum((1, 2)))
    assert "The output of positions has one row for all candidates" in caught.value.__notes__[0]


def test_a_model_that_owns_parameters_itself() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.layer = nn.Parameter(torch.zeros(2)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = torch.tanh(self.layer(x) + self.bias)
            return logits

    model = seeded(Root).double()
    x = drawn(3, 5, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)


def test_a_parameter_that_two_modules_share() -> None:
    first = Scale()
    second = Scale(function=torch.sin)
    second.scale = first.scale
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), first, nn.Linear(4, 4), second)).double()
    second.scale = first.scale
    x = drawn(3, 5, 3)
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)
    # Around one of them, a container with the same parameter of its own captures the inner use too.
    outer = Scale(function=second)
    outer.scale = second.scale
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), outer)).double()
    outer.scale = second.scale
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)


def test_hidden_states_given_to_a_recurrent_layer() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.cell = nn.Linear(3, 4), nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            output, last = self.cell(x, self.start(x[:, 0])[None])
            values: Tensor = output.sum(1) + last[0]
            return values

    model = seeded(Started).double()
    for n, t in ((3, 5), (4, 4), (1, 1), (2, 1)):
        x = drawn(n, t, 3)
        check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum(1), n)  # noqa: B023
