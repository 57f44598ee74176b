"""Optimizers that keep their state in few bits: the map is that of the dequantised state."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim import GreedyFilter, SelectiveOptimizer, preconditioner_of

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Paged optimizers"
)

SHAPE = (64, 96)  # more than the 4096 entries below which both libraries keep float32

Build = Callable[[list[Any]], Optimizer]


def bitsandbytes(name: str, **options: Any) -> Build:
    def build(parameters: list[Any]) -> Optimizer:
        module = pytest.importorskip("bitsandbytes")
        optimizer: Optimizer = getattr(module.optim, name)(parameters, lr=0.01, **options)
        return optimizer

    return build


def torchao(name: str, **options: Any) -> Build:
    def build(parameters: list[Any]) -> Optimizer:
        if shutil.which("g++") is None:
            pytest.skip("its step is compiled")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = pytest.importorskip("torchao.optim")
        optimizer: Optimizer = getattr(module, name)(parameters, lr=0.01, **options)
        return optimizer

    return build


ADAMS: dict[str, Build] = {
    "bitsandbytes Adam8bit": bitsandbytes("Adam8bit"),
    "bitsandbytes AdamW8bit": bitsandbytes("AdamW8bit", weight_decay=0.1),
    "bitsandbytes AdamW": bitsandbytes("AdamW"),
    "bitsandbytes PagedAdamW32bit": bitsandbytes("PagedAdamW32bit"),  # not paged on a CPU
    "torchao AdamW8bit": torchao("AdamW8bit", weight_decay=0.1),
    "torchao AdamW4bit": torchao("AdamW4bit"),
    "torchao Adam8bit": torchao("Adam8bit", weight_decay=0.1),
}
LIONS: dict[str, Build] = {
    "bitsandbytes Lion8bit": bitsandbytes("Lion8bit"),
    "bitsandbytes Lion": bitsandbytes("Lion"),
}


def warmed_up(build: Build, steps: int) -> tuple[Optimizer, nn.Parameter, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(SHAPE, generator=generator))
    optimizer = build([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(SHAPE, generator=generator)
        optimizer.step()
    return optimizer, parameter, generator


def update_of(build: Build, steps: int, gradient: Tensor) -> Tensor:
    """Of the step after the first ones, its parameter put to zero, so that its digits swamp nothing."""
    optimizer, parameter, _ = warmed_up(build, steps)  # some states cannot be copied
    parameter.data.zero_()
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("build", ADAMS.values(), ids=ADAMS)
def test_opposite_gradients_move_by_the_map_of_the_dequantised_state(build: Build, steps: int) -> None:
    optimizer, parameter, generator = warmed_up(build, steps)
    reference = torch.randn(SHAPE, generator=generator)
    reference = reference.sign() * reference.abs().clamp(min=0.1)  # above the floor
    odd = (update_of(build, steps, reference) - update_of(build, steps, -reference)) / 2
    parameter.data.zero_()  # coupled decay would enter the second moment
    moved = preconditioner_of(optimizer, parameter, reference).apply(reference)
    torch.testing.assert_close(-odd, moved, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("build", LIONS.values(), ids=LIONS)
def test_lions_sign_is_its_map_of_the_dequantised_momentum(build: Build, steps: int) -> None:
    optimizer, parameter, generator = warmed_up(build, steps)
    reference = torch.randn(SHAPE, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = preconditioner_of(optimizer, parameter, reference)
    values = moved.apply(torch.ones(SHAPE))
    assert values.isfinite().all()
    size = 0.01 * (1 - optimizer.param_groups[0]["betas"][0]) / values  # what the sign was taken of
    taken = update_of(build, steps, reference)
    whole = -taken.sign() * size
    assert taken.abs().max() == pytest.approx(0.01)
    if steps == 0:
        torch.testing.assert_close(whole, 0.1 * reference, rtol=1e-4, atol=0.004)
    else:
        assert float((whole * reference).mean()) > 0


@pytest.mark.filterwarnings("ignore:Lion")
@pytest.mark.parametrize("build", (ADAMS | LIONS).values(), ids=ADAMS | LIONS)
def test_a_selective_run_goes_down(build: Build) -> None:
    generator = torch.Generator().manual_seed(2)
    model = nn.Linear(*SHAPE, bias=False)
    inputs, wanted = torch.randn(12, SHAPE[0], generator=generator), torch.randn(12, SHAPE[1], generator=generator)

    def losses(rows: slice) -> Tensor:
        return (model(inputs[rows]) - wanted[rows]).square().mean(1)

    optimizer = SelectiveOptimizer(
        build(list(model.parameters())), model, lambda: losses(slice(8, 12)), filter=GreedyFilter(keep=3)
    )
    start = losses(slice(8, 12)).mean().item()
    for _ in range(5):
        optimizer.step(lambda: losses(slice(0, 12)))
        assert optimizer.selection is not None
        assert not optimizer.selection.skipped
    assert losses(slice(8, 12)).mean().item() < start
