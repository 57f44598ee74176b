"""Preconditioner rules against two steps on a copy of the optimizer: what it does is what the rule must say."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim import Diagonal, Preconditioner, Scalar, preconditioner_of, register_preconditioner
from ftw_optim._preconditioners.look_ahead import FLOOR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_optimizer

SHAPE = (4, 3)


def transformers_adafactor(parameters: list[Any], **options: Any) -> Optimizer:
    from transformers import Adafactor  # here, since importing it takes seconds

    return Adafactor(parameters, **options)


pytestmark = pytest.mark.filterwarnings("ignore:This overload of")  # of add_, which torch_optimizer still calls

OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "sgd tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1, dtype=torch.float64)),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95)),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, betas=(0.8, 0.9)),
    "adam coupled decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3),
    "adam decoupled": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True),
    "adam large eps": lambda p: torch.optim.Adam(p, lr=0.01, eps=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw maximize": lambda p: torch.optim.AdamW(p, lr=0.01, maximize=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, dtype=torch.float64)),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "nadam decoupled": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01, betas=(0.8, 0.95)),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01, maximize=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2),
    "adagrad maximize": lambda p: torch.optim.Adagrad(p, lr=0.1, maximize=True, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "adafactor other decay": lambda p: torch.optim.Adafactor(p, lr=0.1, beta2_decay=-0.3),
    "adafactor of transformers": lambda p: transformers_adafactor(p, scale_parameter=True, relative_step=True, lr=None),
    "adafactor of transformers, lr": lambda p: transformers_adafactor(
        p, lr=0.01, scale_parameter=False, relative_step=False, weight_decay=0.1
    ),
    "adafactor of torch_optimizer": lambda p: torch_optimizer.Adafactor(p, lr=0.01, relative_step=False),
    "novograd": lambda p: torch_optimizer.NovoGrad(p, lr=0.01),
    "novograd averaging": lambda p: torch_optimizer.NovoGrad(p, lr=0.01, grad_averaging=True, amsgrad=True),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, lambd=1e-2, weight_decay=0.1),
    "adamw two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3}, {"params": p[1:]}], lr=0.01
    ),
}


def warmed_up(build: Callable[[list[Any]], Optimizer], steps: int) -> tuple[Optimizer, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(SHAPE, dtype=torch.float64, generator=generator)) for _ in range(2)]
    optimizer = build(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
        optimizer.step()
    return optimizer, parameters[0]


def update_of(optimizer: Optimizer, gradient: Tensor, *, probe: bool = False) -> Tensor:
    """What one step with ``gradient`` adds to the first parameter, tried on a copy.

    A ``probe`` asks for the map of the gradient alone: coupled decay is switched off, a step uphill turned round.
    """
    twin = copy.deepcopy(optimizer)
    if probe:
        for group in twin.param_groups:
            group["weight_decay"] = 0.0
            group["maximize"] = False
    first = twin.param_groups[0]["params"][0]
    before = first.detach().clone()
    for parameter in (p for group in twin.param_groups for p in group["params"]):
        parameter.grad = gradient.clone()
    twin.step()
    return first.detach() - before


# NovoGrad's second moment has no memory by default: at a gradient of zero nothing of it is frozen.
@pytest.mark.parametrize("steps", [0, 1, 5, 50])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "novograd" not in name])
def test_rule_is_the_slope_of_the_update_at_a_frozen_second_moment(name: str, steps: int) -> None:
    """At zero gradient the second moment's own slope is zero, so two steps tell the frozen map."""
    optimizer, parameter = warmed_up(OPTIMIZERS[name], steps)
    # An Adam without history jumps from 0 to 1 / (1 + eps / |g|): only far below eps is it linear.
    small = 1e-22 if steps == 0 else 1e-8
    gradient = small * torch.linspace(1, 2, 12, dtype=torch.float64).view(SHAPE)
    slope = update_of(optimizer, torch.zeros(SHAPE, dtype=torch.float64), probe=True) - update_of(
        optimizer, gradient, probe=True
    )
    if steps == 0:
        # The parameter's own rounding would swamp the update of a gradient this small.
        optimizer = copy.deepcopy(optimizer)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].zero_()
        slope = -update_of(optimizer, gradient, probe=True)
        parameter = optimizer.param_groups[0]["params"][0]
    moved = preconditioner_of(optimizer, parameter).apply(gradient)
    torch.testing.assert_close(slope, moved, rtol=1e-5, atol=0 if steps == 0 else 1e-15)


@pytest.mark.parametrize("steps", [0, 1, 5, 50])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_reference_enters_the_second_moment_as_the_coming_step_lets_it(
    build: Callable[[list[Any]], Optimizer], steps: int
) -> None:
    """The second moment is even in the gradient, so half the difference of two opposite steps is ``-P(r) r``."""
    optimizer, parameter = warmed_up(build, steps)
    for group in optimizer.param_groups:
        group["weight_decay"], group["maximize"] = 0.0, False
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE)  # all above the floor
    odd = (update_of(optimizer, reference) - update_of(optimizer, -reference)) / 2
    moved = preconditioner_of(optimizer, parameter, reference).apply(reference)
    torch.testing.assert_close(-odd, moved, rtol=1e-6, atol=1e-14)


def test_coupled_decay_and_maximize_enter_the_second_moment_with_the_reference() -> None:
    """Adam squares ``-gradient + decay * parameter`` when it maximizes."""
    optimizer, parameter = warmed_up(
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3, maximize=True, eps=1e-8), 0
    )
    reference = torch.full(SHAPE, 0.7, dtype=torch.float64)
    expected = 0.01 / ((0.3 * parameter.detach() - reference).abs() + 1e-8)
    values = preconditioner_of(optimizer, parameter, reference)
    assert isinstance(values, Diagonal)
    torch.testing.assert_close(values.values, expected)


