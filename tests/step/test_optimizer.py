"""What users meet: closures, degenerate batches, rejected candidates, accumulation and mixed precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import (
    GreedyFilter,
    KeepAll,
    Matching,
    NonNegativeLeastSquares,
    SelectiveOptimizer,
    TargetGradient,
    TopKFilter,
    UniformWeights,
    WeightSolution,
    last_blocks,
)
from tests.support.models import SmallGPT, language_model, mlp, seeded
from tests.support.oracles import candidate_gradients

WAYS = ["factors", "graph"]


def build(combine: str = "factors", *, lr: float = 0.01, **options: Any) -> tuple[Any, SelectiveOptimizer]:
    case = mlp(torch.float64, 6)
    inner = options.pop("inner", torch.optim.AdamW)(case.model.parameters(), lr=lr)
    target = options.pop("target", case.target_losses)
    return case, SelectiveOptimizer(
        inner, case.model, target, **{"filter": GreedyFilter(keep=3), "combine": combine, **options}
    )


def snapshot(case: Any, optimizer: SelectiveOptimizer) -> Any:
    """Everything a step may change."""
    return copy.deepcopy(
        (
            list(case.model.parameters()),
            [p.grad for p in case.model.parameters()],
            optimizer.optimizer.state_dict(),
            optimizer.state_dict()["selective"],
        )
    )


@pytest.fixture
def unchanged() -> Callable[[Any, SelectiveOptimizer, Callable[[], Any]], None]:
    """Runs something that must raise, and checks that nothing was lost or half-applied and the next step works."""

    def run(case: Any, optimizer: SelectiveOptimizer, failing: Callable[[], Any]) -> None:
        for parameter in case.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before, selection = snapshot(case, optimizer), optimizer.selection
        held = [p.grad for p in case.model.parameters()]
        failing()
        after = snapshot(case, optimizer)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert all(p.grad is grad for p, grad in zip(case.model.parameters(), held, strict=True))
        assert optimizer.selection is selection
        for module in case.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        optimizer.step(case.losses)
        assert optimizer.selection is not None
        assert not optimizer.selection.skipped

    return run


# ---------------------------------------------------------------------- closures


WRONG_CLOSURES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "reduced": (
        lambda losses: losses.mean(),
        ValueError,
        r"one loss for each candidate.*reduction=.none.*shape \(\)",
    ),
    "two axes": (lambda losses: losses[:, None], ValueError, r"got shape \(6, 1\)"),
    "detached": (lambda losses: losses.detach(), ValueError, "got losses that are detached"),
    "empty": (lambda losses: losses[:0], ValueError, "got an empty batch"),
    "fewer": (lambda losses: losses[:4], ValueError, "returned 4 losses, but the model ran on 6 rows"),
    "a list": (lambda losses: list(losses), TypeError, "got list"),
    "an iterator of numbers": (lambda losses: iter(losses.tolist()), TypeError, "The closure must return one loss"),
    "an iterator of scalars": (lambda losses: iter(losses), ValueError, "keep the candidates apart"),
    "an iterator of nothing": (lambda losses: iter(()), ValueError, "yields losses"),
    "a number": (lambda losses: float(losses.detach().sum()), TypeError, "got float"),
}


@pytest.mark.parametrize("method", ["step", "backward"])
@pytest.mark.parametrize("combine", WAYS)
@pytest.mark.parametrize("wrong", WRONG_CLOSURES)
def test_wrong_returns_say_what_a_closure_must_return(
    wrong: str, combine: str, method: str, unchanged: Callable[..., None]
) -> None:
    change, error, message = WRONG_CLOSURES[wrong]
    case, optimizer = build(combine)

    def failing() -> None:
        with pytest.raises(error, match=message):
            getattr(optimizer, method)(lambda: change(case.losses()))

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("combine", WAYS)
def test_a_closure_that_raises_leaves_everything_as_it_was(combine: str, unchanged: Callable[..., None]) -> None:
    case, optimizer = build(combine)

    def raises() -> Tensor:
        case.losses()
        raise KeyError("the user's own")

    def failing() -> None:
        with pytest.raises(KeyError, match="the user's own"):
            optimizer.step(raises)

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("combine", WAYS)
def test_a_backward_pass_that_raises_leaves_everything_as_it_was(combine: str, unchanged: Callable[..., None]) -> None:
    case, optimizer = build(combine)
    broken = True

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            if broken:
                raise ArithmeticError("in the backward")
            return grads[0]

    case.model.middle.register_forward_hook(
        lambda module, args, output: Fails.apply(output) if broken else None  # type: ignore[no-untyped-call]
    )

    def failing() -> None:
        nonlocal broken
        with pytest.raises(ArithmeticError, match="in the backward"):
            optimizer.step(case.losses)
        broken = False
        case.model.middle._forward_hooks.clear()

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("combine", WAYS)
def test_a_closure_is_run_once_with_gradients_enabled(combine: str) -> None:
    case, optimizer = build(combine)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        losses: Tensor = case.losses()
        return losses

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert seen == [True]
    assert not loss.requires_grad
    assert optimizer.selection is not None
    assert not optimizer.selection.skipped


def test_step_without_a_closure_is_the_inner_step() -> None:
    for closure in (None, lambda: None):
        case, optimizer = build()
        twin = copy.deepcopy(case.model)
        bare = torch.optim.AdamW(twin.parameters(), lr=0.01)
        for model in (case.model, twin):
            case.losses_of(model, case.candidates).mean().backward()
        bare.step()
        assert optimizer.step(closure) is None
        torch.testing.assert_close(list(case.model.parameters()), list(twin.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("combine", WAYS)
def test_a_closure_with_its_own_backward_gets_the_inner_step_and_one_warning(combine: str, as_float: bool) -> None:
    case, optimizer = build(combine)
    twin = copy.deepcopy(case.model)
    bare = torch.optim.AdamW(twin.parameters(), lr=0.01)

    def own(model: nn.Module, opt: torch.optim.Optimizer) -> Any:
        opt.zero_grad()
        loss = case.losses_of(model, case.candidates).mean()
        loss.backward()
        return loss.item() if as_float else loss

    with pytest.warns(UserWarning, match="ran its own backward and returned a scalar"):
        optimizer.step(lambda: own(case.model, optimizer))
    optimizer.step(lambda: own(case.model, optimizer))  # a second warning would be an error
    for _ in range(2):
        own(twin, bare)
        bare.step()
    torch.testing.assert_close(list(case.model.parameters()), list(twin.parameters()), rtol=1e-12, atol=1e-14)


def test_step_discards_the_old_gradient_and_leaves_the_applied_one() -> None:
    case, optimizer = build(inner=torch.optim.SGD)
    before = [p.detach().clone() for p in case.model.parameters()]
    for parameter in case.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    optimizer.step(case.losses)
    for parameter, old in zip(case.model.parameters(), before, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), old - 0.01 * parameter.grad)


# ---------------------------------------------------------------------- degenerate candidates


def combined(case: Any, optimizer: SelectiveOptimizer) -> dict[str, Tensor]:
    """The oracle's gradient under the weights that were chosen."""
    selection = optimizer.selection
    assert selection is not None
    gradients = candidate_gradients(case)
    return {
        name: sum(  # type: ignore[misc]
            (w * gradients[i][name] for i, w in zip(selection.kept.tolist(), selection.weights, strict=True)),
            torch.zeros_like(gradients[0][name]),
        )
        for name in gradients[0]
    }


