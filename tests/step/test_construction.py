"""What is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ftw_optim import SelectiveOptimizer
from tests.support.steps import build

pytestmark = pytest.mark.usefixtures("fixed_seed")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "manhattan"}, ValueError, "metric must be one of 'preconditioned'"),
        ({"combine": "magic"}, ValueError, "combine must be one of 'auto'"),
        ({"gram": "guess"}, ValueError, 'gram must be "exact" or a Sketch'),
        ({"memory_limit": 0}, ValueError, "memory_limit must be a positive number of bytes"),
        ({"filter": 3}, ValueError, "Expected a callable stage"),
        ({"scored": lambda name, p: False}, ValueError, "accepts none of the 6 updated"),
        ({"target": None}, TypeError, "Expected a closure that returns the target losses"),
    ],
)
def test_construction_refuses_what_a_step_could_not_do(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(**options)


def test_construction_refuses_foreign_parameters_models_and_optimizers() -> None:
    model = nn.Linear(2, 2)
    inner = torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"Group 0 holds a parameter of shape \(3,\) that is not the model's"):
        SelectiveOptimizer(inner, model, lambda: torch.zeros(1))
    with pytest.raises(TypeError, match=r"Expected a torch\.optim\.Optimizer"):
        SelectiveOptimizer(model, model, lambda: torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Expected the model as an nn\.Module"):
        SelectiveOptimizer(inner, lambda x: x, lambda: torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="No preconditioner is known"):
        SelectiveOptimizer(torch.optim.LBFGS(model.parameters()), model, lambda: torch.zeros(1))


def test_rerun_needs_a_closure_that_accepts_rows_and_says_so_before_anything_runs() -> None:
    _case, optimizer = build("rerun")
    with pytest.raises(TypeError, match=r"closure\(rows=kept\)"):
        optimizer.step(lambda: pytest.fail("the closure ran"))
