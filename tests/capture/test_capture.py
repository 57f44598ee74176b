"""Capture: every use of a parameter by a layer is found, every other one is noticed, and nothing stays behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftw_optim import SelectiveOptimizer, coverage
from ftw_optim._capture.capture import Capture
from ftw_optim._capture.plan import plan
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._capture.structure import Structure
from tests.support.capturing import captured, check_every_candidate, rows_of
from tests.support.layers import OneMinus, Scaled, TiedByHand
from tests.support.models import Gain, SmallGPT, drawn, language_model, seeded


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("axes", [(), (4,), (2, 3), (0,)], ids=["2-D", "3-D", "4-D", "no positions"])
@pytest.mark.parametrize("n", [1, 3])
def test_linear_layers_of_any_input(axes: tuple[int, ...], n: int, keep_graph: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))).double()
    x = torch.randn(n, *axes, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(
        model, lambda rows: model(rows_of(x, rows)).square().flatten(1).sum(1), n, keep_graph=keep_graph
    )


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 3, **options), nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.tokens(ids)))
        return scores


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embeddings_with_repeated_and_padding_tokens(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = seeded(lambda: Embedded(**options)).double()
    ids = torch.tensor([[1, 1, 2, 6], [2, 2, 2, 2], [0, 3, 6, 3]], dtype=dtype)
    check_every_candidate(model, lambda rows: model(rows_of(ids, rows)).square().sum((1, 2)), 3)


class Squared(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


def test_embedding_subclasses_are_known_by_what_they_do() -> None:
    model = seeded(lambda: Embedded()).double()
    ids = torch.tensor([[1, 1, 2, 6], [0, 3, 6, 3]])
    model.tokens = Scaled(7, 3, padding_idx=1).double()
    check_every_candidate(model, lambda rows: model(rows_of(ids, rows)).square().sum((1, 2)), 2)
    assert coverage(model)["tokens.weight"].rule == "scaled Embedding"
    model.tokens = Squared(7, 3).double()
    check_every_candidate(model, lambda rows: model(rows_of(ids, rows)).square().sum((1, 2)), 2)
    assert coverage(model)["tokens.weight"].rule == "fallback"


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LayerNorm without bias": lambda: nn.LayerNorm(6, bias=False),
    "LayerNorm of two axes": lambda: nn.LayerNorm((4, 6)),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "RMSNorm of two axes": lambda: nn.RMSNorm((4, 6)),
    "a family's RMSNorm": lambda: OneMinus(6),
}


@pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)
def test_norms(build: Callable[[], nn.Module]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), build(), nn.Linear(6, 2))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.arange(parameter.numel()).view(parameter.shape))
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)


class Positions(nn.Module):
    """Position embeddings, looked up in each of the ways that models do it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.positions, self.head = way, nn.Embedding(9, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        ids = {"t": ids, "1 x t": ids[None], "n x t": ids.expand(x.shape[:2])}[self.way]
        scores: Tensor = self.head(torch.tanh(x + self.positions(ids)))
        return scores


@pytest.mark.parametrize("shape", [(3, 4, 3), (4, 4, 3), (1, 4, 3)], ids=["n < t", "n = t", "n = 1"])
@pytest.mark.parametrize("way", ["t", "1 x t", "n x t"])
def test_position_embeddings_shared_by_all_rows(way: str, shape: tuple[int, ...]) -> None:
    model = seeded(lambda: Positions(way)).double()
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), shape[0])


@pytest.mark.parametrize("middle", [lambda: nn.LayerNorm(4), lambda: Gain(4)], ids=["with a rule", "without one"])
def test_packed_rows_are_captured_by_document(middle: Callable[[], nn.Module]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(7, 4), middle(), nn.Linear(4, 2))).double()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    documents = torch.tensor([[0, 0, 0, 2, 2, -1], [1, 2, 1, 1, -1, -1]])

    def losses(rows: Tensor | None) -> Tensor:
        values = model(ids).square().sum(-1)
        every = torch.stack([(values * (documents == document)).sum() for document in range(3)])
        return rows_of(every, rows)

    check_every_candidate(model, losses, 3, sample_ids=documents)


def test_frozen_parameters_stay_frozen_and_unused_ones_are_left_out() -> None:
    case = language_model(seeded(SmallGPT).double(), 4)
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_("blocks.1" in name or name == "norm.weight")
    case.model.extra = nn.Linear(2, 2).double()  # type: ignore[assignment]
    check_every_candidate(case.model, case.losses, 4)
    assert [p.grad for p in case.model.parameters()] == [None] * len(list(case.model.parameters()))
    assert not any(p.requires_grad for name, p in case.model.named_parameters() if "blocks.0" in name)


def test_a_hook_of_the_users_that_changes_an_output_is_part_of_the_model() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))).double()
    model[0].register_forward_hook(lambda module, args, output: 2.0 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] - 1.0,))
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum(1), 3)


