"""Optimizers that no rule knows: what two steps on a copy tell of them, and whom they cannot tell of."""

from __future__ import annotations

import collections
import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim import Diagonal, Scalar, SelectiveOptimizer, preconditioner_of
from ftw_optim._preconditioners.lookup import LOOK_EVERY
from ftw_optim._preconditioners.probing.probe import (
    NotElementwise,
    agrees_with_trial,
    check_separable,
    couples_decay,
    probed,
)
from ftw_optim._preconditioners.rules.adam import adam
from tests.support.models import mlp
from tests.support.optimizers import ELEMENTWISE, PROBED, SHAPE, Build, update_of, warmed_up, warns_of_overloads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer
    import torch_optimizer


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_rules_say_what_two_steps_on_a_copy_tell(name: str, steps: int) -> None:
    """In float64, without a reference and with one."""
    optimizer, parameter = warmed_up(ELEMENTWISE[name], steps)
    group = optimizer.param_groups[0]
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE) * torch.tensor([1.0, -1.0, 1.0])
    ones = torch.ones(SHAPE, dtype=torch.float64)
    if group.get("weight_decay"):
        coupled = couples_decay(optimizer, parameter, group, reference)
        assert coupled is not any(word in name for word in ("adamw", "decoupled", "schedule-free"))
        group = {**group, "decoupled_weight_decay": not coupled}
    for given, rtol in ((None, 1e-6), (reference, 1e-9)):
        expected = preconditioner_of(optimizer, parameter, given).apply(ones)
        torch.testing.assert_close(probed(optimizer, parameter, group, given).values, expected, rtol=rtol, atol=0.0)


pytestmark = warns_of_overloads

COUPLED: dict[str, Callable[[list[Any]], Optimizer]] = {
    "A2Grad": lambda p: pytorch_optimizer.A2Grad(p),
    "Lamb": lambda p: pytorch_optimizer.Lamb(p, lr=0.01),
    "Shampoo": lambda p: pytorch_optimizer.Shampoo(p, lr=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 5, 50])
