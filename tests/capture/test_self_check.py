"""What the self-check finds, what it must not take for an error, and when one check vouches for the next step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights
from ftw_optim._factors.factors import weighted_sum
from tests.support.capturing import captured, check_common_graph, squares
from tests.support.layers import Scale, model_with
from tests.support.models import drawn, seeded


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
    with pytest.raises(RuntimeError, match="layer 'layer' to take the 3 candidates in order"):
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
    with pytest.raises(RuntimeError, match="layer 'small' to take the 4 candidates in order"):
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