def test_outputs_may_be_changed_in_place_but_inputs_may_not() -> None:
    first, second = nn.Linear(5, 4).double(), nn.Linear(4, 4).double()
    model = nn.ModuleList([first, second])
    x = torch.randn(3, 5, dtype=torch.float64)

    def fine(rows: Tensor | None) -> Tensor:
        return second(first(rows_of(x, rows)).tanh_()).relu_().sum(1)

    check_every_candidate(model, fine, 3)

    def spoilt() -> Tensor:
        """Autograd does not look at the input of the first layer, since no gradient goes further."""
        given = x.clone()
        output = second(first(given))
        given.mul_(2.0)
        return output.sum(1)

    with pytest.raises(RuntimeError, match="input of layer '0' was changed in place after the layer had read it"):
        captured(model, spoilt)


@pytest.mark.parametrize("self_check", [True, False])
def test_a_weight_used_outside_its_layer_is_an_error_that_names_it(self_check: bool) -> None:
    model = seeded(TiedByHand).double()
    ids = torch.tensor([[1, 2], [3, 3]])
    with pytest.raises(RuntimeError, match=r"Expected tokens.weight to be used only by calling the layers"):
        captured(model, lambda: model(ids).logsumexp(-1).sum(1), self_check=self_check)


class MixesRows(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(5, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.transpose(0, 1) if self.kind == "time-major" else x)
        if self.kind == "batch norm":
            hidden = self.norm(hidden.flatten(0, 1)).view_as(hidden)
        elif self.kind == "time-major":
            hidden = hidden.transpose(0, 1)
        elif self.kind == "reversed":
            hidden = self.first(x.flip(0)).flip(0)
        scores: Tensor = self.last(torch.tanh(hidden))
        return scores


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("kind", ["batch norm", "time-major", "reversed", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_self_check_finds_mixed_rows_that_a_plain_sum_would_not(
    kind: str, keep_graph: bool, dtype: torch.dtype
) -> None:
    """Every kind passes a plain sum over candidates; of rows that stay apart nothing is said."""
    model = seeded(lambda: MixesRows(kind)).to(dtype)
    x = torch.randn(4, 4, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=dtype)

    def losses() -> Tensor:
        values: Tensor = (model(x).square().sum((1, 2)) + 1.0).log() * scale
        return values

    with pytest.raises(RuntimeError, match="Self-check: the captured") if kind != "rows" else _nothing():
        captured(model, losses, keep_graph=keep_graph)


class _nothing:  # a context manager in place of pytest.raises
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_losses_that_no_captured_layer_reaches_are_an_error() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="none was reached"):
        captured(model, lambda: other(torch.ones(2, 3)).sum(1))


def test_a_part_of_the_model_may_be_called_if_the_rows_are_those_of_the_losses() -> None:
    model = nn.ModuleList([nn.Linear(5, 4).double(), nn.Linear(4, 1).double()])
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model[1](torch.tanh(model[0](rows_of(x, rows))))[:, 0], 3)
    with pytest.raises(ValueError, match="returned 2 losses, but layer '0' ran on 3 rows"):
        captured(model, lambda: model[1](model[0](x))[:2, 0])


def test_calls_of_the_model_on_different_numbers_of_rows_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="called the model on 2 and then on 3 rows"):
        captured(model, lambda: torch.cat([model(torch.ones(n, 3)).sum(1) for n in (2, 3)]))


