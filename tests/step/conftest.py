"""What several tests of a step share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ftw_optim import SelectiveOptimizer
from tests.support.steps import snapshot


@pytest.fixture
def unchanged() -> Callable[[Any, SelectiveOptimizer, Callable[[], Any]], None]:
    """Runs something that must raise, and checks that nothing was lost or half-applied and the next step works."""

    def run(case: Any, optimizer: SelectiveOptimizer, failing: Callable[[], Any]) -> None:
        for parameter in case.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before, selection = snapshot(case, optimizer), optimizer.selection
        held = [p.grad for p in case.model.parameters()]
        failing()
        after = snapshot(case, optimizer)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert all(p.grad is grad for p, grad in zip(case.model.parameters(), held, strict=True))
        assert optimizer.selection is selection
        for module in case.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        optimizer.step(case.losses)
        assert optimizer.selection is not None
        assert not optimizer.selection.skipped

    return run


@pytest.fixture
def fixed_seed() -> Iterator[None]:
    """Of the global generator, for models that a test builds without a generator of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
