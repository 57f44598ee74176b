"""One whole step against the oracle, which differentiates one candidate at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ftw_optim import GreedyFilter, SelectiveOptimizer, preconditioner_of
from ftw_optim.testing import recorded
from tests.support.models import Case
from tests.support.oracles import candidate_gradients, explicit_matching, mean_gradient

# Relative to the norms of the two gradients. float32 keeps seven digits, of which the sum over parameters costs one.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}  # float32: sums of older kernels are off by up to 1.5e-5

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def check_against_oracle(
    case: Case, optimizer: SelectiveOptimizer, dtype: torch.dtype, *, closure: Any = None, **told: Any
) -> None:
    """One backward, with its Gram matrix, cross-Gram and applied gradient compared to the oracle's.

    ``P`` is taken at the very reference that the step used, after that was compared to the mean candidate gradient: at
    a cold start ``P`` divides by it, and where candidates cancel in it a float32 oracle is itself off by up to 3e-5.
    A ``closure`` gives the losses in another form; what else is ``told`` goes to the backward call.
    """
    atol = TOLERANCE[dtype]
    gradients = candidate_gradients(case)
    target = mean_gradient(candidate_gradients(case, target=True))
    mean = mean_gradient(gradients)
    parameters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    scored = {name: p for name, p in parameters.items() if optimizer.scored is None or optimizer.scored(name, p)}

    # Some gradients are zero but for rounding, such as that of an attention key's bias.
    floor = 1e-3 * max(float(gradient.norm()) for gradient in mean.values())
    optimizer.zero_grad()
    with recorded(optimizer) as shares:
        optimizer.backward(closure or case.losses, **told)
    references = {share.name: share.reference for share in shares}
    selection = optimizer.selection
    assert selection is not None
    assert not selection.skipped

    maps = {}
    for name, parameter in scored.items():
        size = torch.stack([gradient[name] for gradient in gradients]).square().mean(0).sum().sqrt()
        assert (references[name] - mean[name]).norm() <= atol * (size + floor), name
        maps[name] = preconditioner_of(optimizer, parameter, references[name])
    gram, cross, energy = explicit_matching(gradients, target, maps, optimizer.metric)
    size = gram.diagonal().sqrt()
    torch.testing.assert_close(
        selection.gram.double() / size / size[:, None], gram / size / size[:, None], rtol=0, atol=atol
    )
    torch.testing.assert_close(
        selection.cross_gram.double() / size / energy.sqrt(), cross / size / energy.sqrt(), rtol=0, atol=atol
    )
    assert selection.target_energy == pytest.approx(float(energy), rel=atol)
    for name, parameter in parameters.items():
        parts = [
            weight * gradients[index][name].double()
            for index, weight in zip(selection.kept.tolist(), selection.weights, strict=True)
        ]
        expected = torch.stack(parts).sum(0)
        size = torch.stack(parts).reshape(len(parts), -1).norm(dim=1).sum() + floor
        given = torch.zeros_like(expected) if parameter.grad is None else parameter.grad.double()
        # Relative to the whole parameter, since the gradients of single entries may cancel.
        assert (given - expected).norm() <= atol * size, name


def optimizer_of(case: Case, **options: Any) -> SelectiveOptimizer:
    trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    options = {"filter": GreedyFilter(keep=3), "combine": "factors", "target": case.target_losses, **options}
    return SelectiveOptimizer(OPTIMIZERS["adamw"](trained), case.model, **options)


def training_on_target(case: Case, **options: Any) -> SelectiveOptimizer:
    """The same with target rows that take part in the step, combined as ``"auto"`` will have it."""
    return optimizer_of(case, **{"train_on_target": True, "combine": "auto", **options})
