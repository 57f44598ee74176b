"""Every supported inner optimizer inside a selective step: the contract that they all keep, in one table.

Rows are the optimizers of ``tests/support/optimizers.py``, columns the tests below. What cannot hold is in
:data:`FAILS`.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, UniformWeights
from tests.support.contract import alike, bare, case_for, everyone, plain_step, rows, same, selective, weights_of
from tests.support.optimizers import INNER, MAXIMIZING, SIGNS, movement

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of"),  # of add_, which torch_optimizer still calls
    pytest.mark.filterwarnings("ignore:.*follows signs alone"),
]


@rows("equal")
def test_all_kept_at_one_over_n_is_the_bare_optimizer(name: str) -> None:
    """For twenty steps."""
    case, optimizer = bare(name)
    for _ in range(20):
        plain_step(case, optimizer)
    wrapped, selected = everyone(name)
    for _ in range(20):
        selected.step(wrapped.losses)
    alike(name, weights_of(case), weights_of(wrapped))


@rows("sign")
def test_predicted_and_realised_movement_agree_in_sign(name: str) -> None:
    """Along the combined gradient, beyond what the step would do without any; from the second step on."""
    case, optimizer = selective(name, filter=GreedyFilter(keep=3))
    optimizer.step(case.losses)
    for _ in range(3):
        optimizer.backward(case.losses)
        assert optimizer.selection is not None
        assert optimizer.selection.gram.diagonal().min() > 0
        predicted, realised = movement(optimizer)
        assert predicted > 0
        realised = -realised if name in MAXIMIZING else realised
        assert realised >= 0 if name in SIGNS else realised > 0  # a sign may not turn at all
        optimizer.zero_grad()
        optimizer.step(case.losses)


@rows("resume")
def test_a_resumed_run_is_the_run(name: str) -> None:
    """Bit by bit, selection included, through a file that ``weights_only`` loads.

    In float32: torch loads a state in the parameter's precision, also where the optimizer keeps it in float32.
    """
    case, optimizer = selective(name, torch.float32, filter=GreedyFilter(keep=3))
    for _ in range(3):
        optimizer.step(case.losses)
    file = io.BytesIO()
    torch.save({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(3):
        optimizer.step(case.losses)
    again, resumed = selective(name, torch.float32, filter=GreedyFilter(keep=3))
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again.model.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        resumed.step(again.losses)
    assert optimizer.selection is not None
    assert resumed.selection is not None
    assert optimizer.selection.kept.tolist() == resumed.selection.kept.tolist()
    same(optimizer.selection.weights, resumed.selection.weights)
    same(weights_of(case), weights_of(again))


@rows("both ways")
def test_state_dicts_load_both_ways_between_bare_and_wrapped(name: str) -> None:
    case, optimizer = everyone(name, torch.float32)
    optimizer.step(case.losses)
    optimizer.step(case.losses)
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved) == {*optimizer.optimizer.state_dict(), "selective"}
    start = copy.deepcopy(case.model.state_dict())

    plain_case, plain = bare(name, torch.float32)
    plain_case.model.load_state_dict(start)
    plain.load_state_dict(copy.deepcopy(saved))
    other_case, other = everyone(name, torch.float32)
    other_case.model.load_state_dict(start)
    other.load_state_dict({key: value for key, value in copy.deepcopy(saved).items() if key != "selective"})
    assert other.param_groups is other.optimizer.param_groups
    assert other.state is other.optimizer.state
    plain_step(plain_case, plain)
    optimizer.step(case.losses)
    other.step(other_case.losses)
    alike(name, weights_of(case), weights_of(plain_case), torch.float32)
    same(weights_of(case), weights_of(other_case))


@rows("schedulers")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_scheduler_moves_the_inner_learning_rate_before_and_after_a_load(name: str, when: str) -> None:
    case, optimizer = selective(name)
    if optimizer.param_groups[0]["lr"] is None:
        pytest.skip("it has no learning rate of its own")
    if when == "after":
        optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = float(optimizer.param_groups[0]["lr"])
    optimizer.step(case.losses)
    scheduler.step()
    assert float(optimizer.optimizer.param_groups[0]["lr"]) == pytest.approx(start / 2)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(case.losses)
    scheduler.step()
    assert float(optimizer.optimizer.param_groups[0]["lr"]) == pytest.approx(start / 4)


@rows("copies")
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_a_copy_steps_as_the_original(name: str, way: str) -> None:
    case, optimizer = everyone(name)
    optimizer.step(case.losses)
    if way == "deepcopy":
        model, twin = copy.deepcopy((case.model, optimizer))
    elif way == "pickle":
        model, twin = pickle.loads(pickle.dumps((case.model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((case.model, optimizer), file)
        file.seek(0)
        model, twin = torch.load(file, weights_only=False)
    assert twin.param_groups is twin.optimizer.param_groups
    twin.target = lambda: case.losses_of(model, case.target)
    optimizer.step(case.losses)
    twin.step(lambda: case.losses_of(model, case.candidates))
    same(list(model.parameters()), list(case.model.parameters()))


@rows("hooks")
def test_hooks_fire_once_and_in_order(name: str) -> None:
    case, optimizer = selective(name)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("before"))  # type: ignore[arg-type,return-value]
    optimizer.register_step_post_hook(lambda *a: seen.append("after"))  # type: ignore[arg-type,return-value]
    optimizer.step(lambda: seen.append("closure") or case.losses())  # type: ignore[func-returns-value]
    assert seen == ["before", "closure", "after"]


@rows("groups", without=("adamw two groups",))
def test_groups_with_settings_of_their_own_one_added_later(name: str) -> None:
    runs = []
    for wrapped in (False, True):
        case, parameters = case_for(name)
        optimizer: Any = INNER[name](parameters[:2])
        if wrapped:
            optimizer = SelectiveOptimizer(
                optimizer, case.model, case.target_losses, filter=KeepAll(), weight=UniformWeights()
            )
        for step in range(4):
            if step == 2:
                rate = optimizer.param_groups[0]["lr"]
                optimizer.add_param_group({"params": parameters[2:], "lr": None if rate is None else rate / 2})
            if wrapped:
                optimizer.step(case.losses)
                assert optimizer.param_groups is optimizer.optimizer.param_groups
            else:
                plain_step(case, optimizer)
        assert len(optimizer.param_groups) == 2
        runs.append(weights_of(case))
    alike(name, *runs)


@rows("grad scaler")
def test_a_grad_scaler_unscales_and_skips(name: str) -> None:
    """As for the bare optimizer; an overflow leaves parameters and state alone, and the next step is clean."""
    runs = []
    for wrapped in (False, True):
        case, optimizer = (everyone if wrapped else bare)(name, torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            scale = scaler.scale(torch.ones(()))
            spoilt = torch.tensor(1e38) if step == 2 else torch.tensor(1.0)
            if wrapped:
                optimizer.backward(lambda: case.losses() * spoilt, grad_scale=scale)  # noqa: B023
            else:
                (case.losses() * spoilt * scale).mean().backward()
            before = weights_of(case), copy.deepcopy(optimizer.state_dict()["state"])
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(case.model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            if step == 2:
                same(weights_of(case), before[0])
                same(optimizer.state_dict()["state"], before[1])
                assert scaler.get_scale() == 512.0
        runs.append(weights_of(case))
    alike(name, *runs, torch.float32)


@rows("without a closure")
def test_step_without_a_closure_is_the_inner_step_to_the_last_bit(name: str) -> None:
    """Also a closure that returns None, as Lightning's manual optimisation passes one; after some selective steps."""
    runs = []
    for wrapped in (False, True):
        case, optimizer = (everyone if wrapped else bare)(name)
        for step in range(6):
            optimizer.zero_grad()
            case.losses().mean().backward()
            if wrapped:
                assert (optimizer.step(), optimizer.step(None), optimizer.step(lambda: None))[step % 3 : 3] or True
            else:
                for _ in range(3):
                    optimizer.step()
        runs.append(weights_of(case))
    same(*runs)


