"""Milliseconds of phases, and of those in a step."""

from __future__ import annotations

import time

import pytest
import torch

from ftw_optim import SelectiveOptimizer, _clock
from ftw_optim._clock import Clock
from tests.models import mlp


def test_a_phase_inside_of_another_does_not_count_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(_clock.time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.phase("outer"), clock.phase("inner"):
        pass
    with pytest.raises(LookupError), clock.phase("inner"):
        raise LookupError
    assert clock.milliseconds == {"inner": 2000.0 + 1000.0, "outer": 8000.0}


@pytest.mark.parametrize("update", ["factors", "graph", "rerun"])
def test_the_phases_of_a_step_make_up_most_of_it(update: str) -> None:
    case = mlp(torch.float64, 8)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, update=update
    )
    optimizer.step(case.losses)
    slow = case.losses

    def losses(rows: torch.Tensor | None = None) -> torch.Tensor:
        time.sleep(0.05 if rows is None else 0.02)
        return slow(rows)

    start = time.perf_counter()
    optimizer.backward(losses)
    whole = 1e3 * (time.perf_counter() - start)
    assert optimizer.selection is not None
    found = optimizer.selection.milliseconds
    assert found.keys() == {"target", "candidates", "gram", "solve", "combine"}
    assert found["candidates"] >= 50.0
    assert update != "rerun" or found["combine"] >= 20.0
    assert all(value >= 0.0 for value in found.values())
    assert sum(found.values()) <= whole