@pytest.mark.parametrize("combine", WAYS)
def test_one_candidate_is_kept_whole_or_not_at_all(combine: str) -> None:
    case = mlp(torch.float64, 1)
    inner = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    optimizer = SelectiveOptimizer(inner, case.model, case.losses, combine=combine)
    optimizer.backward(case.losses)
    selection = optimizer.selection
    assert selection is not None
    assert selection.kept.tolist() == [0]
    assert selection.weights.tolist() == [1.0]
    assert selection.residual == pytest.approx(0.0, abs=1e-10)
    expected = torch.autograd.grad(case.losses()[0], list(case.model.parameters()))
    torch.testing.assert_close([p.grad for p in case.model.parameters()], list(expected))


@pytest.mark.parametrize("keep", [6, 7, 100, 1.0])
def test_a_budget_of_all_and_more_keeps_whatever_helps(keep: float) -> None:
    case, optimizer = build(filter=GreedyFilter(keep=keep))
    optimizer.step(case.losses)
    assert optimizer.selection is not None
    assert 1 <= len(optimizer.selection.kept) <= 6


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("combine", WAYS)
def test_when_nothing_is_kept_the_step_is_skipped_untouched(combine: str, scale: float) -> None:
    case, optimizer = build(combine)
    for tensor in case.candidates.values():
        tensor[:] = tensor[:1].clone()  # all alike, so that one target is opposed to all of them
    optimizer.target = case.losses  # type: ignore[assignment]
    optimizer.step(case.losses)
    optimizer.target = lambda: -case.losses()  # type: ignore[assignment]
    before = snapshot(case, optimizer)

    loss = optimizer.step(case.losses)
    selection = optimizer.selection
    assert selection is not None
    assert selection.skipped
    assert selection.combine == "skipped"
    assert (selection.residual, selection.cosine, selection.effective_size) == (1.0, 0.0, 0.0)
    torch.testing.assert_close(loss, case.losses().detach().mean())
    after = snapshot(case, optimizer)
    torch.testing.assert_close((after[0], after[2]), (before[0], before[2]), rtol=0, atol=0)
    assert all(p.grad is None for p in case.model.parameters())

    optimizer.backward(case.losses, grad_scale=scale)
    for parameter in case.model.parameters():  # a scaler must find something to look at
        assert parameter.grad is None if scale == 1.0 else not parameter.grad.any()
    optimizer.step()
    torch.testing.assert_close(snapshot(case, optimizer)[0], before[0], rtol=0, atol=0)

    optimizer.backward(case.losses)  # skipped again,
    optimizer.target = case.losses  # type: ignore[assignment]
    optimizer.backward(case.losses)  # but not this one
    optimizer.step()
    assert not torch.equal(next(case.model.parameters()), before[0][0])


