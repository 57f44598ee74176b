"""Parameters that change between steps: frozen, swapped, moved to another precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import SelectiveOptimizer, TargetGradient
from tests.support.checks import optimizer_of
from tests.support.layers import Scale
from tests.support.models import SmallGPT, language_model, seeded


def test_layers_frozen_and_unfrozen_between_steps() -> None:
    """As in gradual unfreezing: each step's Gram matrix is that of the parameters which require a gradient then."""
    case = language_model(seeded(SmallGPT).double(), 4)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters(), lr=0.01), case.model, case.target_losses, metric="euclidean"
    )
    for trained in ("blocks.1", "", "blocks.0", "norm"):
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        free = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
        rows = []
        for loss in case.losses():
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, free, retain_graph=True)]))
        before = [parameter.detach().clone() for parameter in case.model.parameters()]
        optimizer.step(case.losses)
        assert optimizer.selection is not None
        expected = torch.stack(rows) @ torch.stack(rows).T
        torch.testing.assert_close(optimizer.selection.gram, expected, rtol=1e-9, atol=1e-12)
        for old, (name, parameter) in zip(before, case.model.named_parameters(), strict=True):
            assert torch.equal(old, parameter) == (not name.startswith(trained)), name


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_parameters_swapped_after_construction(combine: str) -> None:
    """In the model and in the optimizer's groups, as sharding does; in the model alone it is an error."""
    case = language_model(seeded(lambda: SmallGPT(tied=False)).double(), 4)
    optimizer = optimizer_of(case, combine=combine)
    optimizer.step(case.losses)
    replaced = {}
    for module in case.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                replaced[id(parameter)] = module._parameters[name] = nn.Parameter(parameter.detach().clone())
    with pytest.raises(ValueError, match="that is not the model's"):
        optimizer.step(case.losses)
    for group in optimizer.param_groups:
        group["params"] = [replaced[id(parameter)] for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in case.model.parameters()]
    optimizer.step(case.losses)
    assert not any(torch.equal(old, new) for old, new in zip(before, case.model.parameters(), strict=True))


def test_a_model_moved_to_another_precision_between_steps() -> None:
    """Rules known by behaviour, ways of the fallback and a kept target gradient follow."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), Scale(), nn.RMSNorm(4), nn.Linear(4, 2)))
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))

    def losses() -> Tensor:
        return model(x.to(model[0].weight.dtype)).square().sum((1, 2))  # type: ignore[union-attr,no-any-return]

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        TargetGradient(lambda: losses()[:2], refresh_every=10),
        metric="euclidean",
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        optimizer.backward(losses)
        assert optimizer.selection is not None
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses()]
        flat = torch.stack([torch.cat([g.flatten().double() for g in row]) for row in rows])
        expected = flat @ flat.T
        rtol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
        error = (optimizer.selection.gram.double() - expected).abs().max()
        assert error <= rtol * expected.max()
        optimizer.zero_grad()