@pytest.mark.parametrize("name", PROBED)
def test_elementwise_optimizers_are_told_by_trying(name: str, steps: int) -> None:
    """Half the difference of two opposite steps, by a copy of the whole optimizer, is what the map says."""
    optimizer, parameter = warmed_up(PROBED[name], steps)
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE)
    before = [group["params"][0].detach().clone() for group in optimizer.param_groups], copy.deepcopy(optimizer.state)
    moved = preconditioner_of(optimizer, parameter, reference)
    assert isinstance(moved, Diagonal)
    assert torch.equal(before[0][0], parameter)
    assert len(before[1]) == len(optimizer.state)

    odd = (update_of(optimizer, reference) - update_of(optimizer, -reference)) / 2
    if not odd.any():
        assert steps == 0, "a first step that only fills the state"
        return
    computes_in_float32 = ("RAdam of torch_optimizer", "RangerVA of torch_optimizer", "RangerQH of torch_optimizer")
    rtol = 1e-3 if name.startswith("Ranger") or name in computes_in_float32 else 1e-6
    torch.testing.assert_close(moved.apply(reference), -odd, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_optimizers_that_couple_entries_are_found_out(name: str) -> None:
    optimizer, parameter = warmed_up(COUPLED[name], 5)
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    with pytest.raises(NotElementwise, match="depends on the gradients of other entries"):
        check_separable(optimizer, parameter, optimizer.param_groups[0], reference)
    with pytest.raises(NotImplementedError, match=rf"{name}.*trying it on a copy did not tell.*@register_precond"):
        preconditioner_of(optimizer, parameter, reference)


class Sign(Optimizer):
    """Follows the sign of the gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(group["lr"] * param.grad.sign())


def test_an_update_without_history_that_only_looks_elementwise_is_looked_at_again() -> None:
    optimizer, parameter = warmed_up(COUPLED["Lamb"], 0)
    reference = torch.ones(SHAPE, dtype=torch.float64)
    preconditioner_of(optimizer, parameter, reference)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.linspace(-1, 2, 12, dtype=torch.float64).view(SHAPE)
    optimizer.step()
    with pytest.raises(NotImplementedError, match="depends on the gradients of other entries"):
        preconditioner_of(optimizer, parameter, torch.linspace(0.3, 2, 12, dtype=torch.float64).view(SHAPE))


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.SparseAdam(p),
        lambda p: torch_optimizer.Adahessian(p),
        lambda p: torch_optimizer.Lookahead(torch.optim.SGD(p, lr=0.1)),
    ],
    ids=["LBFGS", "SparseAdam", "Adahessian", "Lookahead"],
)
def test_refused_at_construction_with_the_reason(build: Callable[[list[Any]], Any]) -> None:
    model = nn.Linear(2, 2)
    optimizer = build(list(model.parameters()))
    with pytest.raises((NotImplementedError, TypeError), match=r"No preconditioner is known for .*:|Expected a torch"):
        SelectiveOptimizer(optimizer, model, lambda: model(torch.ones(2, 2)).sum(1))


def _apply(optimizer: Optimizer, gradient: Tensor) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = gradient
    optimizer.step()


def test_a_sign_is_no_multiple_of_the_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer = Sign([parameter])
    _apply(optimizer, torch.ones(SHAPE, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="no multiple of it"):
        preconditioner_of(optimizer, parameter)


class TestLookAlikes:
    """Optimizers whose state has the names of Adam's."""

    def test_one_that_steps_as_adam_does_gets_adams_rule(self) -> None:
        class Counted(pytorch_optimizer.AdamC):  # type: ignore[misc]
            """Of its copies too."""

            steps = 0

            def step(self, closure: Any = None) -> None:
                Counted.steps += 1
                super().step(closure)

        optimizer, parameter = warmed_up(lambda p: Counted(p, lr=0.01), 5)
        twin = torch.optim.Adam([parameter], lr=0.01)
        steps = torch.tensor(float(optimizer.param_groups[0]["step"]))  # which it keeps in the group
        twin.state[parameter] = {**optimizer.state[parameter], "step": steps}
        reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE)
        expected = preconditioner_of(twin, parameter, reference)
        assert isinstance(expected, Diagonal)
        for tried in (True, True, False):  # at the first and second look alone
            before = Counted.steps
            found = preconditioner_of(optimizer, parameter, reference)
            assert isinstance(found, Diagonal)
            assert torch.equal(found.values, expected.values)
            assert (Counted.steps > before) is tried

    @pytest.mark.parametrize("name", ["Yogi", "QHAdam"])
    def test_one_that_steps_otherwise_does_not(self, name: str) -> None:
        optimizer, parameter = warmed_up(PROBED[f"{name} of torch_optimizer"], 5)
        assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[parameter].keys()
        reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE)
        assert not agrees_with_trial(adam, optimizer, parameter, optimizer.param_groups[0], reference)

    def test_one_that_cannot_be_tried_is_taken_for_adam_and_said_so_once(self) -> None:
        class Elsewhere(torch.optim.AdamW):
            """A kernel for one precision alone."""

            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                if self.param_groups[0]["params"][0].dtype != torch.float32:
                    raise RuntimeError("expected float32")
                super().step(closure)

        parameter = nn.Parameter(torch.randn(SHAPE))
        optimizer = Elsewhere([parameter], lr=0.1)
        parameter.grad = torch.randn(SHAPE)
        optimizer.step()
        plain = torch.optim.AdamW([parameter], lr=0.1)
        plain.state = optimizer.state
        reference = torch.randn(SHAPE)
        with pytest.warns(UserWarning, match=r"Elsewhere has the state of Adam and cannot be tried .*expected float32"):
            found = preconditioner_of(optimizer, parameter, reference)
        torch.testing.assert_close(
            found.apply(reference), preconditioner_of(plain, parameter, reference).apply(reference)
        )
        preconditioner_of(optimizer, parameter, reference)  # says nothing more


def test_the_identity_serves_where_it_is_asked_for() -> None:
    """Selection that ignores the optimizer needs no map of it; one warning says what stands in for it."""
    case = mlp(torch.float64, 6)
    inner = COUPLED["Lamb"](list(case.model.parameters()))
    optimizer = SelectiveOptimizer(inner, case.model, case.target_losses, metric="euclidean")
    with pytest.warns(UserWarning, match=r"Lamb.*learning rate times the identity"):
        optimizer.step(case.losses)
    optimizer.step(case.losses)  # says nothing more
    assert optimizer.selection is not None
    assert not optimizer.selection.skipped
    found = preconditioner_of(optimizer, next(case.model.parameters()))
    assert isinstance(found, Scalar)
    assert found.value == 0.01
    other = SelectiveOptimizer(COUPLED["Lamb"](list(case.model.parameters())), case.model, case.target_losses)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r'metric="euclidean"'):
            other.step(case.losses)


