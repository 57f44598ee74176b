"""Models that torch.compile has compiled, whole or in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import GreedyFilter, SelectiveOptimizer
from tests.support.grids import grid
from tests.support.models import SmallGPT, drawn, language_model, seeded
from tests.support.releases import EARLY_PYTHON

pytestmark = EARLY_PYTHON

# Each of the ways, of the updates and of the backends with one of the others; all of them are slow.
PAIRS = [
    ("compiled before", "factors", "eager"),
    ("compiled after", "graph", "eager"),
    ("in place", "rerun", "eager"),
    ("blocks", "factors", "aot_eager"),
]


# Dynamo looks at the attributes of intermediate tensors, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("how", "combine", "backend"),
    grid(
        ["compiled before", "compiled after", "in place", "blocks"],
        ["factors", "graph", "rerun"],
        ["eager", "aot_eager"],
        fast=lambda *point: point in PAIRS,
    ),
)
def test_a_compiled_model_is_captured_and_steps_like_an_eager_one(how: str, combine: str, backend: str) -> None:
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model: nn.Module = seeded(SmallGPT).double()
        case = language_model(model, 4)
        called: Any = model
        if compiled:
            if how == "in place":
                model.compile(backend=backend)
            elif how == "blocks":
                for block in model.blocks:  # type: ignore[union-attr]
                    block.compile(backend=backend)
            else:
                called = torch.compile(model, backend=backend)
            case.losses_of(called, case.candidates)  # a first call: the graph is there before any hook
        given = called if how == "compiled before" else model
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.01),
            given,
            lambda: case.losses_of(called, case.target),  # noqa: B023
            filter=GreedyFilter(keep=2),
            combine=combine,
        )

        def losses(rows: Tensor | None = None) -> Tensor:
            batch = case.candidates if rows is None else {key: v[rows] for key, v in case.candidates.items()}  # noqa: B023
            return case.losses_of(called, batch)  # noqa: B023

        for _ in range(3):
            optimizer.step(losses)
        assert optimizer.selection is not None
        results.append((optimizer.selection.gram, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-11)
    torch.compiler.reset()


def test_after_a_step_a_compiled_model_runs_compiled_again() -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).double()
    compiled = torch.compile(model, backend=backend)
    x = drawn(4, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: compiled(x[:2]).square().sum(1)
    )
    optimizer.step(lambda: compiled(x).square().sum(1))
    before = len(graphs)
    torch.compiler.reset()
    compiled(x)
    assert len(graphs) == before + 1
    torch.compiler.reset()


def test_a_graph_that_calls_no_layers_is_an_error() -> None:
    """As of models exported ahead of time: nothing is captured, and nothing is silent."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(4, 3)
    traced = torch.fx.symbolic_trace(model)
    flat = torch.export.export(model, (x,)).module()
    for graph, reached in ((traced, True), (flat, False)):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: model(x[:2]).square().sum(1)
        )
        if reached:  # it calls the layers themselves
            optimizer.step(lambda: graph(x).square().sum(1))  # noqa: B023
        else:
            with pytest.raises(RuntimeError, match=r"Expected .* to be used only by calling|none was reached"):
                optimizer.step(lambda: graph(x).square().sum(1))  # noqa: B023
