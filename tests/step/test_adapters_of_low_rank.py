"""Adapters' gradients wait multiplied out, which is smaller than their factors: exact steps in every form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import GreedyFilter, SelectiveOptimizer, Sketch
from ftw_optim._factors import buckets
from ftw_optim._step import candidates as candidate_pass
from tests.support.checks import check_against_oracle, optimizer_of
from tests.support.models import in_batches, precision, transformers_model


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each parameter that was looked at is multiplied out now; none is small."""
    monkeypatch.setattr(buckets, "SMALL", 0)
    found: list[bool] = []
    before = candidate_pass.compacted

    def noted(uses: Any, shape: torch.Size) -> Any:
        after = before(uses, shape)
        found.append(after is not uses)
        return after

    monkeypatch.setattr(candidate_pass, "compacted", noted)
    return found


@pytest.mark.parametrize("metric", ["preconditioned", "update", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_batch(forms: list[bool], dtype: torch.dtype, metric: str) -> None:
    case = transformers_model("llama", lora=True)(dtype, 6)
    optimizer = optimizer_of(case, metric=metric)
    with precision(dtype):
        check_against_oracle(case, optimizer, dtype)
        optimizer.step()
        check_against_oracle(case, optimizer, dtype)
    assert True in forms


@pytest.mark.parametrize("sizes", [[6], [4, 2], [1, 5]], ids=str)
def test_micro_batches(forms: list[bool], sizes: list[int]) -> None:
    case = transformers_model("llama", lora=True)(torch.float64, 6)
    optimizer = optimizer_of(case)
    optimizer.backward(in_batches(case, sizes))
    together = [p.grad.clone() for p in case.model.parameters() if p.grad is not None]
    assert True in forms
    optimizer.zero_grad()
    optimizer.backward(case.losses)
    alone = [p.grad for p in case.model.parameters() if p.grad is not None]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-14)


class Adapted(nn.Module):
    """A thin matrix between rows of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(12, 2, bias=False), nn.Linear(2, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(self.down(x).tanh())
        return up


def test_micro_batches_of_which_only_the_longer_are_multiplied_out(forms: list[bool]) -> None:
    """Rows of 2 positions are smaller as factors, rows of 9 are not; padding changes nothing."""
    torch.manual_seed(0)
    model = Adapted().double()
    lengths = [2, 9, 2]
    rows = [torch.randn(3, t, 12, dtype=torch.float64) for t in lengths]

    def losses(x: Tensor) -> Tensor:
        return model(x).square().sum((1, 2))

    def batches() -> Iterator[Tensor]:
        yield from map(losses, rows)

    def padded() -> Tensor:
        return losses(torch.cat([nn.functional.pad(x, (0, 0, 0, 9 - x.shape[1])) for x in rows]))

    found = []
    for closure in (batches, padded):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: losses(rows[1][:2]), filter=GreedyFilter(keep=4)
        )
        optimizer.zero_grad()
        optimizer.backward(closure)
        assert optimizer.selection is not None
        assert optimizer.selection.combine == "factors"
        found.append([optimizer.selection.gram, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)
    assert {True, False} <= set(forms)


@pytest.mark.parametrize("options", [{"combine": "graph"}, {"combine": "rerun"}, {"gram": Sketch(dim=64)}], ids=str)
def test_factors_stay_where_nothing_is_summed_from_them_or_a_sketch_reads_them(
    forms: list[bool], options: dict[str, Any]
) -> None:
    case = transformers_model("llama", lora=True)(torch.float64, 6)
    optimizer_of(case, **options).step(case.losses)
    assert True not in forms