class Later(torch.optim.Optimizer):
    """Divides by the norm of the whole gradient, after some steps of warm-up."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] = state.get("step", 0) + 1
                param.data.sub_(group["lr"] * param.grad / (param.grad.norm() if state["step"] > 9 else 1.0))


def test_one_that_changes_its_ways_is_found_out() -> None:
    optimizer, parameter = warmed_up(Later, 0)
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(30):
        reference = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
        try:
            found.append(isinstance(preconditioner_of(optimizer, parameter, reference), Diagonal))
        except NotImplementedError:
            found.append(False)
        _apply(optimizer, reference)
    assert found == sorted(found, reverse=True), "once refused, refused"
    assert found[0]
    assert not found[LOOK_EVERY + 1]


def test_signs_of_a_momentum_are_said_aloud() -> None:
    optimizer, parameter = warmed_up(lambda p: pytorch_optimizer.Tiger(p, lr=0.01), 5)
    with pytest.warns(UserWarning, match="Tiger follows signs alone"):
        preconditioner_of(optimizer, parameter, torch.full(SHAPE, 0.3, dtype=torch.float64))


def test_a_trial_leaves_no_trace_in_what_the_optimizer_holds_beside_its_state() -> None:
    class Counting(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.seen: list[int] = []
            self.state["all"] = {"count": 0}  # type: ignore[index]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.seen.append(1)
            self.state["all"]["count"] += 1  # type: ignore[index]
            super().step(closure)

    optimizer, parameter = warmed_up(Counting, 3)
    preconditioner_of(optimizer, parameter, torch.ones(SHAPE, dtype=torch.float64))
    assert optimizer.seen == [1, 1, 1]  # type: ignore[attr-defined]
    assert optimizer.state["all"] == {"count": 3}  # type: ignore[index]


def delegating(holds: Callable[[list[Any]], Any]) -> Build:
    """Optimizers that hold what a step of theirs changes, and what a copy of them would share."""

    class Holding(torch.optim.SGD):
        def __init__(self, params: list[Any]) -> None:
            super().__init__(params, lr=0.1)
            self.held = holds(params)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.held[0].step() if isinstance(self.held, list) else self.held.weight.data.mul_(0.9)

    return Holding


@pytest.mark.parametrize(
    "build",
    [
        delegating(lambda params: [torch.optim.SGD(params, lr=0.1, momentum=0.9)]),
        delegating(lambda params: nn.Linear(2, 2)),
        lambda p: pytorch_optimizer.Lookahead(torch.optim.AdamW(p)),
        lambda p: pytorch_optimizer.OrthoGrad(torch.optim.AdamW(p)),
    ],
    ids=["an optimizer", "a model", "Lookahead", "OrthoGrad"],
)
@pytest.mark.parametrize("metric", ["preconditioned", "euclidean"])
def test_one_that_holds_an_optimizer_or_a_model_is_not_tried(build: Build, metric: str) -> None:
    """A trial would move real parameters."""
    case = mlp(torch.float64, 6)
    inner = build(list(case.model.parameters()))
    optimizer = SelectiveOptimizer(inner, case.model, case.target_losses, metric=metric)
    case.losses().mean().backward()
    before = [p.detach().clone() for p in case.model.parameters()]
    if metric == "euclidean":
        with pytest.warns(UserWarning, match="which a step on a copy would change"):
            optimizer.backward(case.losses)
    else:
        with pytest.raises(NotImplementedError, match="which a step on a copy would change"):
            optimizer.backward(case.losses)
    torch.testing.assert_close([p.detach() for p in case.model.parameters()], before, rtol=0, atol=0)


def test_accelerates_optimizer_is_looked_through_and_refused_inside() -> None:
    import accelerate

    case = mlp(torch.float64, 6)
    inner = torch.optim.AdamW(case.model.parameters())
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare_optimizer(SelectiveOptimizer(inner, case.model, case.target_losses))
    parameter = next(case.model.parameters())
    expected = preconditioner_of(inner, parameter, torch.ones_like(parameter))
    found = preconditioner_of(prepared, parameter, torch.ones_like(parameter))
    torch.testing.assert_close(found.apply(torch.ones_like(parameter)), expected.apply(torch.ones_like(parameter)))
    with pytest.raises(NotImplementedError, match="let accelerate prepare the SelectiveOptimizer"):
        SelectiveOptimizer(accelerator.prepare_optimizer(inner), case.model, case.target_losses)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Elsewhere(torch.optim.Optimizer):
    """Keeps squares and a counter where a test asks, and draws random numbers."""

    def __init__(self, params: Any, where: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.where, self.seen, self.queue = where, {}, collections.deque([0])  # type: ignore[var-annotated]
        self.generator = torch.Generator().manual_seed(3)
        held = [p for group in self.param_groups for p in group["params"]]
        self.squares: Any = [torch.zeros_like(p) for p in held]
        if where == "by parameter":
            self.squares = dict(zip(held, self.squares, strict=True))
        elif where == "by id":
            self.squares = {id(p): square for p, square in zip(held, self.squares, strict=True)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.queue.append(random.random() + float(torch.rand(1)) + float(torch.rand(1, generator=self.generator)))
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p.grad is None:
                continue
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
            key = {"by place": number, "by id": id(p)}.get(self.where, p)
            square = self.squares[key].add_(p.grad.square().to(self.squares[key].dtype))
            noise = 1 + 1e-3 * torch.randn_like(p)
            p.sub_(self.param_groups[0]["lr"] * noise * p.grad / (square.sqrt() + 1e-8))


@pytest.mark.parametrize("where", ["by parameter", "by id"])
def test_what_is_kept_by_parameter_outside_of_the_state_is_found_there(where: str) -> None:
    optimizer, parameter = warmed_up(lambda p: Elsewhere(p, where), 5)
    reference = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).view(SHAPE)
    squares = optimizer.squares[id(parameter) if where == "by id" else parameter]  # type: ignore[attr-defined]
    expected = 0.1 * reference / (squares + reference.square()).sqrt()
    found = preconditioner_of(optimizer, parameter, reference).apply(reference)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.0)  # its noise


def test_what_is_kept_by_place_is_refused() -> None:
    optimizer, _ = warmed_up(lambda p: Elsewhere(p, "by place"), 5)
    second = optimizer.param_groups[0]["params"][1]
    with pytest.raises(NotImplementedError, match="depends on the others that the optimizer holds"):
        preconditioner_of(optimizer, second, torch.ones(SHAPE, dtype=torch.float64))


def test_trials_leave_random_numbers_containers_and_generators_alone() -> None:
    optimizer, parameter = warmed_up(lambda p: Elsewhere(p, "by parameter"), 3)
    states = torch.get_rng_state(), random.getstate(), optimizer.generator.get_state()  # type: ignore[attr-defined]
    queue, squares = list(optimizer.queue), optimizer.squares[parameter].clone()  # type: ignore[attr-defined]
    preconditioner_of(optimizer, parameter, torch.ones(SHAPE, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(optimizer.generator.get_state(), states[2])  # type: ignore[attr-defined]
    assert list(optimizer.queue) == queue  # type: ignore[attr-defined]
    assert torch.equal(optimizer.squares[parameter], squares)  # type: ignore[attr-defined]


def test_weight_decay_may_be_switched_on_in_a_run() -> None:
    optimizer, parameter = warmed_up(PROBED["AdaBelief of torch_optimizer"], 3)
    reference = torch.ones(SHAPE, dtype=torch.float64)
    for step in range(4):
        optimizer.param_groups[0]["weight_decay"] = 0.1 * (step == 2)
        preconditioner_of(optimizer, parameter, reference)


@pytest.mark.parametrize("name", ["ADOPT of pytorch_optimizer", "AdaBelief of torch_optimizer"])
def test_a_parameter_that_expects_no_gradient_has_a_map(name: str) -> None:
    """As LoRA's A at the first step, whose B is zero."""
    optimizer, parameter = warmed_up(PROBED[name], 0)
    found = preconditioner_of(optimizer, parameter, torch.zeros(SHAPE, dtype=torch.float64))
    assert found.apply(torch.ones(SHAPE, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", ["AggMo", "AdaBelief", "MADGRAD", "Yogi"])
def test_after_a_spike_the_map_at_zero_gradient_is_told_all_the_same(name: str) -> None:
    optimizer, parameter = warmed_up(PROBED[f"{name} of torch_optimizer"], 2)
    _apply(optimizer, torch.full(SHAPE, 1e9, dtype=torch.float64))
    assert preconditioner_of(optimizer, parameter).apply(torch.ones(SHAPE, dtype=torch.float64)).isfinite().all()


def test_complex_parameters_are_refused_by_name() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(NotImplementedError, match="Expected real parameters"):
        preconditioner_of(torch.optim.AdamW([parameter]), parameter)
