"""What is captured of a model, and whether it is each candidate's own gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftw_optim import Factors
from ftw_optim._capture.capture import Capture
from ftw_optim._capture.plan import plan
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._capture.structure import Structure
from ftw_optim._factors.factors import weighted_sum

Losses = Callable[[Tensor | None], Tensor]


def captured(
    model: nn.Module,
    losses: Callable[[], Tensor],
    *,
    keep_graph: bool = False,
    self_check: bool = True,
    names: set[str] | None = None,
    sample_ids: Tensor | None = None,
) -> dict[str, list[Factors]]:
    names = {name for name, p in model.named_parameters() if p.requires_grad} if names is None else names
    with Capture(plan(Structure(model), names), sample_ids=sample_ids) as capture:
        return capture.differentiate(
            losses(),
            scale=1.0,
            keep_graph=keep_graph,
            checks=SelfChecks() if self_check else None,
            generator=torch.Generator().manual_seed(0),
        )


def check_every_candidate(model: nn.Module, losses_of: Losses, n: int, **options: Any) -> None:
    """The captured gradient of each candidate alone is autograd's of its own loss."""
    found = captured(model, lambda: losses_of(None), **options)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for row in range(n):
        loss = losses_of(torch.tensor([row]))[0]
        expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
            one_hot = torch.zeros(n, dtype=torch.float64)
            one_hot[row] = 1.0
            if gradient is None:
                assert name not in found
            else:
                given = weighted_sum(found[name], one_hot, parameter.shape)
                torch.testing.assert_close(given, gradient, rtol=1e-10, atol=1e-13)


def rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def squares(model: nn.Module, x: Tensor) -> Tensor:
    values: Tensor = model(x).square().flatten(1).sum(1)
    return values


def check_common_graph(model: nn.Module, losses: Callable[[], Tensor], *, rtol: float = 1e-10, **options: Any) -> None:
    """Every candidate's captured gradient is autograd's of its loss in the very pass that all of them went through."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    found = captured(model, losses, **options)
    torch.set_rng_state(state)
    rows = losses()
    weights = torch.eye(len(rows), dtype=torch.float64)
    expected = [
        torch.autograd.grad(row, list(parameters.values()), retain_graph=True, allow_unused=True) for row in rows
    ]
    for number, (name, parameter) in enumerate(parameters.items()):
        gradients = [row[number] for row in expected]
        if all(gradient is None for gradient in gradients):
            assert name not in found
            continue
        size = max(float(gradient.norm()) for gradient in gradients if gradient is not None)
        for weight, gradient in zip(weights, gradients, strict=True):
            given = weighted_sum(found[name], weight, parameter.shape)
            assert gradient is not None
            assert (given - gradient).norm() <= rtol * size + 1e-13, name
