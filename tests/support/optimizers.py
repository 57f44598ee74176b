"""Every supported inner optimizer, by the kind of map its step is; one table for all tests."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer
    import schedulefree
    import torch_optimizer

Build = Callable[[list[Any]], Optimizer]
SHAPE = (4, 3)


def transformers_adafactor(parameters: list[Any], **options: Any) -> Optimizer:
    from transformers import Adafactor  # here, since importing it takes seconds

    return Adafactor(parameters, **options)


def schedule_free(parameters: list[Any], **options: Any) -> Optimizer:
    optimizer: Any = schedulefree.AdamWScheduleFree(parameters, **options)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


ELEMENTWISE: dict[str, Build] = {
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
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, lambd=1e-2, weight_decay=0.1),
    "schedule-free": lambda p: schedule_free(p, lr=0.01, warmup_steps=3, weight_decay=0.1, r=1.0),
    "schedule-free for loop": lambda p: schedule_free(p, lr=0.01, betas=(0.8, 0.95), foreach=False),
    "lars": lambda p: torch_optimizer.LARS(p, lr=0.1, momentum=0.9, dampening=0.3),
    "lamb as adam": lambda p: torch_optimizer.Lamb(p, lr=0.01, adam=True, debias=True),
    "adamw two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3}, {"params": p[1:]}], lr=0.01
    ),
}
"""A rule of their own, and each entry's update follows its own gradient alone: a trial tells what the rule must say."""

NOT_EVEN: dict[str, Build] = {
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, alpha=0.9),
}
"""Likewise, but two opposite gradients give different second moments."""

ADAFACTORS: dict[str, Build] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "adafactor other decay": lambda p: torch.optim.Adafactor(p, lr=0.1, beta2_decay=-0.3),
    "adafactor of transformers": lambda p: transformers_adafactor(p, scale_parameter=True, relative_step=True, lr=None),
    "adafactor of transformers, lr": lambda p: transformers_adafactor(
        p, lr=0.01, scale_parameter=False, relative_step=False, weight_decay=0.1
    ),
    "adafactor of torch_optimizer": lambda p: torch_optimizer.Adafactor(p, lr=0.01, relative_step=False),
}
"""Their second moment couples rows and columns: opposite gradients tell, a trial entry by entry does not."""

NORMS: dict[str, Build] = {
    "novograd": lambda p: torch_optimizer.NovoGrad(p, lr=0.01),
    "novograd averaging": lambda p: torch_optimizer.NovoGrad(p, lr=0.01, grad_averaging=True, amsgrad=True),
    "lars decay": lambda p: torch_optimizer.LARS(p, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.1),
}
"""A norm of the whole gradient enters the step, the same for the opposite one."""

LAMBS: dict[str, Build] = {
    "lamb": lambda p: torch_optimizer.Lamb(p, lr=0.01),
    "lamb decay": lambda p: torch_optimizer.Lamb(p, lr=0.01, weight_decay=0.1, debias=True, clamp_value=2.0),
}
"""A norm of the whole step enters the step."""

A2GRADS: dict[str, Build] = {
    "a2grad uni": lambda p: torch_optimizer.A2GradUni(p),
    "a2grad inc": lambda p: torch_optimizer.A2GradInc(p),
    "a2grad exp": lambda p: torch_optimizer.A2GradExp(p),
}
APOLLOS: dict[str, Build] = {
    "apollo": lambda p: torch_optimizer.Apollo(p, lr=0.01, warmup=4),
    "apollo at once": lambda p: torch_optimizer.Apollo(p, lr=0.01, warmup=0),
}
"""What the whole tensor puts into the step is not even in the gradient."""

