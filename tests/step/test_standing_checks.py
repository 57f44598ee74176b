"""Uses of a parameter that begin in the middle of a run, or that no hook sees: noticed when they happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights
from tests.support.layers import TiedByHand
from tests.support.models import drawn, seeded
from tests.support.steps import WAYS

pytestmark = pytest.mark.usefixtures("fixed_seed")


class LateTie(nn.Module):
    """Reads a weight of its own past the layer once a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle, self.late = nn.Embedding(7, 4), nn.Linear(4, 4), False
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.tokens(ids)))
        if self.late:
            hidden = hidden + functional.linear(hidden, self.middle.weight)
        scores: Tensor = self.head(hidden)
        return scores


@pytest.mark.parametrize("scored", ["all", "some"])
@pytest.mark.parametrize("combine", [*WAYS, "rerun"])
def test_a_branch_first_taken_at_step_five_is_noticed_then(
    combine: str, scored: str, unchanged: Callable[..., None]
) -> None:
    model = seeded(LateTie).double()
    ids = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))

    def losses(rows: Tensor | None = None) -> Tensor:
        return model(ids if rows is None else ids[rows]).logsumexp(-1).sum(1)

    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(model.parameters()),
        model,
        losses,
        combine=combine,
        scored=None if scored == "all" else lambda name, p: name.startswith("middle"),
    )
    for _ in range(4):
        optimizer.step(losses)

    class Holder:
        pass

    holder: Any = Holder()
    holder.model, holder.losses = model, losses
    model.late = True

    def failing() -> None:
        with pytest.raises(RuntimeError, match=r"middle\.weight.*Call the layer as a module"):
            optimizer.step(losses)
        model.late = False

    unchanged(holder, optimizer, failing)


class Branching(nn.Module):
    """From its fifth call on it reads a weight directly, or scales by a layer that was never called before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x))))
        self.calls += torch.is_grad_enabled()
        if self.calls > 8:  # twice a step: target and candidates
            if self.how == "weight":
                hidden = hidden + functional.linear(hidden, self.middle.weight)
            elif self.how == "forward":
                hidden = self.middle.forward(hidden)
            else:
                hidden = torch.tanh(self.middle(hidden))
        scores: Tensor = self.last(hidden)
        return scores


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("how", ["weight", "forward", "call"])
def test_a_branch_first_taken_at_step_five(how: str, self_check: bool, combine: str) -> None:
    model = seeded(lambda: Branching(how)).double()
    x = drawn(4, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        model,
        lambda: model(x[:2]).square().sum((1, 2)),
        combine=combine,
        self_check=self_check,
        filter=KeepAll(),
        weight=UniformWeights(),
    )
    for _ in range(4):
        optimizer.step(lambda: model(x).square().sum((1, 2)))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if how == "call":  # one more use, and captured as one
        optimizer.step(lambda: model(x).square().sum((1, 2)))
        assert optimizer.coverage["middle.weight"].uses == 2
        return
    with pytest.raises(RuntimeError, match=r"middle\.weight"):
        optimizer.step(lambda: model(x).square().sum((1, 2)))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("self_check", [True, False])
def test_a_tied_head_that_is_called_functionally_is_found_and_nothing_is_changed(
    combine: str, self_check: bool
) -> None:
    model = seeded(TiedByHand).double()
    ids = torch.tensor([[1, 2, 6], [3, 3, 0], [5, 1, 4]])
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(ids[:2]).logsumexp(-1).sum(1),
        combine=combine,
        self_check=self_check,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"tokens\.weight"):
        optimizer.step(lambda: model(ids).logsumexp(-1).sum(1))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_norm_among_the_parameters_is_refused_before_anything_runs() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).double()
    x = drawn(4, 3)

    def optimizer_for(parameters: Any) -> SelectiveOptimizer:
        return SelectiveOptimizer(
            torch.optim.SGD(parameters, lr=0.1), model, lambda: model(x[:3]).square().sum(1), combine="graph"
        )

    with pytest.raises(NotImplementedError, match=r"1\.weight: BatchNorm1d mixes the candidates.*call eval\(\)"):
        optimizer_for(model.parameters()).step(lambda: model(x).square().sum(1))
    # Out of what is scored it still mixes the rows of what is.
    optimizer = optimizer_for([*model[0].parameters(), *model[2].parameters()])
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Self-check: the captured.*0\.weight"):
        optimizer.step(lambda: (model(x).square().sum(1) + 1.0).log() * scale)
    model[1].eval()
    optimizer_for(model.parameters()).step(lambda: model(x).square().sum(1))