@pytest.mark.parametrize("keep_graph", [False, True])
def test_nothing_stays_behind_whatever_happens(keep_graph: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    parameters = dict(model.named_parameters())

    def raises_in_a_layer() -> Tensor:
        return model(torch.ones(2, 7)).sum(1)  # the wrong width

    def raises_after() -> Tensor:
        model(torch.ones(2, 3))
        raise KeyError("the closure's own")

    for closure, error in ((raises_in_a_layer, RuntimeError), (raises_after, KeyError)):
        with pytest.raises(error):
            captured(model, closure, keep_graph=keep_graph)
        assert dict(model.named_parameters()) == parameters
        assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    captured(model, lambda: model(torch.ones(2, 3)).sum(1), keep_graph=keep_graph)


def test_uncovered_parameters_are_named_before_anything_runs() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(NotImplementedError, match=r"1\.weight: BatchNorm1d mixes the candidates.*combine=\"graph\""):
        plan(Structure(model), {"0.weight", "1.weight"})
    plan(Structure(model), {"0.weight", "0.bias"})


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_whose_gradients_are_not_plain_are_refused_with_the_reason(
    options: dict[str, Any],
) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        plan(Structure(nn.Sequential(nn.Embedding(3, 2, **options))), {"0.weight"})


INPLACE = {
    "relu": lambda hidden: torch.relu_(hidden),
    "add": lambda hidden: hidden.add_(1.0),
    "slice": lambda hidden: hidden[..., :2].mul_(2.0).sum() * 0 + hidden,
}


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("change", INPLACE)
@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 4), lambda: nn.Linear(5, 4, bias=False), lambda: Conv1D(4, 5)])
def test_operations_in_place_on_an_output_that_is_a_view(
    build: Callable[[], nn.Module], change: str, keep_graph: bool
) -> None:
    """The output of a Linear layer on three axes is a view of its matrix product, whose edge such operations move."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = build(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.last(INPLACE[change](self.first(x)))
            return scores

    model = seeded(Model).double()
    x = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3, keep_graph=keep_graph)


def test_operations_in_place_on_positions_that_all_rows_share() -> None:
    model = seeded(lambda: Positions("t")).double()
    model.positions.register_forward_hook(lambda module, args, output: output.mul_(2.0))  # type: ignore[operator,union-attr]
    x = torch.randn(3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_every_candidate(model, lambda rows: model(rows_of(x, rows)).square().sum((1, 2)), 3)


def test_a_change_of_mode_is_checked_again() -> None:
    """BatchNorm mixes rows in training alone."""
    model = seeded(lambda: MixesRows("batch norm")).double()
    x = torch.randn(4, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    checks = SelfChecks()

    def differentiate() -> None:
        with Capture(plan(Structure(model), dict(model.named_parameters()))) as capture:
            losses = model(x).square().sum((1, 2)) * torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=torch.float64)
            generator = torch.Generator().manual_seed(0)
            capture.differentiate(losses, scale=1.0, keep_graph=False, checks=checks, generator=generator)

    model.eval()
    differentiate()
    differentiate()
    model.train()
    with pytest.raises(RuntimeError, match="Self-check"):
        differentiate()


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_parameters_with_hooks_of_their_own_are_not_captured(register: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    getattr(model[0].weight, register)(lambda *args: None)
    with pytest.raises(NotImplementedError, match=r"0\.weight: a hook on the parameter"):
        plan(Structure(model), {"0.weight"})
    plan(Structure(model), {"0.bias"})


@pytest.mark.parametrize(
    ("sample_ids", "message"),
    [
        (torch.zeros(2, 6), "Expected sample_ids as int64"),
        (torch.zeros(12, dtype=torch.int64), "one entry for each of the 2 rows .* got 12"),
        (torch.full((2, 6), -2), "Expected sample_ids from -1"),
        (torch.full((2, 6), 3), r"Expected sample_ids from -1 .* to 2.* got 3 to 3"),
        (torch.zeros(2, 5, dtype=torch.int64), "the grid of sample_ids"),
    ],
)
def test_sample_ids_that_do_not_fit_are_refused(sample_ids: Tensor, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        captured(model, lambda: model(torch.randn(2, 6, 4)).sum(-1).sum() * torch.ones(3), sample_ids=sample_ids)


def test_other_calls_without_gradients_may_have_other_rows() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4))).double()
    x = torch.randn(3, 5, dtype=torch.float64)

    def losses(rows: Tensor | None) -> Tensor:
        with torch.no_grad():
            shift = model(torch.ones(7, 5, dtype=torch.float64)).mean()
        values: Tensor = model(rows_of(x, rows)).sum(1) * shift
        return values

    check_every_candidate(model, losses, 3)


def test_an_index_without_axes_is_refused() -> None:
    class Tasked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = x + self[0](torch.tensor(1))
            return scores

    model = Tasked(nn.Embedding(3, 4))
    with pytest.raises(NotImplementedError, match=r"Expected layer '0'.*got shape \(\)"):
        captured(model, lambda: model(torch.ones(2, 4)).sum(1))


def test_a_weight_that_a_hook_makes_before_the_call_is_refused_with_the_way_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm's old form
        model = nn.utils.weight_norm(nn.Linear(3, 2))
    with pytest.raises(NotImplementedError, match=r"weight_g: .*torch\.nn\.utils\.parametrizations\.weight_norm"):
        plan(Structure(model), {"weight_g", "weight_v", "bias"})


@pytest.mark.parametrize("combine", ["factors", "rerun"])
def test_a_self_check_whose_own_sum_overflows_waits_for_the_next_step(combine: str) -> None:
    """Every candidate's gradient is finite in its scale; that of a randomly weighted sum of all is not."""
    model = seeded(lambda: nn.Linear(3, 1))
    x = torch.full((8, 3), 2.0**126)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: model(torch.ones(2, 3))[:, 0], combine=combine
    )

    def losses(rows: Tensor | None = None) -> Tensor:
        return (model(x if rows is None else x[rows]) * 2.0**-126)[:, 0] * 2.0**126

    optimizer.backward(losses)  # nothing raised; the squares are out of range, so all are rejected
    assert optimizer.selection is not None
    assert optimizer.selection.skipped
    x.fill_(1.0)
    optimizer.backward(losses)


def test_rows_are_those_of_the_batch() -> None:
    """That the helper above picks rows as the closures here do."""
    x = drawn(4, 3)
    assert torch.equal(rows_of(x, torch.tensor([2])), x[2:3])
