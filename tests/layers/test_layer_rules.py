"""Every layer rule alone, and the fallback, against autograd one candidate at a time, over drawn shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ftw_optim import Factors, coverage, register_layer
from ftw_optim.testing import check_layer
from tests.support.grids import slow
from tests.support.layers import OneMinus, Scaled
from tests.support.models import seeded

COUNTS = st.integers(1, 5)
LENGTHS = st.integers(0, 4)
WIDTHS = st.integers(1, 5)
SEEDS = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def indices(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def check(rule: str, module: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """The layer is exact, by the rule that is meant for it."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):  # ones and zeros would hide mistakes
            parameter.add_(0.1 * drawn(number, *parameter.shape).to(parameter))
    table = check_layer(module, inputs, kwargs=kwargs)
    assert {row.rule for row in table} == {rule}


@given(COUNTS, st.lists(LENGTHS, max_size=2), WIDTHS, WIDTHS, st.booleans(), SEEDS)
def test_linear(n: int, axes: list[int], d_in: int, d_out: int, bias: bool, seed: int) -> None:
    check("Linear", seeded(lambda: nn.Linear(d_in, d_out, bias=bias)), drawn(seed, n, *axes, d_in))


@given(COUNTS, LENGTHS, WIDTHS, WIDTHS, SEEDS)
def test_transposed_linear(n: int, t: int, d_in: int, d_out: int, seed: int) -> None:
    from transformers.pytorch_utils import Conv1D

    check("Conv1D", seeded(lambda: Conv1D(d_out, d_in)), drawn(seed, n, t, d_in))


@given(COUNTS, st.lists(LENGTHS, min_size=1, max_size=2), WIDTHS, st.sampled_from([None, 0, 3]), st.booleans(), SEEDS)
def test_embedding(n: int, axes: list[int], d: int, padding: int | None, scaled: bool, seed: int) -> None:
    build = Scaled if scaled else nn.Embedding
    layer = seeded(lambda: build(7, d, padding_idx=padding))
    check("scaled Embedding" if scaled else "Embedding", layer, indices(seed, 7, n, *axes))


@given(COUNTS, st.integers(1, 4), WIDTHS, st.sampled_from(["sum", "mean"]), st.sampled_from([None, 3]), SEEDS)
def test_embedding_bag(n: int, t: int, d: int, mode: str, padding: int | None, seed: int) -> None:
    check(
        "EmbeddingBag",
        seeded(lambda: nn.EmbeddingBag(7, d, mode=mode, padding_idx=padding)),
        indices(seed, 7, n, t),
    )


@given(COUNTS, st.integers(1, 4), SEEDS)
def test_embedding_bag_with_weights_and_of_maxima(n: int, t: int, seed: int) -> None:
    ids = indices(seed, 7, n, t)
    check("EmbeddingBag", nn.EmbeddingBag(7, 3, mode="sum"), ids, per_sample_weights=drawn(seed, n, t))
    check("fallback", nn.EmbeddingBag(7, 3, mode="max"), ids)


@given(COUNTS, st.lists(LENGTHS, max_size=2), st.lists(WIDTHS, min_size=1, max_size=2), st.booleans(), SEEDS)
def test_layer_norm(n: int, axes: list[int], shape: list[int], bias: bool, seed: int) -> None:
    check("LayerNorm", nn.LayerNorm(shape, bias=bias), drawn(seed, n, *axes, *shape))


@given(COUNTS, st.lists(LENGTHS, max_size=2), st.integers(2, 5), st.booleans(), SEEDS)
def test_scale_norms(n: int, axes: list[int], d: int, own: bool, seed: int) -> None:
    check("scale norm", OneMinus(d) if own else nn.RMSNorm(d), drawn(seed, n, *axes, d))


@given(COUNTS, st.lists(st.integers(1, 3), max_size=2), st.integers(1, 3), st.integers(2, 3), SEEDS)
def test_group_norm(n: int, axes: list[int], groups: int, each: int, seed: int) -> None:
    check("GroupNorm", nn.GroupNorm(groups, groups * each), drawn(seed, n, groups * each, *axes))


NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@given(COUNTS, st.integers(1, 3), WIDTHS, st.booleans(), st.booleans(), SEEDS)
def test_instance_norm(n: int, axes: int, d: int, tracks: bool, training: bool, seed: int) -> None:
    layer = NORMS[axes](d, affine=True, track_running_stats=tracks).train(training)
    check(f"InstanceNorm{axes}d", layer, drawn(seed, n, d, *range(2, 2 + axes)))