def test_entries_without_history_are_floored_at_a_share_of_the_references_size() -> None:
    optimizer, parameter = warmed_up(OPTIMIZERS["adamw"], 0)
    reference = torch.zeros(SHAPE, dtype=torch.float64)
    reference[0] = torch.tensor([3.0, 4.0, 1e-9])
    size = (reference.square().sum() / 3).sqrt()
    expected = 0.01 / (reference.abs().clamp(min=float(FLOOR * size)) + 1e-8)
    values = preconditioner_of(optimizer, parameter, reference)
    assert isinstance(values, Diagonal)
    torch.testing.assert_close(values.values, expected)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_preconditioned_gradients_are_finite_in_float32_at_any_scale(scale: float, steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    parameter = nn.Parameter(torch.randn(SHAPE, generator=generator))
    optimizer = torch.optim.AdamW([parameter], lr=0.01)
    for _ in range(steps):
        parameter.grad = scale * torch.randn(SHAPE, generator=generator)
        optimizer.step()
    gradients = scale * torch.randn(5, *SHAPE, generator=generator)
    gradients[:, 1] = 0.0
    moved = preconditioner_of(optimizer, parameter, gradients.mean(0)).apply(gradients)
    assert moved.isfinite().all()
    assert (moved != 0).sum() == (gradients != 0).sum()
    assert (moved * gradients).sum().isfinite()


def test_a_learning_rate_of_zero_everywhere_counts_as_one() -> None:
    optimizer, parameter = warmed_up(OPTIMIZERS["adamw two groups"], 5)
    expected = [(0.0, 0.0, 1.0), (0.0, 0.5, 0.0), (0.25, 0.5, 0.25)]
    for first, second, counted in expected:
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 1.0, 1.0
        one = preconditioner_of(optimizer, parameter)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = first, second
        values = preconditioner_of(optimizer, parameter)
        assert isinstance(one, Diagonal)
        assert isinstance(values, Diagonal)
        torch.testing.assert_close(values.values, counted * one.values)


def test_errors_name_the_optimizer_and_the_way_out() -> None:
    parameter = nn.Parameter(torch.zeros(SHAPE))
    with pytest.raises(NotImplementedError, match=r"No preconditioner is known for .*Rprop.*@register_precond"):
        preconditioner_of(torch.optim.Rprop([parameter]), parameter)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with pytest.raises(ValueError, match="none of the optimizer's groups"):
        preconditioner_of(optimizer, nn.Parameter(torch.zeros(SHAPE)))
    with pytest.raises(ValueError, match=r"Expected a reference of shape \(4, 3\)"):
        preconditioner_of(optimizer, parameter, torch.zeros(3))


def test_a_third_party_registers_its_optimizer_and_subclasses_with_another_step_are_tried_out() -> None:
    class SignFree(torch.optim.SGD):
        """Same update, so the rule of SGD holds."""

    class Doubled(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            super().step(closure)

    parameter = nn.Parameter(torch.zeros(SHAPE))
    inherited = preconditioner_of(SignFree([parameter], lr=0.1), parameter)
    assert isinstance(inherited, Scalar)
    assert inherited.value == 0.1
    tried = preconditioner_of(Doubled([parameter], lr=0.1), parameter)
    torch.testing.assert_close(tried.apply(torch.ones(SHAPE)), torch.full(SHAPE, 0.2))

    @register_preconditioner(Doubled)
    def doubled(
        param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None
    ) -> Preconditioner:
        return Scalar(2 * group["lr"])

    found = preconditioner_of(Doubled([parameter], lr=0.1), parameter)
    assert isinstance(found, Scalar)
    assert found.value == 0.2


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("steps", [0, 5])
def test_muons_update_is_its_map_of_what_it_orthogonalises(
    steps: int, shape: tuple[int, int], nesterov: bool, adjust: str | None
) -> None:
    """The frozen inverse root, applied to the momentum itself, is the polar factor that Newton-Schulz comes near."""
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))
    optimizer = torch.optim.Muon([parameter], lr=0.01, weight_decay=0.0, nesterov=nesterov, adjust_lr_fn=adjust)
    # Orthogonal directions of like size, so that the polar factor is no matter of taste.
    base = torch.linalg.qr(torch.randn(max(shape), min(shape), dtype=torch.float64, generator=generator))[0]
    base = base if shape[0] >= shape[1] else base.T
    for step in range(steps):
        parameter.grad = base * (1.0 + 0.1 * step)
        optimizer.step()
    reference = base * 0.8
    floored = torch.where(reference < 0, -1.0, 1.0) * reference.abs().clamp(
        min=FLOOR * float(reference.square().sum() / reference.count_nonzero()) ** 0.5
    )
    moved = preconditioner_of(optimizer, parameter, reference)
    # All of the momentum is along the base, so its share in what is orthogonalised is known.
    state = optimizer.state[parameter]["momentum_buffer"].clone() if steps else torch.zeros(shape, dtype=torch.float64)
    buffer = state.lerp(floored, 0.05)
    whole = floored.lerp(buffer, 0.95) if nesterov else buffer
    share = 0.05 * 1.95 if nesterov else 0.05
    expected = update_of(optimizer, reference)
    predicted = -moved.apply(whole) / share
    cosine = float((expected * predicted).sum() / expected.norm() / predicted.norm())
    assert cosine > 0.98
    assert 0.6 < float(expected.norm() / predicted.norm()) < 1.3
    # Linear, symmetric and positive.
    one, two = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close((one * moved.apply(two)).sum(), (two * moved.apply(one)).sum())
    assert float((one * moved.apply(one)).sum()) > 0
