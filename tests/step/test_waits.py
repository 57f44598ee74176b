"""How often a step would wait for an accelerator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import GreedyFilter, SelectiveOptimizer, Sketch, TargetGradient, token_losses
from ftw_optim._factors.factors import weighted_sum
from ftw_optim._factors.finiteness import told
from ftw_optim._gram.inner_products import on_host
from ftw_optim._step.label_head import label_logits
from tests.support.factors import random_factors
from tests.support.models import Case, cases, in_batches, trained
from tests.support.taint import Device

# Where a step may wait: for the Gram system, and for whether what a second backward gave is finite.
PRODUCTS, CHECKS = (Path(inspect.getfile(function)).name for function in (on_host, told))


def waits(case: Case, closure: Any, *, labels_there: bool = False, **options: Any) -> dict[str, int]:
    """Of the third step, by place; labels, of which the closure itself asks where they are, may lie on the host."""
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(trained(case).values(), lr=0.01),
        case.model,
        TargetGradient(case.target_losses, refresh_every=2, decay=0.5),
        filter=GreedyFilter(keep=3),
        **options,
    )
    for _ in range(2):
        optimizer.step(closure)
    there = [*case.model.parameters(), *case.model.buffers()]
    there += [
        value
        for name, value in case.candidates.items()
        if isinstance(value, Tensor) and (labels_there or name != "labels")
    ]
    with Device(there) as device:
        optimizer.step(closure)
    assert optimizer.selection is not None
    assert not optimizer.selection.skipped
    return dict(device.waits)


@pytest.mark.parametrize("metric", ["preconditioned", "update"])
@pytest.mark.parametrize("gram", ["exact", Sketch(dim=64)], ids=str)
@pytest.mark.parametrize("build", cases().values(), ids=cases())
def test_a_step_from_factors_waits_once(build: Callable[[], Case], gram: Any, metric: str) -> None:
    """For the small Gram system, with all that must be known of losses, factors and target in the same copy."""
    case = build()
    found = waits(case, case.losses, combine="factors", gram=gram, metric=metric)
    assert list(found.values()) == [1]
    assert next(iter(found)).startswith(PRODUCTS)


@pytest.mark.parametrize("combine", ["graph", "rerun"])
@pytest.mark.parametrize("build", cases().values(), ids=cases())
def test_a_step_by_a_second_backward_waits_once_more(build: Callable[[], Case], combine: str) -> None:
    """For whether its gradient is finite, and that of the factors."""
    case = build()
    found = waits(case, case.losses, combine=combine)
    assert sorted(found.values()) == [1, 1]
    assert {place.split(":")[0] for place in found} == {PRODUCTS, CHECKS}


def test_micro_batches_wait_no_more_often() -> None:
    case = cases()["tied, shared positions"]()
    assert sorted(waits(case, in_batches(case, [4, 1, 3]), combine="factors").values()) == [1]
    assert sorted(waits(case, in_batches(case, [4, 1, 3]), combine="rerun", gram=Sketch()).values()) == [1, 1]


def test_labels_on_the_device_are_waited_for_before_the_model_runs_and_those_on_the_host_are_not() -> None:
    case = cases()["llama with lora"]()
    found = waits(case, case.losses, combine="factors", labels_there=True)
    assert sorted(found.values()) == [1, 1]
    assert {place.split(":")[0] for place in found} == {PRODUCTS, Path(inspect.getfile(label_logits)).name}
    everywhere = partial(token_losses, case.model, case.candidates, head="all")
    all_positions = waits(case, everywhere, combine="factors", labels_there=True)
    assert list(all_positions.values()) == [1]


def test_what_waits_is_seen() -> None:
    """The stand-in counts what it should, and nothing that stays on the host."""
    there, here = torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.float64)
    uses = [random_factors("dense", grid=(3, 2), rows=2, columns=2, seed=0)]
    with Device([there, uses[0].left]) as device:
        told([there.any(), (there & there).all()])
        weighted_sum(uses, here, torch.Size((2, 2)))
    assert list(device.waits.values()) == [1]
    with Device([here]) as device:
        weighted_sum(uses, here, torch.Size((2, 2)))
    assert list(device.waits.values()) == [1]
    assert "nonzero" in next(iter(device.waits))
