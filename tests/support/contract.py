"""The table of inner optimizers and what all of them keep: its rows, its known exceptions, and how to fill a cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights
from tests.support.models import Case, mlp
from tests.support.optimizers import INNER, MUONS, SHAMPOOS, SOAPS

FORGETFUL = "copied bare it loses the attributes that its step needs, and wrapped as well"
OUTWEIGHED = (
    "the gradient enlarges what the old momentum is divided by, and so takes more off its movement than it adds itself"
)
NULL_SPACE = "its first basis is arbitrary where the gradient has no rank: a last bit decides, and all steps follow"
OWN_STATE = "its constructor makes the state, and a group added later has none; so it is bare"
FAILS: dict[str, dict[str, str]] = {
    "sign": dict.fromkeys(["adamax", "lamb", "lamb decay", "soap one side"], OUTWEIGHED),
    "copies": dict.fromkeys(
        [name for name in INNER if "lamb" in name or name in SOAPS or name == "lion" or "of pytorch" in name]
        + [f"{name} of torch_optimizer" for name in ("AdaBelief", "AdaBound", "Ranger", "RangerQH")],
        FORGETFUL,
    ),
    "equal": dict.fromkeys(["soap", "soap of vectors too"], NULL_SPACE),
    "groups": {
        **dict.fromkeys(["soap", "soap of vectors too"], NULL_SPACE),
        "MADGRAD of torch_optimizer": OWN_STATE,
        "AdaBound of torch_optimizer": "its constructor keeps a rate for each group, and it steps none added later",
    },
    "grad scaler": dict.fromkeys(["soap", "soap of vectors too"], NULL_SPACE),
    "none": dict.fromkeys(["soap", "soap of vectors too"], NULL_SPACE),
    "accelerate": dict.fromkeys(["soap", "soap of vectors too"], NULL_SPACE),
}


REPRESENTATIVES: dict[str, str] = {
    "sgd momentum": "a scalar map",
    "adamw": "a diagonal map",
    "adamw two groups": "settings that differ between groups",
    "adafactor": "a map of rank one",
    "novograd": "a norm of the whole gradient in the step",
    "shampoo": "a Kronecker product",
    "soap one side": "a rotated diagonal",
    "muon": "a matrix whole, by its polar factor",
    "lion": "a sign",
    "schedule-free": "parameters that are not where the gradient is taken",
}
"""One row of each kind, with the kind: what runs unless all is asked for."""
assert REPRESENTATIVES.keys() - {"muon"} <= INNER.keys()  # which an older torch does not have


def rows(behaviour: str, *, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """The table's rows for one column: strict failures are marked, and as slow what stands for nothing further."""
    failing = FAILS.get(behaviour, {})

    def marks(name: str) -> list[pytest.MarkDecorator]:
        slow = [] if name in REPRESENTATIVES else [pytest.mark.slow]
        return [*slow, pytest.mark.xfail(strict=True, reason=failing[name])] if name in failing else slow

    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks(name)) for name in INNER if name not in without]
    )


def case_for(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, list[nn.Parameter]]:
    """Without gradients that are nothing but rounding, of which an optimizer that divides by their size makes steps."""
    case = mlp(dtype, 5)
    parameters = list(case.model.parameters())
    if name in MUONS:  # which takes matrices alone
        for parameter in parameters:
            parameter.requires_grad_(parameter.ndim == 2)
        parameters = [parameter for parameter in parameters if parameter.ndim == 2]
    return case, parameters


def selective(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Case, SelectiveOptimizer]:
    case, parameters = case_for(name, dtype)
    return case, SelectiveOptimizer(INNER[name](parameters), case.model, case.target_losses, **options)


def bare(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, Optimizer]:
    case, parameters = case_for(name, dtype)
    return case, INNER[name](parameters)


def everyone(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, SelectiveOptimizer]:
    """With the selection that is none."""
    return selective(name, dtype, filter=KeepAll(), weight=UniformWeights())


def plain_step(case: Case, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    case.losses().mean().backward()
    optimizer.step()


def weights_of(case: Case) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in case.model.parameters()]


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def alike(name: str, left: list[Tensor], right: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Up to the rounding that the optimizer amplifies."""
    tolerance = {"rtol": 1e-6, "atol": 1e-8}
    if name in MUONS:  # it orthogonalises in bfloat16, where a last bit of the gradient may turn one of the update
        tolerance = {"rtol": 1e-2, "atol": 1e-3}
    elif dtype == torch.float32:
        tolerance = {"rtol": 1e-3, "atol": 1e-3}
    if name in SHAMPOOS:  # roots of statistics with a condition of 1e8
        tolerance = {key: 100 * value for key, value in tolerance.items()}
    torch.testing.assert_close(left, right, **tolerance)
