"""The target gradient over time: when it is evaluated, and how it is averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import TargetGradient
from tests.support.steps import build

pytestmark = pytest.mark.usefixtures("fixed_seed")


def counted_target(case: Any, calls: list[int]) -> Callable[[], Tensor]:
    def target() -> Tensor:
        calls.append(1)
        losses: Tensor = case.target_losses()
        return losses

    return target


def test_a_target_is_evaluated_every_so_many_steps_and_folded_into_p_every_step() -> None:
    case, optimizer = build()
    calls: list[int] = []
    optimizer.target = TargetGradient(counted_target(case, calls), refresh_every=3)
    counts = []
    for _ in range(7):
        optimizer.step(case.losses)
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2, 2, 3]


def test_decay_averages_the_target_gradients() -> None:
    case, optimizer = build(lr=0.0, metric="euclidean")
    parts = [torch.tensor([0]), torch.tensor([1]), torch.tensor([2])]
    single = []
    for part in parts:
        optimizer.target = lambda part=part: case.target_losses(part)  # type: ignore[assignment]
        optimizer.backward(case.losses)
        assert optimizer.selection is not None
        single.append(optimizer.selection.cross_gram)
    case, optimizer = build(lr=0.0, metric="euclidean")
    remaining = iter(parts)
    optimizer.target = TargetGradient(lambda: case.target_losses(next(remaining)), decay=0.75)
    for _ in range(3):
        optimizer.backward(case.losses)
    expected = 0.75 * (0.75 * single[0] + 0.25 * single[1]) + 0.25 * single[2]
    assert optimizer.selection is not None
    torch.testing.assert_close(optimizer.selection.cross_gram, expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"refresh_every": 0}, ValueError), ({"refresh_every": 1.5}, ValueError), ({"decay": 1.0}, ValueError)],
)
def test_target_options_are_checked(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        TargetGradient(lambda: torch.zeros(1), **options)


def test_a_new_target_is_evaluated_at_once() -> None:
    case, optimizer = build()
    optimizer.target = TargetGradient(case.target_losses, refresh_every=100)
    optimizer.backward(case.losses)
    calls: list[int] = []
    optimizer.target = TargetGradient(counted_target(case, calls), refresh_every=100)
    optimizer.backward(case.losses)
    assert len(calls) == 1