def test_a_candidate_without_labels_gets_no_weight_and_does_no_harm() -> None:
    case = language_model(seeded(SmallGPT).double(), 4)
    case.candidates["labels"][2] = -100
    for stage in (GreedyFilter(keep=4), TopKFilter(keep=4), KeepAll()):
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, filter=stage
        )
        optimizer.backward(case.losses)
        selection = optimizer.selection
        assert selection is not None
        assert len(selection.rejected) == 0
        assert 2 not in selection.kept[selection.weights > 0].tolist()
        assert not selection.gram[2].any()
        optimizer.zero_grad()


def test_duplicates_share_one_candidates_weight() -> None:
    results = []
    for rows in ([0, 1, 2, 3], [0, 1, 2, 3, 1, 1]):
        case, optimizer = build(filter=GreedyFilter(keep=3))
        optimizer.backward(lambda case=case, rows=rows: case.losses(torch.tensor(rows)))
        results.append([p.grad for p in case.model.parameters()])
        assert optimizer.selection is not None
        assert not {4, 5} & set(optimizer.selection.kept.tolist())
    # AdamW's reference is the mean of the candidates, so only the euclidean problem is the same with duplicates.
    results = []
    for rows in ([0, 1, 2, 3], [0, 1, 2, 3, 1, 1]):
        case, optimizer = build(filter=GreedyFilter(keep=3), metric="euclidean")
        optimizer.backward(lambda case=case, rows=rows: case.losses(torch.tensor(rows)))
        results.append([p.grad for p in case.model.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("metric", ["preconditioned", "update", "euclidean"])
def test_a_cold_start_is_finite_and_useful_at_any_gradient_scale(metric: str, scale: float) -> None:
    """In float32; the scale comes with losses of another unit."""
    case = mlp(torch.float32, 6)
    inner = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    optimizer = SelectiveOptimizer(
        inner, case.model, lambda: scale * case.target_losses(), metric=metric, filter=GreedyFilter(keep=3)
    )
    for _ in range(2):
        optimizer.backward(lambda: scale * case.losses())
        selection = optimizer.selection
        assert selection is not None
        assert selection.gram.isfinite().all()
        assert not selection.skipped
        assert selection.cosine > 0.1
        assert math.isfinite(selection.predicted_decrease)
        optimizer.zero_grad()
        optimizer.step(lambda: scale * case.losses())


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_a_learning_rate_of_zero_selects_as_usual_and_predicts_nothing(inner: Any) -> None:
    """A scheduler's first step."""
    kept = []
    for lr in (0.0, 1.0):
        case, optimizer = build(inner=inner, lr=lr)
        optimizer.backward(case.losses)
        selection = optimizer.selection
        assert selection is not None
        kept.append((selection.kept.tolist(), selection.weights.tolist(), selection.cosine))
        assert (selection.predicted_decrease == 0.0) == (lr == 0.0)
    assert kept[0] == kept[1]


# ---------------------------------------------------------------------- rejection


def spoilt(case: Any, rows: list[int], value: float) -> Callable[..., Tensor]:
    """The candidates with some rows' inputs replaced, so that NaN or infinity runs through every layer."""
    batch = {key: tensor.clone() for key, tensor in case.candidates.items()}
    batch["x"][rows] = value

    def closure(kept: Tensor | None = None) -> Tensor:
        chosen = batch if kept is None else {key: tensor[kept] for key, tensor in batch.items()}
        losses: Tensor = case.losses_of(case.model, chosen)
        return losses

    return closure


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["preconditioned", "euclidean"])
@pytest.mark.parametrize("combine", WAYS)
def test_spoilt_candidates_are_rejected_and_the_others_treated_as_if_alone(
    combine: str, metric: str, value: float
) -> None:
    case, optimizer = build(combine, metric=metric, filter=GreedyFilter(keep=2))
    optimizer.backward(spoilt(case, [1, 4], value))
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == [1, 4]
    assert not selection.gram[[1, 4]].any()
    assert not selection.gram[:, [1, 4]].any()
    given = [p.grad for p in case.model.parameters()]

    alone_case, alone = build(metric=metric, filter=GreedyFilter(keep=2))
    others = torch.tensor([0, 2, 3, 5])
    alone.backward(lambda: alone_case.losses(others))
    assert alone.selection is not None
    assert selection.kept.tolist() == others[alone.selection.kept].tolist()
    torch.testing.assert_close(selection.weights, alone.selection.weights)
    torch.testing.assert_close(given, [p.grad for p in alone_case.model.parameters()])
    # Every layer has a rule and all are scored, so even without a usable graph the factors serve.
    assert selection.combine == "factors"


def test_a_loss_that_is_not_finite_rejects_although_the_gradient_would_be() -> None:
    case, optimizer = build()
    shift = torch.tensor([0.0, 0.0, math.nan, 0.0, math.inf, 0.0], dtype=torch.float64)
    optimizer.backward(lambda: case.losses() + shift)
    assert optimizer.selection is not None
    assert optimizer.selection.rejected.tolist() == [2, 4]


def test_a_share_counts_all_that_were_offered() -> None:
    case, optimizer = build(filter=TopKFilter(keep=0.5), target=lambda: case.losses())
    optimizer.backward(spoilt(case, [0], math.nan))
    assert optimizer.selection is not None
    assert len(optimizer.selection.kept) == 3


@pytest.mark.parametrize("accepts_rows", [True, False])
def test_graph_with_partial_rules_reruns_the_finite_rows_or_skips(accepts_rows: bool) -> None:
    case, optimizer = build("graph", scored=lambda name, p: name.startswith("last"))
    closure = spoilt(case, [1], math.nan)
    optimizer.backward((lambda rows=None: closure(rows)) if accepts_rows else (lambda: closure()))
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == [1]
    assert selection.combine == ("rerun" if accepts_rows else "skipped")
    assert selection.skipped != accepts_rows
    if accepts_rows:
        for name, parameter in case.model.named_parameters():
            torch.testing.assert_close(parameter.grad, combined(case, optimizer)[name])
    else:
        assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("combine", WAYS)
def test_all_rejected_skips_and_returns_nan(combine: str) -> None:
    case, optimizer = build(combine)
    before = snapshot(case, optimizer)
    loss = optimizer.step(spoilt(case, list(range(6)), math.nan))
    assert loss.isnan()
    assert optimizer.selection is not None
    assert optimizer.selection.skipped
    assert optimizer.selection.rejected.tolist() == list(range(6))
    torch.testing.assert_close(snapshot(case, optimizer)[0], before[0], rtol=0, atol=0)
    optimizer.step(case.losses)
    assert not optimizer.selection.skipped


BAD_TARGETS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "nan": (lambda case: case.target_losses() * math.nan, ValueError, "Expected finite target losses"),
    "nan gradient": (
        lambda case: (case.target_losses() * 0).sqrt(),
        ValueError,
        "Expected a finite target gradient",
    ),
    "reduced": (
        lambda case: case.target_losses().mean(),
        ValueError,
        r"shape \(m,\) with m > 0, got shape \(\)",
    ),
    "empty": (lambda case: case.target_losses()[:0], ValueError, r"got shape \(0,\)"),
    "detached": (lambda case: case.target_losses().detach(), ValueError, "do not detach"),
    "none": (lambda case: None, TypeError, "got NoneType"),
}


