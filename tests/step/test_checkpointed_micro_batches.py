"""Checkpointed layers whose one row is made one for each candidate, in several micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftw_optim import GreedyFilter, SelectiveOptimizer


class Positions(nn.Module):
    """Scales its input by a row for each position, which all candidates share, inside of a checkpoint."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.before, self.table, self.out = nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 1)
        self.checkpointed = checkpointed

    def scaled(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.table(torch.arange(x.shape[1])[None]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        scaled = checkpoint(self.scaled, x, use_reentrant=False) if self.checkpointed else self.scaled(x)
        losses: Tensor = self.out(scaled).square().mean((1, 2))
        return losses


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_a_checkpoint_runs_again_as_its_own_micro_batch_ran(combine: str, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(7, 5, 4).double(), torch.randn(3, 5, 4).double()
    plain = Positions(checkpointed=False).double()
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpointed = True
    found = []
    for model in (plain, checkpointed):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            lambda model=model: model(target),
            filter=GreedyFilter(keep=3),
            combine=combine,
        )

        def batches(model: nn.Module = model) -> Iterator[Tensor]:
            for part in x.split(list(sizes)):
                yield model(part)

        for _ in range(2):
            optimizer.step(batches)
        assert optimizer.selection is not None
        assert optimizer.selection.combine == combine
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*found)
