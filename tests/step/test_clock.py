"""Milliseconds of phases, and of those in a step."""

from __future__ import annotations

import time

import pytest
import torch

from ftw_optim import SelectiveOptimizer
from ftw_optim._step.clock import Clock
from tests.support.models import mlp


def test_a_phase_inside_of_another_does_not_count_for_that() -> None:
    now = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0])
    clock = Clock(now=lambda: next(now))
    with clock.phase("outer"), clock.phase("inner"):
        pass
    with pytest.raises(LookupError), clock.phase("inner"):
        raise LookupError
    assert clock.milliseconds == {"inner": 2000.0 + 1000.0, "outer": 8000.0}


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_the_phases_of_a_step_make_up_most_of_it(combine: str) -> None:
    case = mlp(torch.float64, 8)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, combine=combine
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
    assert combine != "rerun" or found["combine"] >= 20.0
    assert all(value >= 0.0 for value in found.values())
    assert sum(found.values()) <= whole


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_a_profiler_sees_the_phases_and_what_is_inside_of_them(combine: str) -> None:
    case = mlp(torch.float64, 8)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, combine=combine
    )
    optimizer.step(case.losses)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(case.losses)
    ranges: dict[str, list[tuple[float, float]]] = {}
    for event in profile.events():
        ranges.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    for inside, outside in {
        "backward": "candidates",
        "gram": "backward" if combine == "rerun" else "",
        "materialise": "gram",
        "products": "gram",
        "target": "",
        "solve": "",
        "combine": "",
    }.items():
        for start, end in ranges[f"ftw_optim/{inside}"]:
            around = ranges[f"ftw_optim/{outside}"] if outside else [(start, end)]
            assert any(one <= start and end <= other for one, other in around), inside
