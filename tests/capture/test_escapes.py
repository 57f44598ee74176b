"""What leaves a layer by another way than its outputs: right, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights
from ftw_optim._capture.self_check import SelfChecks
from tests.support.capturing import captured, check_common_graph, squares
from tests.support.layers import Scale, model_with
from tests.support.models import drawn, seeded


class Policy(nn.Module):
    """Its output is an object that no pytree knows, with the parameter inside."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Any:
        return torch.distributions.Normal(self.mean(x), self.log_std.exp())


class Router(nn.Module):
    """Keeps what an auxiliary loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.linspace(-1, 1, 8).view(4, 2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.logits = x @ self.weight + self.shift
        self.penalty = (self.weight**4).sum()
        return self.logits.softmax(-1)


class Penalised(nn.Module):
    """From some step on, the loss has a gradient penalty: the weights are read by a double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.on = nn.Linear(3, 4), nn.Linear(4, 2), False

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.tanh(self.first(x)))
        if self.on:
            given = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.last(torch.tanh(self.first(given))).sum(), given, create_graph=True)
            scores = scores + slope.square().sum(-1, keepdim=True)
        return scores


class Reparametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional_call(self.first, {"weight": 2 * self.first.weight}, (x,))
        scores: Tensor = self.last(hidden)
        return scores


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_parameter_in_an_output_that_cannot_be_looked_into(keep_graph: bool, self_check: bool) -> None:
    model = seeded(Policy).double()
    options = {"keep_graph": keep_graph, "self_check": self_check}
    with pytest.raises(RuntimeError, match=r"Expected log_std to be used only.*an object that is no pytree"):
        captured(model, lambda: -model(drawn(3, 3)).log_prob(drawn(3, 2)).sum(1), **options)


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("what", ["logits", "penalty"])
def test_an_intermediate_that_leaves_by_an_attribute(what: str, self_check: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Router(), nn.Linear(2, 2)).double()
    router: Any = model[1]
    x, checks = drawn(3, 5, 3), SelfChecks()
    captured(model, lambda: squares(model, x), self_check=self_check)

    def losses() -> Tensor:
        main = squares(model, x)
        return main + (router.logits.logsumexp(-1).mean(1) if what == "logits" else router.penalty)

    with pytest.raises(RuntimeError, match=r"Expected 1\.weight.* to be used only"):
        captured(model, losses, self_check=self_check)
    assert checks.due([("never",)])


@pytest.mark.parametrize("self_check", [True, False])
def test_a_gradient_penalty_that_starts_later(self_check: bool) -> None:
    model = seeded(Penalised).double()
    captured(model, lambda: squares(model, drawn(3, 3)), self_check=self_check)
    model.on = True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"first\.weight.* to be used only"):
        captured(model, lambda: squares(model, drawn(3, 3)), self_check=self_check)


def test_a_layer_that_is_called_with_something_in_its_weights_place() -> None:
    model = seeded(Reparametrised).double()
    with pytest.raises(NotImplementedError, match=r"Expected first\.weight in layer 'first'.*functional_call"):
        captured(model, lambda: squares(model, drawn(3, 3)))


def test_a_weight_that_is_rebound_in_forward_stays_rebound() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = functional.normalize(self.weight.data)
            return x @ self.weight.T + self.bias

    model = seeded(lambda: nn.Sequential(Normalised(), nn.Linear(4, 2))).double()
    check_common_graph(model, lambda: squares(model, drawn(3, 5, 3)))
    torch.testing.assert_close(model[0].weight.norm(dim=1), torch.ones(4, dtype=torch.float64))  # type: ignore[operator,union-attr]