@pytest.mark.parametrize("bad", BAD_TARGETS)
def test_a_target_that_cannot_serve_is_an_error_that_changes_nothing(bad: str, unchanged: Callable[..., None]) -> None:
    make, error, message = BAD_TARGETS[bad]
    case, optimizer = build(target=lambda: make(case) if broken else case.target_losses())
    broken = True

    def failing() -> None:
        nonlocal broken
        with pytest.raises(error, match=message):
            optimizer.step(case.losses)
        broken = False

    unchanged(case, optimizer, failing)


# ---------------------------------------------------------------------- accumulation, clipping, mixed precision


@pytest.mark.parametrize("combine", [*WAYS, "rerun"])
def test_backward_adds_and_scales_as_a_loss_does(combine: str) -> None:
    case, optimizer = build(combine)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    expected: dict[str, Tensor] = {}
    for rows, scale in ((first, 1.0), (second, 512.0)):
        twin_case, twin = build(combine)
        twin.backward(lambda rows=None, part=rows, c=twin_case: c.losses(part if rows is None else part[rows]))
        for name, parameter in twin_case.model.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, torch.zeros(())) + scale * parameter.grad
        optimizer.backward(
            lambda rows=None, part=rows: case.losses(part if rows is None else part[rows]), grad_scale=scale
        )
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("combine", WAYS)
def test_a_grad_scaler_with_clipping_makes_the_unscaled_steps(combine: str, fused: bool) -> None:
    """In its usual place; an overflow makes it back off, and the step after is clean."""
    results = []
    for scaled in (False, True):
        case = mlp(torch.float32, 6)
        inner = torch.optim.AdamW(case.model.parameters(), lr=0.01, fused=fused)
        optimizer = SelectiveOptimizer(inner, case.model, case.target_losses, combine=combine)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            if step == 2 and scaled:  # a gradient that overflows only because of the scale
                scale = float(scaler.scale(torch.ones(())))
                optimizer.backward(lambda case=case: 1e36 * case.losses(), grad_scale=scale)
                assert optimizer.selection is not None
                assert len(optimizer.selection.rejected)
                scaler.unscale_(optimizer)
                before = [p.detach().clone() for p in case.model.parameters()]
                scaler.step(optimizer)
                scaler.update()
                torch.testing.assert_close(list(case.model.parameters()), before, rtol=0, atol=0)
                assert scaler.get_scale() == scale / 2
                optimizer.zero_grad()
            optimizer.backward(case.losses, grad_scale=scaler.scale(torch.ones(())))
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(case.model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
        results.append(list(case.model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_parameters_outside_the_optimizer_get_no_gradient() -> None:
    for combine in WAYS:
        case = mlp(torch.float64, 6)
        inner = torch.optim.AdamW([*case.model.first.parameters(), case.model.last.weight])  # type: ignore[misc,union-attr]
        optimizer = SelectiveOptimizer(inner, case.model, case.target_losses, combine=combine)
        optimizer.step(case.losses)
        got = [name for name, p in case.model.named_parameters() if p.grad is not None]
        assert got == ["first.weight", "first.bias", "last.weight"]


def test_parameters_frozen_and_thawed_between_steps() -> None:
    case, optimizer = build()
    for trained in (["first"], ["first", "last"], ["last"]):
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in trained)
        optimizer.step(case.losses)
        with_gradient = {name.split(".")[0] for name, p in case.model.named_parameters() if p.grad is not None}
        assert set(trained) <= with_gradient
        assert {row.name.split(".")[0] for row in optimizer.coverage} == set(trained)


def test_a_parameter_the_losses_do_not_reach_keeps_none() -> None:
    for combine in WAYS:
        case = mlp(torch.float64, 6)
        case.model.unused = nn.Linear(2, 2).double()  # type: ignore[assignment]
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, combine=combine
        )
        optimizer.step(case.losses)
        assert case.model.unused.weight.grad is None  # type: ignore[union-attr]
        assert case.model.unused.weight not in optimizer.state  # type: ignore[union-attr]


# ---------------------------------------------------------------------- standing detection


class LateTie(nn.Module):
    """Reads a weight of its own past the layer once a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle, self.late = nn.Embedding(7, 4), nn.Linear(4, 4), False
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.tokens(ids)))
        if self.late:
            hidden = hidden + functional.linear(hidden, self.middle.weight)
        scores: Tensor = self.head(hidden)
        return scores


@pytest.mark.parametrize("scored", ["all", "some"])
@pytest.mark.parametrize("combine", [*WAYS, "rerun"])
def test_a_branch_first_taken_at_step_five_is_noticed_then(
    combine: str, scored: str, unchanged: Callable[..., None]
) -> None:
    model = seeded(LateTie).double()
    ids = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))

    def losses(rows: Tensor | None = None) -> Tensor:
        return model(ids if rows is None else ids[rows]).logsumexp(-1).sum(1)

    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(model.parameters()),
        model,
        losses,
        combine=combine,
        scored=None if scored == "all" else lambda name, p: name.startswith("middle"),
    )
    for _ in range(4):
        optimizer.step(losses)

    class Holder:
        pass

    holder: Any = Holder()
    holder.model, holder.losses = model, losses
    model.late = True

    def failing() -> None:
        with pytest.raises(RuntimeError, match=r"middle\.weight.*Call the layer as a module"):
            optimizer.step(losses)
        model.late = False

    unchanged(holder, optimizer, failing)


# ---------------------------------------------------------------------- stages of the user's own


def test_stages_get_further_metrics_and_one_seed_for_each_step() -> None:
    draws: list[float] = []

    class Both(GreedyFilter.__mro__[1]):  # type: ignore[misc]  # FilterStage
        metrics = ("update", "euclidean")

        def __call__(self, matching: Matching, *more: Matching) -> Tensor:
            draws.append(float(torch.rand((), generator=matching.generator)))
            assert len(more) == 2
            assert not torch.equal(matching.gram, more[1].gram)
            return torch.tensor([2, 0])

    class First:
        def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
            assert len(matching) == 2
            return WeightSolution(weights=torch.tensor([3.0, 1.0]), slack=torch.zeros(2), iterations=1, converged=False)

    for _ in range(2):
        case, optimizer = build(filter=Both(), weight=First(), seed=11)
        for _ in range(2):
            optimizer.step(case.losses)
        selection = optimizer.selection
        assert selection is not None
        assert selection.kept.tolist() == [2, 0]
        assert selection.weights.tolist() == [0.75, 0.25]
        assert selection.fitted_scale == 4.0
        assert not selection.converged
        assert selection.effective_size == pytest.approx(1.6)
    assert draws[:2] == draws[2:]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    ("kept", "weights", "message"),
    [
        (torch.tensor([0, 0]), torch.ones(2), "different indices"),
        (torch.tensor([9]), torch.ones(1), "different indices"),
        (torch.tensor([0.5]), torch.ones(1), "int64"),
        (torch.tensor([1, 2]), torch.tensor([1.0, -0.1]), "finite weights >= 0"),
        (torch.tensor([1, 2]), torch.tensor([1.0, math.nan]), "finite weights >= 0"),
        (torch.tensor([1, 2]), torch.ones(3), "2 finite weights"),
    ],
)
def test_stages_that_return_nonsense_are_told_so(
    kept: Tensor, weights: Tensor, message: str, unchanged: Callable[..., None]
) -> None:
    case, optimizer = build()
    good = (optimizer.filter, optimizer.weight)

    def failing() -> None:
        optimizer.filter = lambda matching: kept  # type: ignore[assignment]
        optimizer.weight = lambda matching: WeightSolution(  # type: ignore[assignment]
            weights=weights, slack=weights, iterations=0, converged=True
        )
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.step(case.losses)
        optimizer.filter, optimizer.weight = good

    unchanged(case, optimizer, failing)


@pytest.mark.parametrize("normalize", ["sum", "norm", None])
def test_normalisation(normalize: Any) -> None:
    case, optimizer = build(weight=NonNegativeLeastSquares(normalize=normalize))
    optimizer.backward(case.losses)
    selection = optimizer.selection
    assert selection is not None
    weights, gram = selection.weights, selection.gram
    if normalize == "sum":
        assert float(weights.sum()) == pytest.approx(1.0)
    elif normalize == "norm":
        block = gram[selection.kept][:, selection.kept]
        assert float(weights @ block @ weights) == pytest.approx(float(gram.mean()))
    else:
        assert float(weights.sum()) == pytest.approx(selection.fitted_scale)
    cross = selection.cross_gram[selection.kept]
    curvature = float(weights @ gram[selection.kept][:, selection.kept] @ weights)
    assert selection.predicted_decrease == pytest.approx(float(cross @ weights) - curvature / 2)


def test_small_memory_limits_change_nothing_but_memory() -> None:
    results = []
    for limit in (None, 1):
        case, optimizer = build(memory_limit=limit)
        optimizer.step(case.losses)
        results.append([*case.model.parameters()])
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "manhattan"}, ValueError, "metric must be one of 'preconditioned'"),
        ({"combine": "magic"}, ValueError, "combine must be one of 'auto'"),
        ({"gram": "guess"}, ValueError, 'gram must be "exact" or a Sketch'),
        ({"memory_limit": 0}, ValueError, "memory_limit must be a positive number of bytes"),
        ({"filter": 3}, ValueError, "Expected a callable stage"),
        ({"scored": lambda name, p: False}, ValueError, "accepts none of the 6 updated"),
        ({"target": None}, TypeError, "Expected a closure that returns the target losses"),
    ],
)
def test_construction_refuses_what_a_step_could_not_do(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(**options)


def test_construction_refuses_foreign_parameters_models_and_optimizers() -> None:
    model = nn.Linear(2, 2)
    inner = torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"Group 0 holds a parameter of shape \(3,\) that is not the model's"):
        SelectiveOptimizer(inner, model, lambda: torch.zeros(1))
    with pytest.raises(TypeError, match=r"Expected a torch\.optim\.Optimizer"):
        SelectiveOptimizer(model, model, lambda: torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Expected the model as an nn\.Module"):
        SelectiveOptimizer(inner, lambda x: x, lambda: torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="No preconditioner is known"):
        SelectiveOptimizer(torch.optim.LBFGS(model.parameters()), model, lambda: torch.zeros(1))


def test_rerun_needs_a_closure_that_accepts_rows_and_says_so_before_anything_runs() -> None:
    _case, optimizer = build("rerun")
    with pytest.raises(TypeError, match=r"closure\(rows=kept\)"):
        optimizer.step(lambda: pytest.fail("the closure ran"))


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case, optimizer = build()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="Expected one process, got 2"):
        optimizer.step(case.losses)


# ---------------------------------------------------------------------- the target over time


def counted_target(case: Any, calls: list[int]) -> Callable[[], Tensor]:
    def target() -> Tensor:
        calls.append(1)
        losses: Tensor = case.target_losses()
        return losses

    return target


def test_a_target_is_evaluated_every_so_many_steps_and_folded_into_p_every_step() -> None:
    case, optimizer = build()
    calls: list[int] = []
    optimizer.target = TargetGradient(counted_target(case, calls), refresh_every=3)
    counts = []
    for _ in range(7):
        optimizer.step(case.losses)
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2, 2, 3]


def test_decay_averages_the_target_gradients() -> None:
    case, optimizer = build(lr=0.0, metric="euclidean")
    parts = [torch.tensor([0]), torch.tensor([1]), torch.tensor([2])]
    single = []
    for part in parts:
        optimizer.target = lambda part=part: case.target_losses(part)  # type: ignore[assignment]
        optimizer.backward(case.losses)
        assert optimizer.selection is not None
        single.append(optimizer.selection.cross_gram)
    case, optimizer = build(lr=0.0, metric="euclidean")
    remaining = iter(parts)
    optimizer.target = TargetGradient(lambda: case.target_losses(next(remaining)), decay=0.75)
    for _ in range(3):
        optimizer.backward(case.losses)
    expected = 0.75 * (0.75 * single[0] + 0.25 * single[1]) + 0.25 * single[2]
    assert optimizer.selection is not None
    torch.testing.assert_close(optimizer.selection.cross_gram, expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"refresh_every": 0}, ValueError), ({"refresh_every": 1.5}, ValueError), ({"decay": 1.0}, ValueError)],
)
def test_target_options_are_checked(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        TargetGradient(lambda: torch.zeros(1), **options)


def test_uniform_weights_and_scored_blocks_go_with_any_stage() -> None:
    case = language_model(seeded(SmallGPT).double(), 5)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()),
        case.model,
        case.target_losses,
        filter=TopKFilter(keep=2),
        weight=UniformWeights(),
        scored=last_blocks(case.model, 1),
    )
    optimizer.step(case.losses)
    assert optimizer.selection is not None
    assert optimizer.selection.weights.tolist() == [0.5, 0.5]
    scored = {row.name for row in optimizer.coverage if row.scored}
    assert scored == {name for name, _ in case.model.named_parameters() if name.startswith("blocks.1")}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# ---------------------------------------------------------------------- what goes wrong late


def test_a_closure_with_its_own_backward_that_returns_none_keeps_its_gradients() -> None:
    """As a closure of manual optimisation does."""
    for combine in WAYS:
        case, optimizer = build(combine)
        twin = copy.deepcopy(case.model)
        bare = torch.optim.AdamW(twin.parameters(), lr=0.01)
        bare.zero_grad()
        case.losses_of(twin, case.candidates).mean().backward()
        bare.step()
        optimizer.step(lambda case=case: case.losses().mean().backward())
        torch.testing.assert_close(list(case.model.parameters()), list(twin.parameters()))


class LateInfinity(nn.Module):
    """The gradient of a row whose first input is zero is infinite, in the first layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        away = torch.sqrt(hidden - hidden.detach() + (x[:, :1] != 0))
        scores: Tensor = self.last(torch.tanh(hidden) + away)
        return scores


@pytest.mark.parametrize("accepts_rows", [True, False])
def test_a_gradient_that_is_infinite_where_nothing_is_scored_is_never_applied(accepts_rows: bool) -> None:
    model = seeded(LateInfinity).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[2, 0] = 0.0

    def losses(rows: Tensor | None = None) -> Tensor:
        return model(x if rows is None else x[rows]).square().sum(1)

    before = copy.deepcopy(list(model.parameters()))
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(x[:1]).square().sum(1),
        filter=GreedyFilter(keep=1),
        scored=lambda name, p: name.startswith("last"),
        combine="graph",
    )
    optimizer.step(losses if accepts_rows else lambda: losses())
    selection = optimizer.selection
    assert selection is not None
    assert 2 not in selection.kept.tolist()
    assert selection.combine == ("rerun" if accepts_rows else "skipped")
    assert all(p.isfinite().all() for p in model.parameters())
    assert accepts_rows != torch.equal(next(model.parameters()), before[0])