@rows("raises")
def test_a_closure_that_raises_leaves_everything_as_it_was(name: str) -> None:
    case, optimizer = selective(name)
    optimizer.step(case.losses)
    before = weights_of(case), copy.deepcopy(optimizer.state_dict()), [p.grad for p in case.model.parameters()]

    def fails() -> Tensor:
        case.losses()
        raise LookupError("no more data")

    with pytest.raises(LookupError, match="no more data"):
        optimizer.step(fails)
    same(weights_of(case), before[0])
    same(optimizer.state_dict()["state"], before[1]["state"])
    assert str(optimizer.state_dict()) == str(before[1])
    assert all(p.grad is g for p, g in zip(case.model.parameters(), before[2], strict=True))
    optimizer.step(case.losses)


@rows("none")
def test_a_parameter_that_is_not_reached_keeps_none_and_its_state(name: str) -> None:
    """A gradient of zero would decay momentum, and the parameter."""
    runs = []
    for wrapped in (False, True):
        case, parameters = case_for(name)
        case.model.spare = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        spare = case.model.spare.weight
        nn.init.eye_(spare)
        optimizer: Any = INNER[name]([*parameters, spare])
        if wrapped:
            optimizer = SelectiveOptimizer(
                optimizer, case.model, case.target_losses, filter=KeepAll(), weight=UniformWeights()
            )
        for _ in range(3):
            optimizer.step(case.losses) if wrapped else plain_step(case, optimizer)
        assert spare.grad is None
        runs.append(weights_of(case))
    alike(name, *runs)


