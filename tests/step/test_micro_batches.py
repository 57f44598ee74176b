"""Candidates that come in micro-batches: the very step that one batch of all of them makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import GreedyFilter, SelectiveOptimizer, last_blocks
from tests.support.models import Case, Gain, SmallGPT, language_model, mlp, seeded, transformers_model

SIZES = [4, 1, 3]


def rows_of(sizes: list[int]) -> Iterator[Tensor]:
    yield from torch.arange(sum(sizes)).split(sizes)


def cases() -> dict[str, Callable[[], Case]]:
    return {
        "mlp": lambda: mlp(torch.float64, sum(SIZES)),
        "tied, shared positions": lambda: language_model(seeded(SmallGPT).double(), sum(SIZES)),
        "llama with lora": lambda: transformers_model("llama", lora=True)(torch.float64, sum(SIZES)),
        "a module without a rule": lambda: language_model(
            seeded(lambda: nn.Sequential(nn.Embedding(31, 6), Gain(6), nn.Linear(6, 31))).double(), sum(SIZES)
        ),
    }


def run(build: Callable[[], Case], sizes: list[int] | None, steps: int, **options: Any) -> list[Any]:
    case = build()
    if "last" in options:
        options["scored"] = last_blocks(case.model, options.pop("last"))

    def losses_of(rows: Tensor | None = None) -> Tensor:
        if isinstance(case.model, nn.Sequential):
            batch = {k: v if rows is None else v[rows] for k, v in case.candidates.items()}
            scores = case.model(batch["input_ids"])
            return nn.functional.cross_entropy(scores.mT, batch["input_ids"], reduction="none").mean(1)
        return case.losses(rows)

    def closure() -> Any:
        if sizes is None:
            return losses_of()
        return (losses_of(rows) for rows in rows_of(sizes))

    def target() -> Tensor:
        return losses_of(torch.tensor([0, 5])) if isinstance(case.model, nn.Sequential) else case.target_losses()

    trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(trained, lr=0.01), case.model, target, filter=GreedyFilter(keep=3), **options
    )
    found: list[Any] = []
    for _ in range(steps):
        loss = optimizer.step(closure)
        assert optimizer.selection is not None
        found += [loss, optimizer.selection.losses, optimizer.selection.gram, optimizer.selection.weights]
        found.append([p.grad for p in trained])
    return [*found, [p.detach() for p in trained]]


@pytest.mark.parametrize("options", [{"combine": "factors"}, {"combine": "graph"}, {"combine": "auto"}], ids=str)
@pytest.mark.parametrize("build", cases().values(), ids=cases())
def test_micro_batches_make_the_step_of_one_batch(build: Callable[[], Case], options: dict[str, Any]) -> None:
    """Gram matrix with what lies between them, weights, gradients and parameters, over three steps."""
    torch.testing.assert_close(run(build, SIZES, 3, **options), run(build, None, 3, **options), rtol=1e-7, atol=1e-10)


def test_micro_batches_with_few_scored_layers() -> None:
    build = cases()["tied, shared positions"]
    options = {"combine": "graph", "last": 1}
    torch.testing.assert_close(run(build, SIZES, 2, **options), run(build, None, 2, **options), rtol=1e-7, atol=1e-10)


def test_micro_batches_of_different_lengths() -> None:
    """Padded for the products alone; one may not reach a parameter at all."""
    model = seeded(lambda: nn.ModuleDict({"a": nn.Embedding(7, 5), "b": nn.Linear(5, 3), "c": nn.Linear(5, 3)}))
    model = model.double()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(7, (n, t), generator=generator) for n, t in ((2, 6), (3, 2), (1, 9))]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor, which: str) -> Tensor:
            return self.parts[which](self.parts["a"](x)).square().sum((1, 2))  # type: ignore[no-any-return]

    whole = Both()

    def batches() -> Iterator[Tensor]:
        for batch, which in zip(ids, ("b", "c", "b"), strict=True):
            yield whole(batch, which)

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(whole.parameters(), lr=0.1), whole, lambda: whole(ids[0], "b"), filter=GreedyFilter(keep=3)
    )
    expected = []
    for batch, which in zip(ids, ("b", "c", "b"), strict=True):
        for row in batch:
            gradients = torch.autograd.grad(
                whole(row[None], which).sum(), list(whole.parameters()), allow_unused=True, materialize_grads=True
            )
            expected.append(torch.cat([gradient.flatten() for gradient in gradients]))
    rows = torch.stack(expected)
    optimizer.backward(batches)
    selection = optimizer.selection
    assert selection is not None
    torch.testing.assert_close(selection.gram, 0.1 * rows @ rows.T)
    combined = torch.cat([p.grad.flatten() for p in whole.parameters() if p.grad is not None])
    weights = torch.zeros(6, dtype=torch.float64).index_put((selection.kept,), selection.weights)
    reached = torch.cat([torch.full((p.numel(),), p.grad is not None) for p in whole.parameters()])
    torch.testing.assert_close(combined, (weights @ rows)[reached])


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_a_spoilt_candidate_of_one_micro_batch_is_rejected(combine: str) -> None:
    case = mlp(torch.float64, 8)
    case.candidates["x"][5] = torch.nan
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, combine=combine
    )
    optimizer.step(lambda: (case.losses(rows) for rows in rows_of(SIZES)))
    assert optimizer.selection is not None
    assert optimizer.selection.rejected.tolist() == [5]
    assert optimizer.selection.combine == "factors"
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in case.model.parameters())


def test_what_does_not_go_with_micro_batches_says_so_before_anything_runs() -> None:
    case = mlp(torch.float64, 8)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses, combine="rerun"
    )

    def closure(rows: Tensor | None = None) -> Iterator[Tensor]:
        raise AssertionError("not run")
        yield

    with pytest.raises(ValueError, match=r"combine=\"rerun\" takes the losses of one batch"):
        optimizer.step(closure)
    optimizer.combine = "factors"
    with pytest.raises(ValueError, match="sample_ids tells"):
        optimizer.backward(closure, sample_ids=torch.zeros(2, 3, dtype=torch.int64))


def test_an_error_in_a_later_micro_batch_leaves_everything_as_it_was() -> None:
    case = mlp(torch.float64, 8)
    optimizer = SelectiveOptimizer(torch.optim.AdamW(case.model.parameters()), case.model, case.target_losses)

    def closure() -> Iterator[Tensor]:
        yield case.losses(torch.arange(4))
        raise LookupError("no more data")

    with pytest.raises(LookupError):
        optimizer.step(closure)
    assert optimizer.selection is None
    assert all(p.grad is None for p in case.model.parameters())
    assert not any(module._forward_hooks for module in case.model.modules())
    optimizer.step(case.losses)
