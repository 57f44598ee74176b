"""Scalers, autocast, and parameters of half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import SelectiveOptimizer
from ftw_optim._factors.factors import weighted_sum
from tests.support.capturing import captured
from tests.support.families import case_of, model_of
from tests.support.models import SmallGPT, language_model, mlp, seeded, with_lora
from tests.support.steps import WAYS

pytestmark = pytest.mark.usefixtures("fixed_seed")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("combine", WAYS)
def test_a_grad_scaler_with_clipping_makes_the_unscaled_steps(combine: str, fused: bool) -> None:
    """In its usual place; an overflow makes it back off, and the step after is clean."""
    results = []
    for scaled in (False, True):
        case = mlp(torch.float32, 6)
        inner = torch.optim.AdamW(case.model.parameters(), lr=0.01, fused=fused)
        optimizer = SelectiveOptimizer(inner, case.model, case.target_losses, combine=combine)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            if step == 2 and scaled:  # a gradient that overflows only because of the scale
                scale = float(scaler.scale(torch.ones(())))
                optimizer.backward(lambda case=case: 1e36 * case.losses(), grad_scale=scale)
                assert optimizer.selection is not None
                assert len(optimizer.selection.rejected)
                scaler.unscale_(optimizer)
                before = [p.detach().clone() for p in case.model.parameters()]
                scaler.step(optimizer)
                scaler.update()
                torch.testing.assert_close(list(case.model.parameters()), before, rtol=0, atol=0)
                assert scaler.get_scale() == scale / 2
                optimizer.zero_grad()
            optimizer.backward(case.losses, grad_scale=scaler.scale(torch.ones(())))
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(case.model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
        results.append(list(case.model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_first_backward_may_overflow() -> None:
    """As that of every fresh GradScaler does; the self-check waits for numbers it can compare."""
    case = mlp(torch.float32, 6)
    optimizer = SelectiveOptimizer(torch.optim.SGD(case.model.parameters(), lr=0.1), case.model, case.target_losses)
    optimizer.backward(lambda: 1e36 * case.losses(), grad_scale=2.0**16)
    assert not next(case.model.parameters()).grad.isfinite().all()  # type: ignore[union-attr]
    assert not optimizer._checks._seen
    optimizer.zero_grad()
    optimizer.backward(case.losses)
    assert optimizer._checks._seen


@pytest.mark.parametrize("combine", WAYS)
def test_autocast_around_the_whole_step_stays_out_of_our_products(combine: str) -> None:
    results = []
    for whole in (False, True):
        case = language_model(seeded(SmallGPT), 4)
        inner = torch.optim.SGD(case.model.parameters(), lr=0.1)
        inside, outside = (torch.autocast("cpu", torch.bfloat16, enabled=on) for on in (True, whole))

        def cast(losses: Callable[[], Tensor], context: Any = inside) -> Tensor:
            with context:
                return losses()

        optimizer = SelectiveOptimizer(inner, case.model, lambda c=case: cast(c.target_losses), combine=combine)
        with outside:
            for _ in range(3):
                optimizer.step(lambda c=case: cast(c.losses))
        assert optimizer.selection is not None
        results.append((optimizer.selection.gram, [*case.model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combine", WAYS)
def test_half_precision_parameters_are_not_mistaken_for_uses_outside(combine: str, dtype: torch.dtype) -> None:
    for seed in range(8):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 20)
            ).to(dtype)
            ids, labels = torch.randint(20, (2, 8, 64))

        def losses(model: nn.Module = model, ids: Tensor = ids, labels: Tensor = labels) -> Tensor:
            return functional.cross_entropy(model(ids).float().mT, labels, reduction="none").mean(1)

        optimizer = SelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, losses, combine=combine)
        for _ in range(3):
            optimizer.step(losses)
        assert optimizer.selection is not None
        assert optimizer.selection.gram.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autocast", "parameters"])
@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("name", ["small-gpt", "llama", "mixtral", "mamba2", "lora"])
def test_bfloat16_is_within_its_own_rounding_of_float32(name: str, keep_graph: bool, kind: str) -> None:
    """Candidate by candidate, relative to the candidate's whole gradient."""
    if name == "small-gpt":
        model: nn.Module = seeded(lambda: SmallGPT(width=16))
    else:
        model = model_of("llama" if name == "lora" else name)
    if name == "lora":
        model = seeded(lambda: with_lora(model))
    family_name = "mamba2" if name == "mamba2" else "llama"
    exact_case = case_of(family_name, model, 4)
    exact = captured(model, exact_case.losses, keep_graph=keep_graph)
    other = copy.deepcopy(model)
    if kind == "parameters":
        other = other.bfloat16()
    case = case_of(family_name, other, 4)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return case.losses()

    found = captured(other, losses, keep_graph=keep_graph)
    assert found.keys() == exact.keys()
    for row in torch.eye(4, dtype=torch.float64):
        gradients: list[list[Tensor]] = []
        for factors in (exact, found):
            parts = [weighted_sum(uses, row, dict(model.named_parameters())[n].shape) for n, uses in factors.items()]
            assert all(part.dtype == torch.float32 for part in parts)
            gradients.append(parts)
        # Of a router a rounding may change the choice: then nothing is to be compared.
        one, two = (torch.cat([part.flatten() for part in parts]) for parts in gradients)
        if name != "mixtral":
            assert (one - two).norm() <= 0.05 * one.norm()
