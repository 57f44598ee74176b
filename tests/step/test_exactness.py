"""The whole step against autograd, one candidate at a time, on every model family that the README names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, UniformWeights, last_blocks
from tests.support.checks import OPTIMIZERS, check_against_oracle
from tests.support.grids import grid, slow
from tests.support.models import CASES, Case, SmallGPT, language_model, precision, seeded
from tests.support.oracles import candidate_gradients

N = 5


def build(name: str, dtype: torch.dtype, inner: str, **options: Any) -> tuple[Case, SelectiveOptimizer]:
    case = CASES[name](dtype, N)
    trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    options = {"filter": GreedyFilter(keep=3), **options}
    return case, SelectiveOptimizer(OPTIMIZERS[inner](trained), case.model, case.target_losses, **options)


def _stands_for_others(name: str, metric: str, inner: str, dtype: torch.dtype) -> bool:
    """All of the small models; of the families, each metric, optimizer and precision once."""
    of_families = [
        ("preconditioned", "adamw", torch.float64),
        ("update", "adamw", torch.float32),
        ("euclidean", "sgd", torch.float64),
    ]
    return name in ("mlp", "small-gpt") or (metric, inner, dtype) in of_families


@pytest.mark.parametrize(
    ("name", "metric", "inner", "dtype"),
    grid(
        CASES,
        ["preconditioned", "update", "euclidean"],
        OPTIMIZERS,
        [torch.float64, torch.float32],
        fast=_stands_for_others,
    ),
)
def test_gram_cross_gram_and_gradient_are_autograds(name: str, metric: str, inner: str, dtype: torch.dtype) -> None:
    """Cold, and once more when the optimizer has seen gradients."""
    with precision(dtype):
        case, optimizer = build(name, dtype, inner, metric=metric)
        check_against_oracle(case, optimizer, dtype)
        for _ in range(2):
            optimizer.step(case.losses)
        check_against_oracle(case, optimizer, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_factors_and_graph_give_the_same_parameters(name: str) -> None:
    with precision(torch.float64):
        results = []
        for combine in ("factors", "graph"):
            case, optimizer = build(name, torch.float64, "adamw", combine=combine)
            for _ in range(3):
                optimizer.step(case.losses)
                assert optimizer.selection is not None
                assert optimizer.selection.combine == combine
            results.append(list(case.model.parameters()))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


class Gated(nn.Module):
    """A layer that no rule knows: it owns two parameters, and neither acts entry by entry alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.ones(width)), nn.Parameter(torch.full((width,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.abs().clamp(min=1e-3) ** self.power * x.sign()


@pytest.mark.parametrize("combine", ["graph", "auto"])
def test_last_block_alone_is_scored_and_everything_is_updated_exactly(combine: str) -> None:
    """On a model with a layer that has no rule."""
    case, _ = build("small-gpt", torch.float64, "adamw")
    case.model.norm = nn.Sequential(case.model.norm, Gated(8).double())  # type: ignore[assignment,operator,arg-type]
    scored = last_blocks(case.model, 1)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters(), lr=0.01),
        case.model,
        case.target_losses,
        filter=GreedyFilter(keep=3),
        scored=scored,
        combine=combine,
    )
    check_against_oracle(case, optimizer, torch.float64)
    optimizer.step(case.losses)
    check_against_oracle(case, optimizer, torch.float64)
    assert optimizer.selection is not None
    assert optimizer.selection.combine == "graph"


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_last_block_alone_is_scored_with_rules_for_all(combine: str) -> None:
    case, _ = build("gpt2-tied", torch.float64, "adamw")
    with precision(torch.float64):
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(case.model.parameters(), lr=0.01),
            case.model,
            case.target_losses,
            scored=last_blocks(case.model, 1),
            combine=combine,
            filter=GreedyFilter(keep=3),
        )
        check_against_oracle(case, optimizer, torch.float64)
        optimizer.step(case.losses)
        check_against_oracle(case, optimizer, torch.float64)


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_a_step_of_sgd_is_its_formula(combine: str) -> None:
    case, optimizer = build("small-gpt", torch.float64, "sgd", combine=combine)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    gradients = candidate_gradients(case)
    loss = optimizer.step(case.losses)
    selection = optimizer.selection
    assert selection is not None
    for name, parameter in case.model.named_parameters():
        moved = sum(
            weight * gradients[i][name] for i, weight in zip(selection.kept.tolist(), selection.weights, strict=True)
        )
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * moved, rtol=1e-10, atol=1e-12)
    share = selection.weights / selection.weights.sum()
    torch.testing.assert_close(loss, (share * case_losses_before(before, case)[selection.kept]).sum())


def case_losses_before(before: dict[str, Tensor], case: Case) -> Tensor:
    """The losses at earlier parameters."""
    model = copy.deepcopy(case.model)
    model.load_state_dict(before, strict=False)
    return case.losses_of(model, case.candidates).detach()


@pytest.mark.parametrize("combine", ["factors", slow("graph")])
def test_all_kept_at_one_over_n_is_the_bare_optimizer_for_a_hundred_steps(combine: str) -> None:
    """With dropout: the masks are those of a bare run, although the target's pass draws some of its own."""
    runs = []
    for selective in (False, True):
        case = language_model(seeded(lambda: SmallGPT(dropout=0.2)).double().train(), N)
        optimizer: Optimizer = torch.optim.AdamW(case.model.parameters(), lr=3e-3, weight_decay=0.1)
        if selective:
            optimizer = SelectiveOptimizer(
                optimizer,
                case.model,
                case.target_losses,
                filter=KeepAll(),
                weight=UniformWeights(),
                combine=combine,
            )
        with torch.random.fork_rng():
            torch.manual_seed(5)
            for _ in range(100):
                if selective:
                    optimizer.step(case.losses)  # type: ignore[arg-type]
                else:
                    optimizer.zero_grad()
                    case.losses().mean().backward()
                    optimizer.step()
        runs.append([p.detach() for p in case.model.parameters()])
    # A hundred steps of AdamW amplify the rounding of the first ones.
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-7, atol=1e-9)
