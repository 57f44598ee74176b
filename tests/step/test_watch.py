"""The watch over the guide: when it looks at held-out rows, what it compares, and that memorised rows are blind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import KeepAll, SelectiveOptimizer, TargetGradient, UniformWeights


class Learner:
    """A network that could learn its target rows by heart, held-out rows of the same kind, and useless candidates."""

    def __init__(self, *, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 1)).double()
            self.rows, self.others = torch.randn(8, 30).double(), torch.randn(40, 30).double()
            self.goals, self.other_goals = torch.randn(8).double(), torch.randn(40).double()
            self.candidates = torch.randn(4, 30).double()
        self.looks = 0

    def losses(self) -> Tensor:
        found: Tensor = (self.model(self.rows)[:, 0] - self.goals) ** 2
        return found

    def held_out(self) -> Tensor:
        assert not torch.is_grad_enabled()
        self.looks += 1
        found: Tensor = (self.model(self.others)[:, 0] - self.other_goals) ** 2
        return found

    def candidate_losses(self) -> Tensor:
        found: Tensor = 1e-9 * self.model(self.candidates)[:, 0] ** 2
        return found

    def optimizer(self, *, target: dict[str, Any] | None = None, **options: Any) -> SelectiveOptimizer:
        return SelectiveOptimizer(
            torch.optim.Adam(self.model.parameters(), lr=1e-2),
            self.model,
            TargetGradient(self.losses, **{"held_out": self.held_out, "held_out_every": 5, **(target or {})}),
            **{"filter": KeepAll(), "weight": UniformWeights(), "metric": "euclidean", **options},
        )


def steps(learner: Learner, optimizer: SelectiveOptimizer, count: int) -> list[Any]:
    found = []
    for _ in range(count):
        optimizer.step(learner.candidate_losses)
        found.append(optimizer.selection)
    return found


@pytest.mark.slow
def test_rows_that_are_learned_by_heart_are_blind_and_those_that_only_guide_are_not() -> None:
    learner = Learner()
    found = steps(learner, learner.optimizer(train_on_target=True), 150)
    assert not found[0].blind
    assert all(one.blind for one in found[-50:])
    assert found[-1].guide_loss < 0.1 * found[-1].held_out_loss
    numbers = found[-1].target_numbers()
    assert numbers["blind"] == 1.0
    assert {"guide_loss", "held_out_loss", "target_share", "target_loss"} < numbers.keys()
    learner = Learner(seed=1)
    optimizer = learner.optimizer()
    found = []
    for _ in range(60):  # trained on something else
        optimizer.step(lambda: (learner.model(learner.candidates)[:, 0] - 1.0) ** 2)
        found.append(optimizer.selection)
    assert not any(one.blind for one in found)
    assert found[-1].target_numbers().keys() == {"guide_loss", "held_out_loss", "blind"}


WAYS: dict[str, Callable[[Learner], dict[str, Any]]] = {
    "guides": lambda learner: {},
    "guides, kept": lambda learner: {"target": {"refresh_every": 2, "decay": 0.5}},
    "takes part": lambda learner: {"train_on_target": True},
    "others take part": lambda learner: {"train_on_target": learner.losses},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_compared_are_losses_of_the_same_parameters(way: str) -> None:
    learner = Learner()
    optimizer = learner.optimizer(**WAYS[way](learner))
    # Where the guide is formed at every second step, a look at step 5 waits for step 6.
    looks = (0, 6, 10) if way == "guides, kept" else (0, 5, 10)
    expected = (math.nan, math.nan)
    for step in range(12):
        before = copy.deepcopy(learner.model)
        optimizer.step(learner.candidate_losses)
        if step in looks:
            with torch.no_grad():
                after, learner.model = learner.model, before
                expected = float(learner.losses().mean()), float(learner.held_out().mean())
                learner.looks -= 1
                learner.model = after
        selection = optimizer.selection
        assert selection is not None
        assert (selection.guide_loss, selection.held_out_loss) == pytest.approx(expected, nan_ok=True)
    assert learner.looks == 3


def test_a_rise_of_all_losses_is_no_memory() -> None:
    """A guide and held-out rows of one kind, and candidates that make both worse."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(10, 1).double()
        truth, rows, others = torch.randn(10, 1).double(), torch.randn(64, 10).double(), torch.randn(200, 10).double()
    optimizer = SelectiveOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1),
        model,
        TargetGradient(
            lambda: (model(rows) - rows @ truth)[:, 0] ** 2,
            held_out=lambda: (model(others) - others @ truth)[:, 0] ** 2,
            held_out_every=10,
        ),
        filter=KeepAll(),
        weight=UniformWeights(),
        metric="euclidean",
    )
    for _ in range(41):
        optimizer.step(lambda: (model(rows) + 5 * rows @ truth)[:, 0] ** 2)
        assert optimizer.selection is not None
        assert not optimizer.selection.blind
    assert optimizer.selection.held_out_loss > 50