SHAMPOOS: dict[str, Build] = {
    "shampoo": lambda p: torch_optimizer.Shampoo(p, lr=0.01),
    "shampoo momentum": lambda p: torch_optimizer.Shampoo(p, lr=0.01, momentum=0.1, epsilon=0.1, update_freq=3),
}
SOAPS: dict[str, Build] = {
    "soap": lambda p: pytorch_optimizer.SOAP(p, lr=0.01),
    "soap of vectors too": lambda p: pytorch_optimizer.SOAP(
        p, lr=0.01, betas=(0.9, 0.8), precondition_1d=True, precondition_frequency=2, weight_decay=0.0
    ),
    "soap one side": lambda p: pytorch_optimizer.SOAP(
        p, lr=0.01, max_precondition_dim=3, normalize_gradient=True, correct_bias=False
    ),
}
MUONS: dict[str, Build] = {"muon": lambda p: torch.optim.Muon(p, lr=0.01)} if hasattr(torch.optim, "Muon") else {}
SIGNS: dict[str, Build] = {
    "lion": lambda p: pytorch_optimizer.Lion(p, lr=0.001, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
}

PROBED: dict[str, Build] = {
    **{
        f"{name} of torch_optimizer": (lambda p, name=name: getattr(torch_optimizer, name)(p, lr=0.01))  # type: ignore[misc]
        for name in (
            "AccSGD",
            "AdaBelief",
            "AdaBound",
            "AdaMod",
            "AggMo",
            "DiffGrad",
            "MADGRAD",
            "PID",
            "QHAdam",
            "QHM",
            "RAdam",
            "Ranger",
            "RangerQH",
            "RangerVA",
            "SGDW",
            "SWATS",
            "Yogi",
        )
    },
    **{
        f"{name} of pytorch_optimizer": (lambda p, name=name: getattr(pytorch_optimizer, name)(p, lr=0.01))  # type: ignore[misc]
        for name in ("AdamC", "AdEMAMix", "ADOPT", "Adan", "LaProp", "ScheduleFreeSGD")
    },
}

RULED = {
    **ELEMENTWISE,
    **NOT_EVEN,
    **ADAFACTORS,
    **NORMS,
    **LAMBS,
    **A2GRADS,
    **APOLLOS,
    **SHAMPOOS,
    **SOAPS,
    **MUONS,
    **SIGNS,
}
INNER: dict[str, Build] = {**RULED, **PROBED}
MAXIMIZING = {name for name in INNER if "maximize" in name or name == "adamax"}

warns_of_overloads = pytest.mark.filterwarnings("ignore:This overload of")  # of add_, which torch_optimizer still calls


def twin_of(optimizer: Optimizer) -> Optimizer:
    """A deep copy with all attributes: the optimizer's own pickling may leave some out."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(copy.deepcopy(optimizer.__dict__))
    return twin


def warmed_up(build: Build, steps: int, shape: tuple[int, ...] = SHAPE) -> tuple[Optimizer, nn.Parameter]:
    """After some steps with random gradients in float64; the first of its two parameters with it."""
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for _ in range(2)]
    optimizer = build(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        optimizer.step()
    return optimizer, parameters[0]


def update_of(optimizer: Optimizer, gradient: Tensor, *, probe: bool = False) -> Tensor:
    """What one step with ``gradient`` adds to the first parameter, tried on a copy.

    A ``probe`` asks for the map of the gradient alone: coupled decay is switched off, a step uphill turned round.
    """
    twin = twin_of(optimizer)
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


def movement(optimizer: Any) -> tuple[float, float]:
    """Along the combined gradient in ``.grad``: what ``P`` predicts of the coming step, and what the step does.

    Beyond what the step would do at a gradient of zero, on copies; both positive where the step goes downhill.
    """
    from ftw_optim import preconditioner_of

    inner: Optimizer = optimizer.optimizer
    parameters = [p for group in inner.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad.clone() for p in parameters]
    predicted = sum(
        float((preconditioner_of(optimizer, p, g).apply(g) * g).sum())
        for p, g in zip(parameters, gradients, strict=True)
    )
    moves = []
    for factor in (0.0, 1.0):
        memo: dict[int, Any] = {}
        twins = [copy.deepcopy(p, memo) for p in parameters]
        twin: Optimizer = object.__new__(type(inner))
        twin.__dict__.update(copy.deepcopy(inner.__dict__, memo))
        for p, gradient in zip(twins, gradients, strict=True):
            p.grad = factor * gradient
        twin.step()
        moves.append([p.detach() - start.detach() for p, start in zip(twins, parameters, strict=True)])
    realised = sum(float(((still - one) * g).sum()) for still, one, g in zip(*moves, gradients, strict=True))
    return predicted, realised