def test_a_closure_may_use_the_gradients_of_its_own_backward() -> None:
    """Clipping inside a closure that runs its own backward sees what a bare run sees."""
    norms = []
    for selective in (False, True):
        model = model_with(Scale())
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer: Any = inner
        if selective:
            optimizer = SelectiveOptimizer(inner, model, lambda: squares(model, drawn(2, 5, 3)))  # noqa: B023

        def closure() -> Tensor:
            inner.zero_grad()  # noqa: B023
            loss = squares(model, drawn(3, 5, 3)).mean()  # noqa: B023
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3))  # noqa: B023
            return loss

        if selective:
            with pytest.warns(UserWarning, match="ran its own backward"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        norms.append(nn.utils.get_total_norm(p.detach() for p in model.parameters()))
    torch.testing.assert_close(norms[:2], norms[2:])


def test_outputs_that_share_memory_may_not_be_changed_in_place() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            scaled = x * self.scale
            return scaled, scaled, x, scaled[..., :2]

    class Model(nn.Module):
        def __init__(self, *, in_place: bool) -> None:
            super().__init__()
            self.first, self.several, self.last, self.in_place = nn.Linear(3, 4), Several(), nn.Linear(4, 2), in_place

        def forward(self, x: Tensor) -> Tensor:
            one, two, three, four = self.several(self.first(x))
            two = two.mul_(3.0) if self.in_place else 3.0 * two
            scores: Tensor = self.last(one + two + three) + four
            return scores

    model = seeded(lambda: Model(in_place=False)).double()
    check_common_graph(model, lambda: squares(model, drawn(3, 5, 3)))
    model = seeded(lambda: Model(in_place=True)).double()
    with pytest.raises(RuntimeError, match="Layer 'several' returned tensors that share memory"):
        captured(model, lambda: squares(model, drawn(3, 5, 3)))


class Recomputed(torch.autograd.Function):
    """Runs a layer again in its backward, and a backward pass through it there, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            y: Tensor = layer(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(grads[0])
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(Recomputed.apply(self.first(x), self.middle).tanh())
        return scores


@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_a_backward_inside_of_a_backward_is_refused_and_leaves_no_gradient(
    combine: str, held: bool, self_check: bool
) -> None:
    """In the candidates' pass, and in the target's."""
    model, x = seeded(Reversible).double(), drawn(4, 5, 3)
    before = None if not held else drawn(3, 3)
    model.middle.weight.grad = before
    for through in (lambda: squares(model, x[:2]), lambda: squares(model.last, x[:2])):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            through,
            combine=combine,
            metric="euclidean",
            self_check=self_check,
        )
        with pytest.raises(NotImplementedError, match=r"another one inside of it, from which middle\.weight"):
            optimizer.backward(lambda rows=slice(None): squares(model, x[rows]))
        assert model.middle.weight.grad is before
        assert all(p.grad is None for p in (model.first.weight, model.middle.bias, model.last.weight))


class Hooked(Reversible):
    """A backward of a loss of its own in a hook."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.requires_grad:
            hidden.register_hook(self._penalise(hidden.detach()))
        scores: Tensor = self.last(hidden.tanh())
        return scores

    def _penalise(self, hidden: Tensor) -> Any:
        @torch.enable_grad()
        def hook(gradient: Tensor) -> None:
            self.middle(hidden).square().sum().backward()

        return hook


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_a_backward_in_a_hook_is_refused_and_leaves_no_gradient(combine: str) -> None:
    model, x = seeded(Hooked).double(), drawn(4, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: squares(model, x[:2]),
        combine=combine,
        metric="euclidean",
    )
    with pytest.raises(NotImplementedError, match=r"another one inside of it, from which middle\.weight"):
        optimizer.backward(lambda rows=slice(None): squares(model, x[rows]))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("combine", ["graph", "rerun"])
def test_a_backward_inside_of_a_backward_is_right_below_what_is_scored(combine: str) -> None:
    model, x = seeded(Reversible).double(), drawn(4, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: squares(model, x[:2]),
        combine=combine,
        filter=KeepAll(),
        weight=UniformWeights(),
        scored=lambda name, _: name.startswith("last"),
    )
    optimizer.backward(lambda rows=slice(None): squares(model, x[rows]))
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    squares(model, x).mean().backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()})


def test_a_function_of_ones_own_without_a_backward_inside() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    class Model(Reversible):
        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.last(Doubled.apply(self.middle(self.first(x))))
            return scores

    model, x = seeded(Model).double(), drawn(4, 5, 3)
    check_common_graph(model, lambda: squares(model, x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", [0, None], ids=["a layer", "the model"])
def test_copies_that_a_closure_makes_are_copies_alone(part: int | None, when: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).double()
    copied = model if part is None else model[part]
    x, copies = drawn(4, 3), []

    def losses() -> Tensor:
        if when == "before":
            copies.append(copy.deepcopy(copied))
        rows: Tensor = model(x).square().sum(1)
        if when == "after":
            copies.append(copy.deepcopy(copied))
        return rows

    optimizer = SelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, losses, filter=KeepAll())
    optimizer.step(losses)
    optimizer.zero_grad()
    kept = copies[0]  # of the step before: no part of this one
    optimizer.backward(lambda: losses() + kept(x).sum(1).detach())
    selection = optimizer.selection
    assert selection is not None
    expected = torch.autograd.grad(selection.spread_weights() @ losses(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_copy_that_is_called_where_it_was_made_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def losses() -> Tensor:
        rows: Tensor = model(x).square().sum(1)
        return rows + copy.deepcopy(model[0])(x).sum(1)

    optimizer = SelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: model(x).square().sum(1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=r"got a copy of one \(Linear\) that was made while the closure ran"):
        optimizer.step(losses)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