@given(COUNTS, st.integers(1, 3), WIDTHS, SEEDS)
def test_batch_norm_in_evaluation(n: int, axes: int, d: int, seed: int) -> None:
    layer = BATCH_NORMS[axes](d).eval()
    with torch.no_grad():
        layer.running_mean.copy_(drawn(seed, d))
        layer.running_var.copy_(drawn(seed, d).square() + 0.1)
    check(f"BatchNorm{axes}d", layer, drawn(seed, n, d, *range(2, 2 + axes)))


@given(
    COUNTS,
    st.integers(1, 3),
    st.sampled_from([(1, 1, 1), (1, 2, 7), (2, 1, 2), (3, 1, 1), (1, 4, 9)]),  # groups, channels of each in and out
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([0, 1, "same"]),
    st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    SEEDS,
)
def test_convolutions(
    n: int,
    axes: int,
    channels: tuple[int, int, int],
    kernel: int,
    stride: int,
    dilation: int,
    padding: int | str,
    mode: str,
    seed: int,
) -> None:
    groups, d_in, d_out = channels
    if padding == "same":
        kernel = 3 - kernel % 2 * 2  # torch warns of even ones
    build: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    layer = seeded(
        lambda: build(
            groups * d_in,
            groups * d_out,
            kernel,
            stride=1 if padding == "same" else stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=mode,
            bias=bool(seed % 2),
        )
    )
    check(f"Conv{axes}d", layer, drawn(seed, n, groups * d_in, *range(5, 5 + axes)))


@pytest.mark.slow
@given(COUNTS, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(), SEEDS)
def test_multihead_attention(n: int, t: int, s: int, bias: bool, other: bool, zero: bool, seed: int) -> None:
    sizes = {"kdim": 3, "vdim": 5} if other else {}
    layer = seeded(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, bias=bias, add_zero_attn=zero, **sizes)  # type: ignore[arg-type]
    )
    query = drawn(seed, n, t, 4)
    key, value = (drawn(seed + 1, n, s, 3), drawn(seed + 2, n, s, 5)) if other else (query, query)
    hidden = torch.zeros(n, key.shape[1], dtype=torch.bool)
    hidden[0, 1:] = True
    rule = "MultiheadAttention"
    check(rule, layer, query, key, value, need_weights=bool(seed % 2), key_padding_mask=hidden)
    if not other:
        causal = nn.Transformer.generate_square_subsequent_mask(t, dtype=torch.float64)
        # A square mask may be as long as there are candidates: check_layer would take its rows for theirs.
        if t != n:
            check(rule, layer, query, query, query, attn_mask=causal, is_causal=True, need_weights=False)
        check(rule, layer, query, drawn(seed, n, s, 4), drawn(seed + 1, n, s, 4), average_attn_weights=False)


def test_multihead_attention_with_rows_of_its_own_uses_both_ways() -> None:
    query = drawn(0, 3, 4, 4)
    table = check_layer(nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), [query] * 3)
    assert {row.name: row.rule for row in table if row.rule == "fallback"} == dict.fromkeys(
        ["bias_k", "bias_v"], "fallback"
    )
    assert table["out_proj.weight"].rule == table["in_proj_weight"].rule == "MultiheadAttention"


FALLBACKS: dict[str, tuple[Any, Any]] = {
    "PReLU": (lambda: nn.PReLU(3), lambda seed, n, t: [drawn(seed, n, 3, t)]),
    "Bilinear": (lambda: nn.Bilinear(3, 2, 4), lambda seed, n, t: [drawn(seed, n, t, 3), drawn(seed + 1, n, t, 2)]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 2, groups=1), lambda seed, n, t: [drawn(seed, n, 3, t + 1)]),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), lambda seed, n, t: [drawn(seed, n, 3)]),
    "LSTM": (
        lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
        lambda seed, n, t: [drawn(seed, n, t + 1, 3)],
    ),
    "LSTM, projected": (
        lambda: nn.LSTM(3, 4, batch_first=True, proj_size=2),
        lambda seed, n, t: [drawn(seed, n, t + 1, 3)],
    ),
    "GRU": (lambda: nn.GRU(3, 4, batch_first=True), lambda seed, n, t: [drawn(seed, n, t + 1, 3)]),
    "RNN": (lambda: nn.RNN(3, 4, batch_first=True), lambda seed, n, t: [drawn(seed, n, t + 1, 3)]),
    "Fallback": (lambda: Gate(3), lambda seed, n, t: [drawn(seed, n, t, 3)]),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False)),
        lambda seed, n, t: [drawn(seed, n, t, 3)],
    ),
    "orthogonal": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3, bias=False)),
        lambda seed, n, t: [drawn(seed, n, t, 3)],
    ),
}


