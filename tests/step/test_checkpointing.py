"""Activation checkpointing of both kinds, which runs parts of the model a second time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftw_optim import SelectiveOptimizer, last_blocks
from ftw_optim._factors.factors import weighted_sum
from tests.support.capturing import captured
from tests.support.checks import optimizer_of
from tests.support.families import case_of, checkpoint_blocks, model_of
from tests.support.grids import grid
from tests.support.layers import Scale
from tests.support.models import drawn, seeded, with_lora


class Checkpointed(nn.Module):
    """Layers of all kinds, one of them tied, with dropout, inside and outside of checkpoints."""

    def __init__(self, *, kinds: tuple[bool | None, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.kinds, self.dropout = kinds, dropout
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), Scale(), nn.LayerNorm(4), nn.Dropout(dropout)) for _ in kinds
        )
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shared(torch.tanh(self.first(x)))
        for kind, block in zip(self.kinds, self.blocks, strict=True):

            def run(hidden: Tensor, block: nn.Module = block) -> Tensor:
                return torch.tanh(self.shared(block(hidden))) + hidden

            hidden = run(hidden) if kind is None else checkpoint(run, hidden, use_reentrant=kind)
        scores: Tensor = self.last(hidden)
        return scores


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("kinds", [(False,), (True,), (True, False, None, True)], ids=str)
@pytest.mark.parametrize("frozen", ["", "first", "blocks.0.0", "shared"])
def test_checkpoints_of_both_kinds_are_captured(
    kinds: tuple[bool | None, ...], frozen: str, keep_graph: bool, self_check: bool
) -> None:
    model = seeded(lambda: Checkpointed(kinds=kinds)).double()
    plain = seeded(lambda: Checkpointed(kinds=(None,) * len(kinds))).double()
    for one in (model, plain):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    x = drawn(3, 5, 3).requires_grad_(frozen == "first")
    found, expected = (
        captured(one, lambda: one(x).square().sum((1, 2)), keep_graph=keep_graph, self_check=self_check)  # noqa: B023
        for one in (model, plain)
    )
    assert found.keys() == expected.keys()
    for row in torch.eye(3, dtype=torch.float64):
        for name, parameter in model.named_parameters():
            if name in expected:
                one, other = (weighted_sum(factors[name], row, parameter.shape) for factors in (found, expected))
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reentrant", "combine"),
    grid(
        ["llama", "gpt2", "mixtral", "lora"],
        [False, True],
        ["factors", "graph", "rerun"],
        # Of every other model each kind of checkpoint, and each combine.
        fast=lambda name, reentrant, combine: (
            name == "llama" or (reentrant, combine) in [(False, "factors"), (True, "graph")]
        ),
    ),
)
def test_checkpointed_and_plain_runs_are_the_same(name: str, reentrant: bool, combine: str) -> None:
    """Gram matrix and parameters, over steps, with the model's own switch; dropout is on where the model has it."""
    runs = []
    for checkpointed in (False, True):
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.1} if name == "gpt2" else {}
        model: Any = model_of("llama" if name == "lora" else name, use_cache=False, **dropout)
        if name == "lora":
            model = seeded(lambda: with_lora(model))  # noqa: B023
        if checkpointed:
            checkpoint_blocks(model, reentrant=reentrant)
        if name == "lora":
            model.enable_input_require_grads()
        case = case_of("llama", model.double(), 4)
        optimizer = optimizer_of(case, combine=combine)
        grams = []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for _ in range(2):
                optimizer.step(case.losses)
                assert optimizer.selection is not None
                assert optimizer.selection.combine == combine
                grams.append(optimizer.selection.gram)
        runs.append((grams, [parameter.detach() for parameter in model.parameters()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-8, atol=1e-11)


def test_reentrant_checkpoints_beside_parameters_that_are_not_ours() -> None:
    """The backward over the common graph may not name its parameters, and the others' gradients stay as they were."""
    model = seeded(lambda: Checkpointed(kinds=(True, True))).double()
    parameters = [p for name, p in model.named_parameters() if not name.startswith("blocks.0")]
    model.blocks[0][0].weight.grad = kept = torch.ones(4, 4, dtype=torch.float64)  # type: ignore[index,union-attr]
    x = drawn(3, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(parameters, lr=0.1), model, lambda: model(x[:2]).square().sum((1, 2)), combine="graph"
    )
    optimizer.step(lambda: model(x).square().sum((1, 2)))
    assert model.blocks[0][0].weight.grad is kept  # type: ignore[index,union-attr]
    assert torch.equal(kept, torch.ones(4, 4, dtype=torch.float64))
    assert optimizer.selection is not None


def test_the_last_block_of_a_checkpointed_model_is_scored_alone() -> None:
    grams = []
    for reentrant in (None, False, True):
        model: Any = model_of("llama", use_cache=False)
        if reentrant is not None:
            checkpoint_blocks(model, reentrant=reentrant)
        case = case_of("llama", model.double(), 4)
        optimizer = optimizer_of(case, combine="graph", scored=last_blocks(model, 1))
        optimizer.step(case.losses)
        assert optimizer.selection is not None
        grams.append(optimizer.selection.gram)
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grams[0], grams[2], rtol=1e-9, atol=1e-12)
