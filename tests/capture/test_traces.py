"""Modules that are run again: neither they, nor a generator, nor an input shows it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights, coverage
from tests.support.capturing import captured, check_common_graph, squares
from tests.support.layers import Scale, model_with
from tests.support.models import drawn, seeded


def test_what_a_module_keeps_is_what_its_one_call_left() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.calls, self.seen = nn.Parameter(torch.linspace(0.5, 1.5, 4)), 0, []  # type: ignore[var-annotated]
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(len(x))
            self.last = x * self.scale
            self.total = self.total + self.last.detach().sum((0, 1))
            return torch.tanh(self.last)

    layer = Keeping()
    model = model_with(layer)
    captured(model, lambda: squares(model, drawn(3, 5, 3)))
    assert (layer.calls, layer.seen) == (1, [3])
    assert layer.last.shape == (3, 5, 4)
    torch.testing.assert_close(layer.total, layer.last.detach().sum((0, 1)))


@pytest.mark.parametrize("generator", ["torch", "python", "numpy"])
def test_no_generator_shows_that_a_module_was_run_again(generator: str) -> None:
    def stochastic(x: Tensor) -> Tensor:
        draws: dict[str, Callable[[], float]] = {
            "torch": lambda: float(torch.rand(())),
            "python": random.random,
            "numpy": lambda: float(np.random.rand()),
        }
        return torch.tanh(x) if draws[generator]() < 0.5 else torch.sin(x)

    for seed in range(4):
        model = model_with(Scale(function=stochastic))

        def losses() -> Tensor:
            torch.manual_seed(seed)  # noqa: B023
            random.seed(seed)  # noqa: B023
            np.random.seed(seed)  # noqa: B023
            return squares(model, drawn(3, 5, 3))  # noqa: B023

        check_common_graph(model, losses)
        after = (torch.rand(()), random.random(), np.random.rand())
        losses()
        assert after == (torch.rand(()), random.random(), np.random.rand())


@pytest.mark.parametrize("generator", ["torch", "python", "numpy"])
def test_the_target_draws_from_generators_of_its_own(generator: str) -> None:
    """As Wav2Vec2's masks do from numpy's: the candidates see those that a bare run would show them."""

    def draw() -> float:
        draws: dict[str, Callable[[], float]] = {
            "torch": lambda: float(torch.rand(())),
            "python": random.random,
            "numpy": lambda: float(np.random.rand()),
        }
        return draws[generator]()

    model = model_with(Scale())
    x = drawn(3, 5, 3)
    seen: dict[str, list[float]] = {"target": [], "candidates": []}

    def losses(kind: str) -> Tensor:
        seen[kind].append(draw())
        return seen[kind][-1] * squares(model, x)

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, lambda: losses("target"), filter=KeepAll()
    )
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    for _ in range(3):
        optimizer.step(lambda: losses("candidates"))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert seen["candidates"] == [draw() for _ in range(3)]
    assert len(set(seen["target"])) == 3


@pytest.mark.parametrize("kind", ["scale", "embedding"])
def test_looking_at_a_layer_draws_nothing_and_dropout_is_no_scale(kind: str) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x * self.weight, 0.01, self.training)

    class DroppingRows(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return functional.dropout(super().forward(input), 0.01, self.training)

    state = torch.get_rng_state()
    layer = Dropping() if kind == "scale" else DroppingRows(7, 4)
    state = torch.get_rng_state()
    assert coverage(layer)["weight"].rule == "fallback"
    assert torch.equal(torch.get_rng_state(), state)
    runs = []
    for selective in (False, True):
        first = [nn.Linear(3, 4), layer] if kind == "scale" else [layer]
        model = seeded(lambda: nn.Sequential(*first, nn.Linear(4, 2))).double()  # noqa: B023
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(drawn(*parameter.shape, seed=number))
        x = drawn(3, 5, 3) if kind == "scale" else torch.arange(15).view(3, 5) % 7
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if selective:
                optimizer = SelectiveOptimizer(
                    optimizer,
                    model,
                    lambda: squares(model, x),  # noqa: B023
                    filter=KeepAll(),
                    weight=UniformWeights(),
                )
            for _ in range(3):
                if selective:
                    optimizer.step(lambda: squares(model, x))  # noqa: B023
                else:
                    optimizer.zero_grad()
                    squares(model, x).mean().backward()
                    optimizer.step()
        runs.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


def test_an_input_that_a_module_changes_in_place_is_refused_and_changed_once() -> None:
    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x += self.shift
            return x

    model = nn.Sequential(Shifting(), nn.Linear(3, 2)).double()
    x = drawn(3, 5, 3)
    before = x.clone()
    with pytest.raises(NotImplementedError, match=r"Layer '0' changed an input in place.*x = x \+ y"):
        captured(model, lambda: squares(model, x))
    torch.testing.assert_close(x, before + 1.0)