def test_a_gradient_whose_square_is_not_finite_is_rejected() -> None:
    case = mlp(torch.float32, 6)
    factor = torch.ones(6)
    factor[3] = 1e25
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(case.model.parameters(), lr=0.1), case.model, case.target_losses, metric="euclidean"
    )
    optimizer.step(lambda: factor * case.losses())
    assert optimizer.selection is not None
    assert optimizer.selection.rejected.tolist() == [3]
    assert not optimizer.selection.skipped


def test_an_inner_step_that_raises_leaves_gradients_and_counters_as_they_were(unchanged: Callable[..., None]) -> None:
    case, optimizer = build()

    def refuse(*args: Any) -> None:
        raise ArithmeticError("by the user's hook")

    def failing() -> None:
        handle = optimizer.optimizer.register_step_pre_hook(refuse)
        with pytest.raises(ArithmeticError, match="by the user's hook"):
            optimizer.step(case.losses)
        handle.remove()

    unchanged(case, optimizer, failing)


def test_the_first_backward_may_overflow() -> None:
    """As that of every fresh GradScaler does; the self-check waits for numbers it can compare."""
    case = mlp(torch.float32, 6)
    optimizer = SelectiveOptimizer(torch.optim.SGD(case.model.parameters(), lr=0.1), case.model, case.target_losses)
    optimizer.backward(lambda: 1e36 * case.losses(), grad_scale=2.0**16)
    assert not next(case.model.parameters()).grad.isfinite().all()  # type: ignore[union-attr]
    assert not optimizer._checks._seen
    optimizer.zero_grad()
    optimizer.backward(case.losses)
    assert optimizer._checks._seen


