"""Small parameters that are alike share their operations: the same steps as without, and far fewer operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import GreedyFilter, SelectiveOptimizer, Sketch, last_blocks
from ftw_optim._factors import buckets
from ftw_optim._gram.exact import GramSums
from ftw_optim.testing import recorded
from tests.support.contract import REPRESENTATIVES
from tests.support.models import Case, SmallGPT, in_batches, language_model, seeded, trained, with_lora
from tests.support.optimizers import INNER, Build


def gpt(**options: Any) -> Case:
    return language_model(seeded(lambda: SmallGPT(**options)).double(), 5)


def run(build: Build, *, closure: Any = None, scale: float = 1.0, steps: int = 3, **options: Any) -> list[Any]:
    """What three steps select, apply and leave."""
    case = gpt()
    if isinstance(options.get("scored"), int):
        options["scored"] = last_blocks(case.model, options["scored"])
    parameters = trained(case)
    optimizer = SelectiveOptimizer(
        build(list(parameters.values())), case.model, case.target_losses, filter=GreedyFilter(keep=3), **options
    )
    found: list[Any] = []
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward((lambda: closure(case)) if closure else case.losses, grad_scale=scale)
        assert optimizer.selection is not None
        found += [optimizer.selection.gram, optimizer.selection.cross_gram, optimizer.selection.weights]
        found.append(torch.tensor(optimizer.selection.target_energy))
        found += [parameter.grad for parameter in parameters.values()]
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad /= scale
        optimizer.step()
    return [*found, *(parameter.detach() for parameter in parameters.values())]


def compare(monkeypatch: pytest.MonkeyPatch, build: Build, *, shares: bool = True, **options: Any) -> None:
    counted: list[int] = []
    add_all = GramSums.add_all
    monkeypatch.setattr(GramSums, "add_all", lambda self, one: counted.append(len(one.names)) or add_all(self, one))  # type: ignore[func-returns-value]
    together = run(build, **options)
    assert bool(counted) == shares
    monkeypatch.setattr(buckets, "SMALL", 0)
    alone = run(build, **options)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("metric", ["preconditioned", "update", "euclidean"])
@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "nadam", "adagrad maximize", "adam coupled decay"])
def test_the_same_steps_as_alone(monkeypatch: pytest.MonkeyPatch, name: str, metric: str) -> None:
    compare(monkeypatch, INNER[name], metric=metric)


@pytest.mark.filterwarnings("ignore:Lion")
@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if name not in ("soap", "muon")])
def test_every_kind_of_optimizer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    known = name in ("sgd momentum", "adamw", "adamw two groups", "schedule-free")
    compare(monkeypatch, INNER[name], shares=known, steps=2)


def one_is_not_finite(case: Case) -> Tensor:
    losses: Tensor = case.losses()
    return losses * torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0], dtype=losses.dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "scaled": {"scale": 1024.0},
    "micro-batches": {"closure": lambda case: in_batches(case, [2, 3])()},
    "a candidate that is not finite": {"closure": one_is_not_finite},
    "the last block scored, all captured": {"scored": 1, "combine": "factors"},
    "the last block scored, by the graph": {"scored": 1, "combine": "graph"},
    "memory for two of them": {"memory_limit": 2**14},
    "memory for none": {"memory_limit": 1, "shares": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_form_of_a_step(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    compare(monkeypatch, INNER["adamw"], **options)


def test_a_sketch_hashes_each_parameter_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, INNER["adamw"], shares=False, gram=Sketch(dim=64))


def test_shares_are_recorded_one_by_one() -> None:
    case = gpt()
    optimizer = SelectiveOptimizer(torch.optim.AdamW(trained(case).values(), lr=0.01), case.model, case.target_losses)
    with recorded(optimizer) as shares:
        optimizer.step(case.losses)
    assert sorted(share.name for share in shares) == sorted(trained(case))
    for share in shares:
        assert share.reference.shape == share.shape == trained(case)[share.name].shape
        assert share.preconditioner.apply(share.reference).shape == share.shape


def test_gradients_are_of_their_parameters_dtypes_where_autocast_gives_all_layers_one() -> None:
    model = seeded(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]))
    for number in (0, 2):
        model[number].bfloat16()  # type: ignore[index,operator,union-attr]
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows: Tensor = model(x)
        return rows.float().square().sum((1, 2))

    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        model,
        losses,
        scored=lambda name, parameter: name.startswith("3"),
        combine="factors",
    )
    optimizer.backward(losses)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_a_gradient_that_shares_memory_with_others_is_used_as_any(combine: str) -> None:
    """It is clipped, scaled, accumulated, zeroed and copied like one of its own."""
    case = language_model(with_lora(seeded(SmallGPT)).double(), 4)
    parameters = trained(case)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(parameters.values(), lr=0.01), case.model, case.target_losses, combine=combine
    )
    for number in range(3):
        optimizer.backward(case.losses)
        once = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
        optimizer.backward(case.losses)
        for name, before in once.items():
            grad = parameters[name].grad
            assert grad is not None
            torch.testing.assert_close(grad, 2 * before)
            grad.requires_grad_(False)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 0.1)
        first, *others = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        kept = [other.clone() for other in others]
        first.mul_(2.0)
        assert all(torch.equal(one, other) for one, other in zip(kept, others, strict=True))
        optimizer.step()
        optimizer.zero_grad(set_to_none=number % 2 == 0)
