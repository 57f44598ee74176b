"""The check of gradients that autograd forms: the same for parameters in buckets as for each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ftw_optim import Factors
from ftw_optim._capture.projections import verify_projection
from ftw_optim._factors.buckets import Bucket, buckets_of
from ftw_optim._factors.factors import weighted_sum
from tests.support.factors import random_factors

NAMES = ["a", "b", "c"]
WEIGHTS = torch.tensor([0.5, 0.0, 1.5, 0.25], dtype=torch.float64)


def problem(kind: str, *, terms: float | None = None) -> tuple[dict[str, list[Factors]], dict[str, Tensor]]:
    """Factors of three parameters, and the gradients that autograd would form."""
    found, gradients = {}, {}
    for seed, name in enumerate(NAMES):
        use = random_factors(kind, grid=(4, 2), rows=5, columns=3, seed=seed)
        use = replace(use, terms=None if terms is None else torch.tensor(terms, dtype=torch.float64))
        shape = torch.Size((5, 3) if kind == "dense" else (5,))
        found[name], gradients[name] = [use], weighted_sum([use], WEIGHTS, shape)
    return found, gradients


def verified(found: dict[str, list[Factors]], gradients: dict[str, Tensor], *, together: bool) -> list[bool]:
    shapes = {name: gradient.shape for name, gradient in gradients.items()}
    buckets: list[Bucket] = []
    if together:
        buckets = buckets_of(found, dict.fromkeys(found, shapes["a"]), dict.fromkeys(found, 0), limit=2**28)
        assert [list(bucket.names) for bucket in buckets] == [NAMES]
        found = {}
    generator = torch.Generator().manual_seed(0)
    flag = torch.tensor(True)
    return verify_projection(found, gradients, WEIGHTS, generator, buckets=buckets, more=[flag, ~flag])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sum"])
def test_right_gradients_pass_and_flags_come_back(kind: str, together: bool) -> None:
    found, gradients = problem(kind)
    assert verified(found, gradients, together=together) == [True, False]
    del gradients["c"]  # which the losses did not reach
    assert verified(found, gradients, together=together) == [True, False]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sum"])
@pytest.mark.parametrize("wrong", NAMES)
def test_a_wrong_gradient_is_named(wrong: str, kind: str, together: bool) -> None:
    found, gradients = problem(kind)
    gradients[wrong] = 2 * gradients[wrong]
    with pytest.raises(RuntimeError, match=rf"The captured gradients of {wrong} differ"):
        verified(found, gradients, together=together)


@pytest.mark.parametrize("together", [False, True])
def test_what_terms_that_cancelled_leave_is_no_difference(together: bool) -> None:
    """Their rounding counts, not that of their sum."""
    large = 1e9
    found, gradients = problem("sum", terms=large)
    for name in NAMES:
        gradients[name] = gradients[name] + 0.2 * large * torch.finfo(torch.float32).eps
    assert verified(found, gradients, together=together) == [True, False]
    found, _ = problem("sum")
    with pytest.raises(RuntimeError, match="The captured gradients of a, b, c differ"):
        verified(found, gradients, together=together)


def test_a_gradient_without_factors_is_named() -> None:
    found, gradients = problem("dense")
    with pytest.raises(RuntimeError, match="The captured gradients of other differ"):
        verified(found, {**gradients, "other": torch.ones(5, 3, dtype=torch.float64)}, together=True)
