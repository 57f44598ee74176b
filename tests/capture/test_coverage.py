"""Coverage tables, and rules that third parties register."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import Factors, SelectiveOptimizer, coverage, register_layer
from ftw_optim._factors.factors import materialise
from tests.support.capturing import captured, check_every_candidate, rows_of
from tests.support.models import transformers_model


class Outer(nn.Module):
    """``y = x + scale * (x @ direction) * direction``: a layer of the user's own, on ``(n, t, d)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction, self.scale = (
            nn.Parameter(torch.linspace(0.1, 1.0, width)),
            nn.Parameter(torch.ones(1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (x @ self.direction)[..., None] * self.direction


def outer_rule(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Any]:
    assert isinstance(module, Outer)
    x, along = inputs[0], inputs[0] @ module.direction
    back = output_grad @ module.direction
    direction = module.scale * (along[..., None] * output_grad + back[..., None] * x)
    return {"direction": Factors(left=direction), "scale": (along * back).sum(1, keepdim=True)}


@pytest.mark.usefixtures("restored_rules")
@pytest.mark.parametrize("key", [Outer, f"{Outer.__module__}.Outer"], ids=["class", "name"])
def test_a_custom_layer_is_exact_without_a_rule_and_with_one_registered_function(key: Any) -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rule in ("fallback", "Outer"):
        model = seeded_outer()  # an instance remembers what was found for it
        assert coverage(model)["1.direction"].rule == rule
        check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)  # noqa: B023
        register_layer(key)(outer_rule)


def seeded_outer() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Outer(4), nn.Linear(4, 2)).double()


@pytest.mark.usefixtures("restored_rules")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found: {"direction": found["direction"]}, "returned no gradient for 'scale'"),
        (
            lambda found: {**found, "scale": found["direction"]},
            r"returned gradients of 4 x 1 entries for 1\.scale",
        ),
        (lambda found: {**found, "scale": 2 * found["scale"]}, r"Self-check: the captured.*1\.scale"),
    ],
)
def test_a_rule_that_does_not_hold_is_found_out(spoil: Any, message: str) -> None:
    register_layer(Outer)(lambda module, inputs, grad: spoil(outer_rule(module, inputs, grad)))
    model = seeded_outer()
    with pytest.raises(RuntimeError, match=message):
        captured(model, lambda: model(torch.randn(2, 3, 4).double()).square().sum((1, 2)))


def test_coverage_names_every_rule_before_and_the_work_after() -> None:
    case = transformers_model("qwen3")(torch.float32, 4)
    table = coverage(case.model)
    assert {row.rule for row in table} == {"Embedding + Linear", "Linear", "scale norm"}
    assert len(table) == len(list(case.model.parameters()))
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters()),
        case.model,
        case.target_losses,
        scored=lambda name, p: "layers.1" in name,
    )
    assert str(optimizer.coverage) == str(table)
    optimizer.step(case.losses)
    row = optimizer.coverage["model.layers.1.mlp.down_proj.weight"]
    assert (row.scored, row.uses, row.multiplications) == (True, 1, 7 * 8 * 12)
    row = optimizer.coverage["model.embed_tokens.weight"]
    assert (row.scored, row.uses, row.multiplications) == (False, 2, 0)
    tokens, hidden = 4 * 7, 4 * 7 * 8
    labels = int((case.candidates["labels"][:, 1:] != -100).sum())  # those that the head runs on
    assert 0 < labels < 0.9 * tokens
    assert row.bytes == 8 * tokens + 4 * hidden + 4 * labels * (31 + 8)  # embedding, head
    lines = str(optimizer.coverage).splitlines()
    assert lines[0].split() == ["parameter", "shape", "rule", "capture", "cost", "scored", "uses", "MACs", "MiB"]
    assert lines[1].split()[:4] == ["model.embed_tokens.weight", "31x8", "Embedding", "+"]


def test_a_printed_table_has_one_line_for_equal_blocks() -> None:
    table = coverage(transformers_model("qwen3")(torch.float32, 4).model)
    lines = str(table).splitlines()
    assert len(lines) == 1 + 1 + 11 + 1  # header, tied embedding, one block, final norm
    assert sum("model.layers.{0-1}." in line for line in lines) == 11
    uneven = nn.Sequential(*(nn.Linear(2, 3 if number == 2 else 2) for number in range(5)))
    names = [line.split()[0] for line in str(coverage(uneven)).splitlines()[1:]]
    assert names == ["{0-1,3-4}.weight", "{0-1,3-4}.bias", "2.weight", "2.bias"]


def test_coverage_says_what_a_refusal_or_a_fallback_means() -> None:
    table = coverage(nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 3), nn.BatchNorm1d(3)))
    assert [row.exact for row in table] == [True] * 4 + [False] * 2
    assert table["1.weight"].cost == "runs Bilinear again, holds n x 12 numbers"
    lines = str(table).splitlines()
    assert lines[5].split()[:4] == ["2.weight", "3", "-", "refused"]
    assert "BatchNorm1d mixes the candidates in training; call eval() on it, or use GroupNorm (2.weight)" in lines[5]


class Reads(nn.Module):
    """Shares a Linear layer's weight, with a rule that gives whole gradients."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.usefixtures("restored_rules")
@pytest.mark.parametrize("first", ["linear", "reads"])
def test_a_parameter_shared_by_rules_of_different_kinds_is_one_block(first: str) -> None:
    register_layer(Reads)(lambda module, inputs, grad: {"weight": torch.einsum("nto,nti->noi", grad, inputs[0])})
    linear = nn.Linear(4, 4, bias=False)
    layers = [linear, nn.Tanh(), Reads(linear.weight)]
    model = nn.Sequential(*(layers if first == "linear" else reversed(layers))).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)
    uses = captured(model, lambda: model(x).square().sum((1, 2)))["0.weight"]
    block = materialise(uses, 0, 4)
    for row in range(3):
        (expected,) = torch.autograd.grad(model(x[row : row + 1]).square().sum(), list(model.parameters()))
        torch.testing.assert_close(block[row], expected)


@pytest.mark.usefixtures("restored_rules")
def test_a_parameter_without_axes_may_have_a_rule() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    register_layer(Tempered)(lambda module, inputs, grad: {"weight": (grad * inputs[0]).sum((1, 2))})
    model = nn.Sequential(nn.Linear(4, 4), Tempered()).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)