@rows("accelerate")
def test_accelerate_prepares_and_steps_it(name: str) -> None:
    """``prepare`` loads the optimizer's own state at once; the scheduler moves the inner learning rate."""
    import accelerate

    runs = []
    for wrapped in (False, True):
        case, optimizer = (everyone if wrapped else bare)(name)
        accelerator = accelerate.Accelerator(cpu=True)
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=True)
        for _ in range(3):
            prepared.zero_grad()
            if wrapped:
                assert isinstance(optimizer, SelectiveOptimizer)
                optimizer.backward(case.losses)
            else:
                accelerator.backward(case.losses().mean())
            prepared.step()
        if wrapped:
            assert isinstance(optimizer, SelectiveOptimizer)
            assert optimizer.param_groups is optimizer.optimizer.param_groups
        prepared.train()
        prepared.eval()
        runs.append(weights_of(case))
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    alike(name, *runs)


@rows("distributed checkpoint")
def test_distributed_checkpointing_gets_and_sets_its_state(name: str) -> None:
    """Into a fresh optimizer, whose state it first makes by a step with a learning rate of zero."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    case, optimizer = everyone(name, torch.float32)
    for _ in range(2):
        optimizer.step(case.losses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how it will treat its own options
        saved = copy.deepcopy(get_optimizer_state_dict(case.model, optimizer))
        again, fresh = everyone(name, torch.float32)
        again.model.load_state_dict(case.model.state_dict())
        set_optimizer_state_dict(again.model, fresh, saved)
    assert fresh.param_groups is fresh.optimizer.param_groups
    optimizer.step(case.losses)
    fresh.step(again.losses)
    alike(name, weights_of(case), weights_of(again), torch.float32)


@rows("zeros")
def test_gradients_set_to_zero_are_not_mistaken_for_any(name: str) -> None:
    case, optimizer = everyone(name)
    other, reference = everyone(name)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step(case.losses)
        reference.step(other.losses)
    same(weights_of(case), weights_of(other))
