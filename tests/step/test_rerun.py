"""``combine="rerun"``: factors are dropped as soon as the Gram matrix has them, and the pass is repeated if need be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import Diagonal as DiagonalMap
from ftw_optim import (
    Factors,
    GreedyFilter,
    Kronecker,
    Preconditioner,
    RankOne,
    RotatedDiagonal,
    SelectiveOptimizer,
    Sketch,
)
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import SketchSums
from ftw_optim._gram.spec import GramSpec
from tests.support.models import CASES, SmallGPT, language_model, seeded

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from memory import LivePeak

from tests.support.layers import LateInfinity


def step(case: Any, combine: str, **options: Any) -> tuple[Any, list[Tensor | None]]:
    trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(trained, lr=0.01),
        case.model,
        case.target_losses,
        filter=GreedyFilter(keep=2),
        combine=combine,
        **options,
    )
    optimizer.step(case.losses)
    optimizer.step(case.losses)
    return optimizer, [parameter.grad for parameter in trained]


@pytest.mark.slow
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_the_step_is_that_of_the_factors(build: Any, self_check: bool) -> None:
    found = [step(build(torch.float64, 5), combine, self_check=self_check) for combine in ("factors", "rerun")]
    (one, expected), (other, gradients) = found
    assert one.selection.kept.tolist() == other.selection.kept.tolist()
    torch.testing.assert_close(other.selection.gram, one.selection.gram)
    torch.testing.assert_close(other.selection.weights, one.selection.weights)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)  # some normalise in float32
    assert str(other.coverage) == str(one.coverage)


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_a_candidate_whose_gradient_turns_out_to_be_infinite_is_as_if_it_had_not_been_there(scale: float) -> None:
    """It shows in the first layer, which comes last: until then it was part of what the others were compared by."""
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[2, 0] = 0.0
    calls: list[int] = []

    def run(inputs: Tensor) -> SelectiveOptimizer:
        model = seeded(LateInfinity).double()

        def losses(rows: Tensor | None = None) -> Tensor:
            calls.append(len(inputs) if rows is None else len(rows))
            return model(inputs if rows is None else inputs[rows]).square().sum(1)

        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.1),
            model,
            lambda: model(x[:1]).square().sum(1),
            filter=GreedyFilter(keep=2),
            combine="rerun",
        )
        optimizer.backward(losses, grad_scale=scale)
        return optimizer

    optimizer = run(x)
    selection = optimizer.selection
    assert selection is not None
    assert selection.rejected.tolist() == [2]
    if scale > 1.0:  # an overflow, for the scaler to see
        assert calls == [5]
        assert not all(bool(p.grad.isfinite().all()) for p in optimizer.param_groups[0]["params"] if p.grad is not None)
        return
    assert calls == [5, 4, len(selection.kept)]
    others = [0, 1, 3, 4]
    alone = run(x[others])
    assert alone.selection is not None
    torch.testing.assert_close(selection.gram[others][:, others], alone.selection.gram)
    assert not selection.gram[2].any()
    assert selection.kept.tolist() == [others[index] for index in alone.selection.kept.tolist()]
    torch.testing.assert_close(selection.weights, alone.selection.weights)


def test_the_self_check_finds_mixed_rows_in_a_streamed_pass() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(hidden - hidden.mean(0))  # type: ignore[no-any-return]

    model = seeded(Mixing).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def losses(rows: Tensor | None = None) -> Tensor:
        return model(x if rows is None else x[rows]).square().sum(1)  # type: ignore[no-any-return]

    optimizer = SelectiveOptimizer(torch.optim.AdamW(model.parameters()), model, losses, combine="rerun")
    with pytest.raises(RuntimeError, match="first"):
        optimizer.step(losses)


def test_factors_are_dropped_layer_by_layer() -> None:
    """Live tensors at the highest: many layers, long rows."""
    peaks = {}
    for combine in ("factors", "rerun"):
        case = language_model(seeded(lambda: SmallGPT(width=32, depth=10)), 8)
        rows = {key: value.repeat(1, 2) for key, value in case.candidates.items()}
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(case.model.parameters(), lr=0.01),
            case.model,
            case.target_losses,
            combine=combine,
            self_check=False,
            filter=GreedyFilter(keep=1),
        )

        def losses(some: Tensor | None = None, **kwargs: Tensor) -> Tensor:
            index = kwargs.get("rows", some)
            return case.losses_of(case.model, {k: v if index is None else v[index] for k, v in rows.items()})  # noqa: B023

        with LivePeak() as live:
            optimizer.step(losses)
        peaks[combine] = live.peak
    assert peaks["rerun"] < 0.9 * peaks["factors"]


class Mixed(Preconditioner):
    """Mixes all entries."""

    def apply(self, gradient: Tensor) -> Tensor:
        return gradient + gradient.flip(-1) / 2


WIDE_MAPS: dict[str, Preconditioner] = {
    "diagonal": DiagonalMap(torch.rand(256, 128) + 0.1),
    "rank one": RankOne(torch.rand(256) + 0.1, torch.rand(128) + 0.1),
    "kronecker": Kronecker(torch.eye(256), torch.eye(128)),
    "rotated": RotatedDiagonal(torch.eye(256), torch.eye(128), torch.rand(256, 128) + 0.1),
    "mixed": Mixed(),
}


@pytest.mark.parametrize("name", WIDE_MAPS)
@pytest.mark.parametrize("limit", [2**18, 2**20])
@pytest.mark.parametrize("sketch", [None, Sketch(dim=256)], ids=["exact", "sketch"])
def test_the_memory_limit_bounds_what_is_multiplied_out(name: str, limit: int, sketch: Sketch | None) -> None:
    """All gradients of this layer together would take 4 MiB; beside the limit there is what is as large as one."""
    n, positions, rows, columns = 32, 4, 256, 128
    one = rows * columns * 4
    generator = torch.Generator().manual_seed(0)
    factors = Factors(
        left=torch.randn(n, positions, rows, generator=generator),
        right=torch.randn(n, positions, columns, generator=generator),
    )
    folded = n * positions * (rows + columns) * 4  # factors with a map folded into them
    spec = GramSpec(
        shapes={"weight": torch.Size((rows, columns))},
        target={"weight": torch.randn(rows, columns, generator=generator)},
        precondition=lambda _, reference: WIDE_MAPS[name],
        metrics=[Metric.PRECONDITIONED if sketch is None else Metric.UPDATE],  # for which a map needs no root
        dtype=torch.float32,
        device=torch.device("cpu"),
        memory_limit=limit,
    )
    everyone = torch.ones(n, dtype=torch.bool)
    sums = GramSums(spec, everyone) if sketch is None else SketchSums(spec, everyone, sketch=sketch, seed=0)
    with LivePeak() as live:
        sums.add("weight", [factors])
    bound = limit + 8 * one + 2 * folded
    assert bound < n * one
    assert live.peak < bound
