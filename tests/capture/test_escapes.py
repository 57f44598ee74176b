"""What leaves a layer by another way than its outputs, or leaves something behind: right, or refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights, coverage
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._factors.factors import weighted_sum
from tests.capture.test_capture import captured, check_every_candidate, rows_of
from tests.capture.test_fallback import Scale, drawn, model_with
from tests.step.test_training import check_common_graph
from tests.support.models import seeded


def squares(model: nn.Module, x: Tensor) -> Tensor:
    values: Tensor = model(x).square().flatten(1).sum(1)
    return values


# ---------------------------------------------------------------------- past the outputs of a layer


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


# ---------------------------------------------------------------------- what running again could leave behind


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


# ---------------------------------------------------------------------- what a check has seen once


def test_a_check_of_one_candidate_vouches_for_no_more() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, t = x.shape[:2]
            hidden = self.layer(x.transpose(0, 1).flatten(0, 1)).view(t, n, 4).transpose(0, 1)
            scores: Tensor = self.last(torch.tanh(hidden))
            return scores

    model = seeded(Folded).double()
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, lambda: squares(model, drawn(2, 5, 3))
    )
    optimizer.step(lambda: squares(model, drawn(1, 5, 3)))
    scale = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Self-check.*layer\.weight"):
        optimizer.step(lambda: (squares(model, drawn(3, 5, 3)) + 1.0).log() * scale)


def test_a_check_without_gradients_vouches_for_nothing() -> None:
    """Behind a gate that is shut at first, as LoRA's A is behind its B."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate, self.last = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
            nn.init.zeros_(self.gate.weight)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.inner(x.flip(0)).flip(0)  # rows in another order
            scores: Tensor = self.last(x + self.gate(mixed))
            return scores

    model = seeded(Gated).double()
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=torch.float64)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: squares(model, drawn(2, 5, 3)),
        filter=KeepAll(),
        weight=UniformWeights(),
    )

    def losses() -> Tensor:
        return (squares(model, drawn(4, 5, 3)) + 1.0).log() * scale

    # The gate itself gets the gradients of mixed rows from the start.
    with pytest.raises(RuntimeError, match=r"Self-check.*(gate|inner)\.weight"):
        _steps(optimizer, losses, 3)


def _steps(optimizer: SelectiveOptimizer, losses: Callable[[], Tensor], count: int) -> None:
    for _ in range(count):
        optimizer.step(losses)