class Gate(nn.Module):
    """A container with parameters of its own, in a dictionary and a list too, around a child."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale, self.child = nn.Parameter(torch.ones(d)), nn.Tanh()
        self.shifts = nn.ParameterDict({"before": nn.Parameter(torch.zeros(d)), "after": nn.Parameter(torch.ones(()))})
        self.powers = nn.ParameterList([torch.ones(d), torch.ones(1)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.powers
        hidden: Tensor = self.child(self.scale * x + self.shifts["before"])
        return hidden * (first * second) + self.shifts["after"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # A GRU stands for the others of torch's that recur.
    [
        slow(name) if name in ("LSTM", "LSTM, projected", "LSTMCell", "RNN", "orthogonal") else name
        for name in FALLBACKS
    ],
)
@given(COUNTS, LENGTHS, SEEDS)
def test_modules_that_no_rule_knows(name: str, n: int, t: int, seed: int) -> None:
    build, inputs = FALLBACKS[name]
    check("fallback", seeded(build), *inputs(seed, n, t))


@pytest.mark.parametrize("build", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_whole_layers_of_torch(build: Any, n: int) -> None:
    layer = seeded(lambda: build(4, 2, 6, batch_first=True, dropout=0.0))
    memory = [drawn(1, n, 3, 4)] if build is nn.TransformerDecoderLayer else []
    table = check_layer(layer, [drawn(0, n, 4, 4), *memory])
    assert {row.rule for row in table} == {"MultiheadAttention", "Linear", "LayerNorm"}


# ---------------------------------------------------------------------- the public oracle itself


@pytest.fixture
def spoilt(restored_rules: None) -> type[nn.Linear]:
    """A registered rule that is wrong."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    register_layer(Doubled)(
        lambda module, inputs, grad: {"weight": Factors(left=grad, right=inputs[0]), "bias": Factors(left=2.0 * grad)}
    )
    return Doubled


def test_check_layer_names_the_gradient_that_a_wrong_rule_gives(spoilt: type[nn.Linear]) -> None:
    with pytest.raises(AssertionError, match=r"The gradient of weight \(rule: Doubled\) for candidate 0 of 2 is off"):
        check_layer(spoilt(3, 2), drawn(0, 2, 4, 3))


def test_check_layer_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="Expected inputs with a tensor"):
        check_layer(nn.Linear(3, 2), [])
    with pytest.raises(ValueError, match="Expected a module with parameters that require a gradient, got Tanh"):
        check_layer(nn.Tanh(), drawn(0, 2, 3))
    with pytest.raises(NotImplementedError, match="BatchNorm1d mixes the candidates"):
        check_layer(nn.BatchNorm1d(3), drawn(0, 2, 3))
    for refused in (nn.MultiheadAttention(4, 2), nn.LSTM(4, 2), nn.GRU(4, 2)):
        with pytest.raises(NotImplementedError, match="takes the time first; build it with batch_first=True"):
            check_layer(refused, [drawn(0, 3, 2, 4)] * 3)


def test_check_layer_leaves_the_module_alone() -> None:
    layer = seeded(lambda: nn.Linear(3, 2))
    before = {name: (p, p.detach().clone()) for name, p in layer.named_parameters()}
    check_layer(layer, torch.randn(2, 4, 3))
    for name, parameter in layer.named_parameters():
        assert parameter is before[name][0]
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None


class Renamed(nn.Linear):
    """Inherits forward, and with it the rule."""


class Overridden(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_rules_serve_subclasses_unless_they_override_forward() -> None:
    table = coverage(nn.Sequential(Renamed(2, 2), Overridden(2, 2)))
    assert table["0.weight"].rule == "Linear"
    assert table["1.weight"].rule == "fallback"
    assert table["1.weight"].again == ("Overridden",)
    with pytest.raises(KeyError):
        table["2.weight"]


def test_layers_that_only_look_like_a_scale_norm_are_not_taken_for_one() -> None:
    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight**2

    class Mixing(Power):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.cumsum(0)

    class Gate(Power):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate * self.weight

    for layer in (Power(), Mixing(), Gate()):
        assert coverage(layer)["weight"].rule == "fallback"