def test_what_was_watched_ends_with_the_held_out_rows() -> None:
    learner = Learner()
    optimizer = learner.optimizer(train_on_target=True)
    assert steps(learner, optimizer, 60)[-1].blind
    other = learner.optimizer(target={"held_out": None}, train_on_target=True)
    other.load_state_dict(optimizer.state_dict())
    for one in (other, optimizer):
        one.target = TargetGradient(learner.losses)
        (selection,) = steps(learner, one, 1)
        assert not selection.blind
        assert math.isnan(selection.held_out_loss)


def test_a_look_leaves_the_mode_of_the_model() -> None:
    learner = Learner()
    learner.model.train()

    def held_out() -> Tensor:
        learner.model.eval()
        return learner.held_out()

    steps(learner, learner.optimizer(target={"held_out": held_out}), 1)
    assert learner.looks == 1
    assert all(module.training for module in learner.model.modules())


def test_held_out_losses_that_are_not_finite_end_nothing() -> None:
    learner = Learner()
    optimizer = learner.optimizer(target={"held_out": lambda: learner.held_out() * math.inf}, train_on_target=True)
    assert not any(one.blind for one in steps(learner, optimizer, 60))


def test_without_held_out_rows_nothing_is_watched() -> None:
    learner = Learner()
    optimizer = learner.optimizer(target={"held_out": None}, train_on_target=True)
    (selection,) = steps(learner, optimizer, 1)
    assert math.isnan(selection.guide_loss)
    assert math.isnan(selection.held_out_loss)
    assert not selection.blind
    assert "watch" not in optimizer.state_dict()["selective"]


@pytest.mark.slow
def test_a_single_row_tells_nothing_of_its_kind() -> None:
    learner = Learner()
    optimizer = learner.optimizer(target={"held_out": lambda: learner.held_out()[:1]}, train_on_target=True)
    assert not any(one.blind for one in steps(learner, optimizer, 120))


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_run_that_is_resumed_watches_on(stop: int) -> None:
    whole = Learner()
    expected = steps(whole, whole.optimizer(train_on_target=True), 14)
    first = Learner()
    optimizer = first.optimizer(train_on_target=True)
    steps(first, optimizer, stop)
    second = Learner()
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    resumed = second.optimizer(train_on_target=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(expected[stop:], steps(second, resumed, 14 - stop), strict=True):
        assert (one.guide_loss, one.held_out_loss, one.blind) == (other.guide_loss, other.held_out_loss, other.blind)


@pytest.mark.parametrize(
    ("held_out", "error", "message"),
    [
        (lambda losses: losses.sum(), ValueError, r"one loss per row.*shape \(\)"),
        (lambda losses: losses[:0], ValueError, "m > 0"),
        (lambda losses: losses.tolist(), TypeError, "a tensor of losses"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_changes(
    held_out: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    learner = Learner()
    optimizer = learner.optimizer(target={"held_out": lambda: held_out(learner.held_out())})
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(error, match=message):
        optimizer.step(learner.candidate_losses)
    assert optimizer.selection is None
    torch.testing.assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_options_of_a_look_are_checked() -> None:
    with pytest.raises(TypeError, match="held_out as a closure"):
        TargetGradient(lambda: torch.ones(1), held_out=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="held_out_every must be a positive integer, got 0"):
        TargetGradient(lambda: torch.ones(1), held_out_every=0)