@pytest.mark.parametrize("kinds", ["threshold", "size"])
def test_another_way_is_taken_when_the_usual_one_gives_something_else(kinds: str) -> None:
    def batchwide(x: Tensor) -> Tensor:
        if kinds == "size":
            return torch.tanh(x) if len(x) <= 3 else torch.sin(x)
        return x / x.abs().max().detach() * 2 if x.abs().max() > 4 else x

    model = model_with(Scale(function=batchwide))
    for n, size in ((3, 0.1), (4, 9.0), (3, 0.1), (2, 30.0)):
        check_common_graph(model, lambda: squares(model, size * drawn(n, 5, 3)))  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_are_nothing_but_rounding_are_no_false_alarm(seed: int, dtype: torch.dtype) -> None:
    """Of a bias before a normalisation."""
    torch.manual_seed(seed)
    with torch.random.fork_rng():
        model = nn.Sequential(
            nn.Conv1d(3, 4, 3),
            nn.ConvTranspose1d(4, 4, 3),
            nn.InstanceNorm1d(4, affine=True),
            nn.InstanceNorm1d(4, affine=True),
            nn.Flatten(),
            nn.Linear(4 * 5, 2),
        ).to(dtype)
    captured(model, lambda: squares(model, drawn(3, 3, 5).to(dtype)))


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_another_order_are_found_out_in_a_small_part_of_a_large_model(dtype: torch.dtype, combine: str) -> None:
    """A parameter whose gradient is a thousandth of all is checked by its own size, in bfloat16 too."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.last = nn.Linear(3, 2), nn.Linear(2, 2)
            self.small = Scale(2, function=lambda x: x.sin())

        def forward(self, x: Tensor) -> Tensor:
            # As of experts that come first: rows are read as folded, and are not in the order of candidates.
            mixed = self.small(x[..., :2].transpose(0, 1).flatten(0, 1).contiguous())
            mixed = mixed.view(x.shape[1], len(x), 2).transpose(0, 1)
            scores: Tensor = self.last(1e3 * self.large(x) + mixed)
            return scores

    model = seeded(Sorted).to(dtype)
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=dtype)
    x = drawn(4, 6, 3).to(dtype)

    def losses() -> Tensor:
        return (squares(model, x).float() + 1.0).log() * scale

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, lambda: squares(model, x[:2]), combine=combine
    )
    with pytest.raises(RuntimeError, match=r"Self-check.*small\.scale"):
        optimizer.step(losses)


@pytest.mark.parametrize("inside", ["own parameter", "child"])
def test_a_module_with_a_reentrant_checkpoint_inside_is_run_again_without_it(inside: str) -> None:
    class Wrapping(nn.Module):
        def __init__(self, *, checkpointed: bool) -> None:
            super().__init__()
            self.gate, self.child, self.checkpointed = (
                nn.Parameter(torch.full((4,), 0.7)),
                nn.Linear(4, 4),
                checkpointed,
            )

        def forward(self, x: Tensor) -> Tensor:
            def body(x: Tensor) -> Tensor:
                return torch.tanh(self.child(x)) * (self.gate if inside == "own parameter" else 1.0)

            hidden: Tensor = checkpoint(body, x, use_reentrant=True) if self.checkpointed else body(x)
            return hidden if inside == "own parameter" else hidden * self.gate

    plain, wrapped = (model_with(seeded(lambda: Wrapping(checkpointed=c))) for c in (False, True))  # noqa: B023
    expected, found = (captured(model, lambda: squares(model, drawn(3, 5, 3))) for model in (plain, wrapped))  # noqa: B023
    for name, parameter in plain.named_parameters():
        for row in torch.eye(3, dtype=torch.float64):
            one, other = (weighted_sum(uses[name], row, parameter.shape) for uses in (expected, found))
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_one_candidate_that_is_not_finite_leaves_the_others_theirs() -> None:
    """Where the whole batch has to run again, since masks were drawn."""
    model = model_with(Scale(function=lambda x: functional.dropout(x.exp(), 0.3)))
    x = drawn(3, 5, 3)
    x[1, 0, 0] = torch.inf
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = captured(model, lambda: squares(model, x))
    assert [bool(row.isfinite().all()) for row in found["1.scale"][0].left] == [True, False, True]


# ---------------------------------------------------------------------- candidates that are hard to see


def test_prompts_expanded_by_the_model_itself() -> None:
    class Prompts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))

        def forward(self, rows: int) -> Tensor:
            return torch.tanh(self.table.expand(rows, -1, -1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.prompts, self.last = nn.Linear(3, 3), Prompts(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.last(torch.tanh(self.first(torch.cat([self.prompts(len(x)), x], dim=1))))
            return scores

    for frozen in (False, True):
        model = seeded(Model).double()
        model.first.requires_grad_(not frozen)  # type: ignore[operator,union-attr]
        model.last.requires_grad_(not frozen)  # type: ignore[operator,union-attr]
        x = drawn(3, 5, 3)
        check_every_candidate(model, lambda rows: squares(model, rows_of(x, rows)), 3)  # noqa: B023


@pytest.mark.parametrize("t", [3, 4, 5])
def test_labels_and_contexts_where_there_are_as_many_positions_as_candidates(t: int) -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.labels, self.first, self.last = nn.Embedding(7, 4), nn.Linear(3, 4), nn.Linear(4, 2)
            self.middle = Scale(function=lambda x: torch.tanh(x) * self.context)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            self.context = x[..., :1]
            scores: Tensor = self.last(self.middle(self.first(x) + self.labels(labels)[:, None]))
            return scores

    model = seeded(Conditioned).double()
    x, labels = drawn(4, t, 3), torch.tensor([1, 1, 3, 0])
    check_common_graph(model, lambda: model(x, labels).square().sum((1, 2)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_positions_looked_up_inside_of_a_checkpoint(reentrant: bool) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.first, self.last = nn.Embedding(9, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, *, plain: bool = False) -> Tensor:
            def block(hidden: Tensor) -> Tensor:
                return torch.tanh(self.first(hidden + self.positions(torch.arange(hidden.shape[1]))))

            hidden = block(x) if plain else checkpoint(block, x, use_reentrant=reentrant)
            scores: Tensor = self.last(hidden)
            return scores

    model = seeded(Inside).double()
    x = drawn(3, 5, 3).requires_grad_()
    found = captured(model, lambda: model(x).square().sum((1, 2)))
    expected = captured(model, lambda: model(x, plain=True).square().sum((1, 2)))
    for name, parameter in model.named_parameters():
        for row in torch.eye(3, dtype=torch.float64):
            torch.testing.assert_close(
                weighted_sum(found[name], row, parameter.shape), weighted_sum(expected[name], row, parameter.shape)
            )
    for combine in ("factors", "graph"):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: squares(model, x[:2]), combine=combine
        )
        optimizer.step(lambda: squares(model, x))


def test_a_parameter_shared_by_a_linear_layer_and_a_module_run_again() -> None:
    class Reads(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x @ self.weight)

    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(linear, nn.Tanh(), Reads(linear.weight)).double()
    x = drawn(3, 5, 4)
    check_every_candidate(model, lambda rows: squares(model, rows_of(x, rows)), 3)
    assert coverage(model)["0.weight"].rule == "Linear + fallback"


def test_attention_over_queries_that_all_candidates_share() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 2, 4))
            self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            pooled, _ = self.attention(self.queries, self.queries, self.queries)
            scores: Tensor = self.last(x) + pooled.sum(1, keepdim=True)
            return scores

    model = seeded(Pooled).double()
    x = drawn(3, 5, 3)
    check_every_candidate(model, lambda rows: squares(model, rows_of(x, rows)), 3)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], str]] = {
    "pruned": (
        lambda: nn.utils.prune.random_unstructured(nn.Linear(3, 2), "weight", 0.3),  # type: ignore[no-untyped-call]
        lambda layer, x: layer(x),
        "a hook before the call prunes its weight",
    ),
    "traced": (
        lambda: torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)),  # type: ignore[no-untyped-call]
        lambda layer, x: layer(x.float()).double(),
        "torch.jit compiled it",
    ),
    "unbatched": (
        lambda: nn.Conv1d(5, 4, 2).double(),
        lambda layer, x: torch.stack([layer(row) for row in x]),
        r"Expected layer 'layer' to take inputs with the 3 candidates",
    ),
    "packed sequence": (
        lambda: nn.LSTM(3, 4, batch_first=True).double(),
        lambda layer, x: layer(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True))[1][0][
            0
        ],
        "not a PackedSequence",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore:.*torch.jit")
@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_name_the_reason(kind: str) -> None:
    build, call, message = REFUSALS[kind]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = build()

        def forward(self, x: Tensor) -> Tensor:
            return call(self.layer, x)

    model = Model()
    if kind == "pruned":
        model.double()
    with pytest.raises(NotImplementedError, match=message):
        captured(model, lambda: squares(model, drawn(3, 5, 3)))


def test_the_positions_behind_the_last_bag_belong_to_nobody() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(7, 3, mode="mean", include_last_offset=True)

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            scores: Tensor = self.bag(ids, offsets)
            return scores

    model = seeded(Bags).double()
    ids, offsets = torch.tensor([1, 2, 3, 3, 0, 6, 5]), torch.tensor([0, 2, 2, 5])
    # Autograd's own gradient of the rows behind the last offset is whatever lies in memory: no oracle.
    found = captured(model, lambda: model(ids, offsets).sum(1), self_check=False)
    given = torch.stack([weighted_sum(found["bag.weight"], row, torch.Size((7, 3))) for row in torch.eye(3)])[
        ..., 0
    ].double()
    expected = torch.zeros(3, 7, dtype=torch.float64)
    expected[0, 1] = expected[0, 2] = 1 / 2
    expected[2, 3], expected[2, 0] = 2 / 3, 1 / 3
    torch.testing.assert_close(given, expected)


def test_leaves_outside_of_the_model_get_one_gradient_from_a_reentrant_pass() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = checkpoint(lambda h: torch.tanh(self.middle(h)), self.first(x), use_reentrant=True)
            return hidden

    model, outside = seeded(Checkpointed).double(), seeded(lambda: nn.Linear(4, 2)).double()
    x = drawn(3, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: squares(nn.Sequential(model, outside), x[:2])
    )
    optimizer.step(lambda: squares(nn.Sequential(model, outside), x))
    assert outside.weight.grad is None