def test_a_new_target_is_evaluated_at_once() -> None:
    case, optimizer = build()
    optimizer.target = TargetGradient(case.target_losses, refresh_every=100)
    optimizer.backward(case.losses)
    calls: list[int] = []
    optimizer.target = TargetGradient(counted_target(case, calls), refresh_every=100)
    optimizer.backward(case.losses)
    assert len(calls) == 1


@pytest.mark.parametrize("select", [True, False])
def test_a_closure_without_candidates_does_not_apply_what_was_skipped(select: bool) -> None:
    """Not even a gradient of zero, which would decay momentum and parameters."""
    case, optimizer = build()
    optimizer.step(case.losses)
    optimizer.target = lambda: -case.losses()  # type: ignore[assignment]
    for tensor in case.candidates.values():
        tensor[:] = tensor[:1].clone()
    before = copy.deepcopy(list(case.model.parameters()))
    optimizer.backward(case.losses, grad_scale=2.0)
    assert optimizer.selection is not None
    assert optimizer.selection.skipped
    optimizer.step(lambda: None, select=select)
    torch.testing.assert_close(list(case.model.parameters()), before, rtol=0, atol=0)


def test_without_selecting_a_closure_is_run_and_the_gradient_applied() -> None:
    """As if there were no closure: once, gradients enabled, its value returned, the target left alone."""
    calls: list[bool] = []

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        return "value"

    results = []
    for given in (None, closure):
        case, optimizer = build()
        optimizer.backward(case.losses)
        optimizer.target = lambda: pytest.fail("the target was evaluated")  # type: ignore[assignment]
        with torch.no_grad():
            value = optimizer.step(given, select=False)
        assert value == (given and "value")
        results.append(list(case.model.parameters()))
    assert calls == [True]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_clearing_gradients_forgets_backwards_that_were_never_stepped() -> None:
    case, optimizer = build()
    for tensor in case.candidates.values():
        tensor[:] = tensor[:1].clone()
    optimizer.target = case.losses
    optimizer.step(case.losses)
    optimizer.backward(case.losses)  # a scaler may skip its step
    optimizer.zero_grad()
    optimizer.target = lambda: -case.losses()  # type: ignore[assignment]
    before = copy.deepcopy(list(case.model.parameters()))
    optimizer.backward(case.losses)
    optimizer.step()
    torch.testing.assert_close(list(case.model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("combine", WAYS)
def test_autocast_around_the_whole_step_stays_out_of_our_products(combine: str) -> None:
    results = []
    for whole in (False, True):
        case = language_model(seeded(SmallGPT), 4)
        inner = torch.optim.SGD(case.model.parameters(), lr=0.1)
        inside, outside = (torch.autocast("cpu", torch.bfloat16, enabled=on) for on in (True, whole))

        def cast(losses: Callable[[], Tensor], context: Any = inside) -> Tensor:
            with context:
                return losses()

        optimizer = SelectiveOptimizer(inner, case.model, lambda c=case: cast(c.target_losses), combine=combine)
        with outside:
            for _ in range(3):
                optimizer.step(lambda c=case: cast(c.losses))
        assert optimizer.selection is not None
        results.append((optimizer.selection.gram, [*case.model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combine", WAYS)
def test_half_precision_parameters_are_not_mistaken_for_uses_outside(combine: str, dtype: torch.dtype) -> None:
    for seed in range(8):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 20)
            ).to(dtype)
            ids, labels = torch.randint(20, (2, 8, 64))

        def losses(model: nn.Module = model, ids: Tensor = ids, labels: Tensor = labels) -> Tensor:
            return functional.cross_entropy(model(ids).float().mT, labels, reduction="none").mean(1)

        optimizer = SelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, losses, combine=combine)
        for _ in range(3):
            optimizer.step(losses)
        assert optimizer.selection is not None
        assert optimizer.selection.gram.dtype == torch.float32
