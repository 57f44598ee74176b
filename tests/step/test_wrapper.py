"""Nothing around the optimizer can tell it from the inner one: schedulers, checkpoints, copies, hooks."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftw_optim import GreedyFilter, SelectiveOptimizer, TargetGradient, last_blocks
from tests.support.models import Case, SmallGPT, language_model, mlp, seeded

INNERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def build(inner: str = "adamw", **options: Any) -> tuple[Case, SelectiveOptimizer]:
    case = mlp(torch.float64, 6)
    optimizer = INNERS[inner](case.model.parameters())
    target = options.pop("target", case.target_losses)
    return case, SelectiveOptimizer(optimizer, case.model, target, filter=GreedyFilter(keep=3), **options)


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_groups_state_and_defaults_are_the_inner_optimizers_own_objects() -> None:
    case, optimizer = build()

    def check() -> None:
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.param_groups is optimizer.optimizer.param_groups
        assert optimizer.state is optimizer.optimizer.state
        assert optimizer.defaults is optimizer.optimizer.defaults
        assert not hasattr(optimizer, "_step_supports_amp_scaling")

    check()
    optimizer.step(case.losses)
    check()
    optimizer.load_state_dict(optimizer.state_dict())
    check()
    assert "lr: 0.01" in repr(optimizer)
    assert repr(optimizer).startswith("SelectiveOptimizer")


def test_a_parameter_group_added_later_is_updated() -> None:
    case = mlp(torch.float64, 6)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.first.parameters()),  # type: ignore[union-attr]
        case.model,
        case.target_losses,
    )
    optimizer.add_param_group({"params": case.model.last.parameters(), "lr": 0.5})  # type: ignore[union-attr]
    optimizer.step(case.losses)
    assert case.model.last.weight.grad is not None  # type: ignore[union-attr]
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.001, 0.5]


@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_move_the_inner_learning_rate_before_and_after_a_load(when: str) -> None:
    case, optimizer = build()
    checkpoint = optimizer.state_dict()
    if when == "after":
        optimizer.load_state_dict(checkpoint)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    if when == "before":
        optimizer.load_state_dict(checkpoint)
    for step in range(3):
        optimizer.step(case.losses)
        scheduler.step()
        assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / (2 + step))


def test_other_schedulers() -> None:
    case, optimizer = build()
    plateau = ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)
    cycle = OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    before = optimizer.param_groups[0]["betas"]
    optimizer.step(case.losses)
    cycle.step()
    assert optimizer.optimizer.param_groups[0]["betas"] != before


@pytest.mark.parametrize("inner", INNERS)
def test_state_dicts_load_both_ways_between_bare_and_wrapped(inner: str) -> None:
    case, optimizer = build(inner)
    optimizer.step(case.losses)
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups", "selective"}
    bare = INNERS[inner](case.model.parameters())
    bare.load_state_dict(state_dict)
    same(bare.state_dict()["state"], optimizer.optimizer.state_dict()["state"])
    _, other = build(inner)
    other.load_state_dict(bare.state_dict())
    same(other.optimizer.state_dict()["state"], state_dict["state"])
    assert int(other.state_dict()["selective"]["backwards"]) == 0


def run(case: Case, optimizer: SelectiveOptimizer, steps: int) -> list[Any]:
    """Some steps with dropout; what was chosen, and the parameters in the end."""
    chosen: list[Any] = []
    for _ in range(steps):
        optimizer.step(case.losses)
        selection = optimizer.selection
        assert selection is not None
        chosen.append((selection.kept.tolist(), selection.weights.tolist(), selection.cosine))
    return [*chosen, [p.detach().clone() for p in case.model.parameters()]]


@pytest.mark.parametrize("options", [{}, {"refresh_every": 3}, {"decay": 0.5}], ids=str)
def test_a_resumed_run_is_bit_exact_selection_included(options: dict[str, Any]) -> None:
    """Through torch.save and torch.load(weights_only=True); dropout in the target's pass too."""

    def fresh() -> tuple[Case, SelectiveOptimizer]:
        case = language_model(seeded(lambda: SmallGPT(dropout=0.3)).double().train(), 5)
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(case.model.parameters(), lr=0.01),
            case.model,
            TargetGradient(case.target_losses, **options),
            seed=7,
        )
        return case, optimizer

    with torch.random.fork_rng():
        torch.manual_seed(1)
        case, optimizer = fresh()
        run(case, optimizer, 4)
        file = io.BytesIO()
        torch.save({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        random = torch.get_rng_state()
        expected = run(case, optimizer, 4)

        file.seek(0)
        case, optimizer = fresh()
        checkpoint = torch.load(file, weights_only=True)
        case.model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(random)
        assert run(case, optimizer, 4)[:-1] == expected[:-1]
        same([p.detach() for p in case.model.parameters()], expected[-1])


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies_carry_everything_but_the_target_and_say_so(way: str) -> None:
    case, optimizer = build(scored=last_blocks_of_mlp, seed=3)
    LambdaLR(optimizer, lambda step: 1.0)  # patches step on the instance
    optimizer.step(case.losses)
    both = (case.model, optimizer)
    if way == "pickle":
        model, twin = pickle.loads(pickle.dumps(both))
    elif way == "deepcopy":
        model, twin = copy.deepcopy(both)
    else:
        file = io.BytesIO()
        torch.save(both, file)
        file.seek(0)
        model, twin = torch.load(file, weights_only=False)
    assert twin.model is model
    assert twin.param_groups is twin.optimizer.param_groups
    assert twin.selection is not None

    def losses() -> Tensor:
        return case.losses_of(model, case.candidates)

    with pytest.raises(RuntimeError, match=r"set optimizer\.target"):
        twin.step(losses)
    twin.target = lambda: case.losses_of(model, case.target)
    optimizer.step(case.losses)
    twin.step(losses)
    same(list(model.parameters()), list(case.model.parameters()))


def last_blocks_of_mlp(name: str, parameter: nn.Parameter) -> bool:
    """A predicate that pickles."""
    return not name.startswith("first")


def test_the_predicate_of_last_blocks_pickles() -> None:
    predicate = last_blocks(SmallGPT(), 1)
    assert pickle.loads(pickle.dumps(predicate)) == predicate


def test_hooks_fire_once_on_the_wrapper() -> None:
    case, optimizer = build()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("step pre"))  # type: ignore[arg-type,return-value]
    optimizer.register_step_post_hook(lambda *a: seen.append("step post"))  # type: ignore[arg-type,return-value]
    optimizer.register_state_dict_pre_hook(lambda *a: seen.append("state pre"))  # type: ignore[arg-type,return-value]
    optimizer.register_state_dict_post_hook(lambda *a: seen.append("state post"))  # type: ignore[arg-type,return-value,func-returns-value]
    optimizer.register_load_state_dict_pre_hook(lambda *a: seen.append("load pre"))  # type: ignore[arg-type,return-value,func-returns-value]
    optimizer.register_load_state_dict_post_hook(lambda *a: seen.append("load post"))  # type: ignore[arg-type,return-value]
    optimizer.step(lambda: seen.append("closure") or case.losses())  # type: ignore[func-returns-value]
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert seen == ["step pre", "closure", "step post", "state pre", "state post", "load pre", "load post"]


def test_hooks_for_all_optimizers_fire_for_the_wrapper_and_for_the_inner_step() -> None:
    """Both are optimizers that step. Trials of an optimizer that no rule knows fire none."""

    class Unknown(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in (p for group in self.param_groups for p in group["params"]):
                parameter -= 0.1 * parameter.grad

    case = mlp(torch.float64, 6)
    inner = Unknown(case.model.parameters(), lr=0.1)
    optimizer = SelectiveOptimizer(inner, case.model, case.target_losses)
    seen: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda stepping, *a: seen.append(stepping))
    try:
        optimizer.step(case.losses)
        optimizer.step(case.losses)
    finally:
        handle.remove()
    assert all(one is other for one, other in zip(seen, [optimizer, inner] * 2, strict=True))


def test_a_pre_hook_on_the_inner_optimizer_sees_the_combined_gradient() -> None:
    case, optimizer = build("sgd")
    seen: list[Tensor] = []

    def clip(inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(case.model.parameters(), 1e-3)
        seen.append(case.model.first.weight.grad.clone())  # type: ignore[union-attr,operator]

    optimizer.optimizer.register_step_pre_hook(clip)
    before = case.model.first.weight.detach().clone()  # type: ignore[union-attr,operator]
    optimizer.step(case.losses)
    torch.testing.assert_close(case.model.first.weight.detach(), before - 0.1 * seen[0])  # type: ignore[union-attr,operator]


def test_zero_grad_clears_or_zeroes() -> None:
    case, optimizer = build()
    optimizer.backward(case.losses)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in case.model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in case.model.parameters())


def test_a_bad_checkpoint_is_refused_whole() -> None:
    case, optimizer = build()
    optimizer.step(case.losses)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    del bad["selective"]["seed"]
    with pytest.raises(ValueError, match="selective"):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match="selective"):
        optimizer.load_state_dict({**before, "selective": [1]})
    of_another = {**before["selective"], "target": {"first.weight": torch.zeros(2)}}
    with pytest.raises(ValueError, match=r"first\.weight.*of another model"):
        optimizer.load_state_dict({**before, "selective": of_another})
    same(optimizer.state_dict(), before)
