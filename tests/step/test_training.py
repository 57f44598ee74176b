"""What people train with: checkpointing, autocast, half precision, dropout, compiled models, parameters that change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, TargetGradient, UniformWeights, last_blocks
from ftw_optim._factors.factors import weighted_sum
from tests.capture.test_capture import TiedByHand, captured, rows_of
from tests.capture.test_fallback import Scale, drawn
from tests.capture.test_families import optimizer_of
from tests.support.families import case_of, family, model_of
from tests.support.models import Case, SmallGPT, language_model, precision, seeded, with_lora


def check_common_graph(model: nn.Module, losses: Callable[[], Tensor], *, rtol: float = 1e-10, **options: Any) -> None:
    """Every candidate's captured gradient is autograd's of its loss in the very pass that all of them went through."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    found = captured(model, losses, **options)
    torch.set_rng_state(state)
    rows = losses()
    weights = torch.eye(len(rows), dtype=torch.float64)
    expected = [
        torch.autograd.grad(row, list(parameters.values()), retain_graph=True, allow_unused=True) for row in rows
    ]
    for number, (name, parameter) in enumerate(parameters.items()):
        gradients = [row[number] for row in expected]
        if all(gradient is None for gradient in gradients):
            assert name not in found
            continue
        size = max(float(gradient.norm()) for gradient in gradients if gradient is not None)
        for weight, gradient in zip(weights, gradients, strict=True):
            given = weighted_sum(found[name], weight, parameter.shape)
            assert gradient is not None
            assert (given - gradient).norm() <= rtol * size + 1e-13, name


# ---------------------------------------------------------------------- checkpointing


class Checkpointed(nn.Module):
    """Layers of all kinds, one of them tied, with dropout, inside and outside of checkpoints."""

    def __init__(self, *, kinds: tuple[bool | None, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.kinds, self.dropout = kinds, dropout
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), Scale(), nn.LayerNorm(4), nn.Dropout(dropout)) for _ in kinds
        )
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shared(torch.tanh(self.first(x)))
        for kind, block in zip(self.kinds, self.blocks, strict=True):

            def run(hidden: Tensor, block: nn.Module = block) -> Tensor:
                return torch.tanh(self.shared(block(hidden))) + hidden

            hidden = run(hidden) if kind is None else checkpoint(run, hidden, use_reentrant=kind)
        scores: Tensor = self.last(hidden)
        return scores


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("kinds", [(False,), (True,), (True, False, None, True)], ids=str)
@pytest.mark.parametrize("frozen", ["", "first", "blocks.0.0", "shared"])
def test_checkpoints_of_both_kinds_are_captured(
    kinds: tuple[bool | None, ...], frozen: str, keep_graph: bool, self_check: bool
) -> None:
    model = seeded(lambda: Checkpointed(kinds=kinds)).double()
    plain = seeded(lambda: Checkpointed(kinds=(None,) * len(kinds))).double()
    for one in (model, plain):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    x = drawn(3, 5, 3).requires_grad_(frozen == "first")
    found, expected = (
        captured(one, lambda: one(x).square().sum((1, 2)), keep_graph=keep_graph, self_check=self_check)  # noqa: B023
        for one in (model, plain)
    )
    assert found.keys() == expected.keys()
    for row in torch.eye(3, dtype=torch.float64):
        for name, parameter in model.named_parameters():
            if name in expected:
                one, other = (weighted_sum(factors[name], row, parameter.shape) for factors in (found, expected))
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "lora"])
def test_checkpointed_and_plain_runs_are_the_same(name: str, reentrant: bool, combine: str) -> None:
    """Gram matrix and parameters, over steps, with the model's own switch; dropout is on where the model has it."""
    runs = []
    for checkpointed in (False, True):
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.1} if name == "gpt2" else {}
        model: Any = model_of("llama" if name == "lora" else name, use_cache=False, **dropout)
        if name == "lora":
            model = seeded(lambda: with_lora(model))  # noqa: B023
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if name == "lora":
            model.enable_input_require_grads()
        case = case_of("llama", model.double(), 4)
        optimizer = optimizer_of(case, combine=combine)
        grams = []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for _ in range(2):
                optimizer.step(case.losses)
                assert optimizer.selection is not None
                assert optimizer.selection.combine == combine
                grams.append(optimizer.selection.gram)
        runs.append((grams, [parameter.detach() for parameter in model.parameters()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-8, atol=1e-11)


def test_reentrant_checkpoints_beside_parameters_that_are_not_ours() -> None:
    """The backward over the common graph may not name its parameters, and the others' gradients stay as they were."""
    model = seeded(lambda: Checkpointed(kinds=(True, True))).double()
    parameters = [p for name, p in model.named_parameters() if not name.startswith("blocks.0")]
    model.blocks[0][0].weight.grad = kept = torch.ones(4, 4, dtype=torch.float64)  # type: ignore[index,union-attr]
    x = drawn(3, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(parameters, lr=0.1), model, lambda: model(x[:2]).square().sum((1, 2)), combine="graph"
    )
    optimizer.step(lambda: model(x).square().sum((1, 2)))
    assert model.blocks[0][0].weight.grad is kept  # type: ignore[index,union-attr]
    assert torch.equal(kept, torch.ones(4, 4, dtype=torch.float64))
    assert optimizer.selection is not None


# ---------------------------------------------------------------------- precision and dropout


@pytest.mark.parametrize("kind", ["autocast", "parameters"])
@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("name", ["small-gpt", "llama", "mixtral", "mamba2", "lora"])
def test_bfloat16_is_within_its_own_rounding_of_float32(name: str, keep_graph: bool, kind: str) -> None:
    """Candidate by candidate, relative to the candidate's whole gradient."""
    if name == "small-gpt":
        model: nn.Module = seeded(lambda: SmallGPT(width=16))
    else:
        model = model_of("llama" if name == "lora" else name)
    if name == "lora":
        model = seeded(lambda: with_lora(model))
    family_name = "mamba2" if name == "mamba2" else "llama"
    exact_case = case_of(family_name, model, 4)
    exact = captured(model, exact_case.losses, keep_graph=keep_graph)
    other = copy.deepcopy(model)
    if kind == "parameters":
        other = other.bfloat16()
    case = case_of(family_name, other, 4)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return case.losses()

    found = captured(other, losses, keep_graph=keep_graph)
    assert found.keys() == exact.keys()
    for row in torch.eye(4, dtype=torch.float64):
        gradients: list[list[Tensor]] = []
        for factors in (exact, found):
            parts = [weighted_sum(uses, row, dict(model.named_parameters())[n].shape) for n, uses in factors.items()]
            assert all(part.dtype == torch.float32 for part in parts)
            gradients.append(parts)
        # Of a router a rounding may change the choice: then nothing is to be compared.
        one, two = (torch.cat([part.flatten() for part in parts]) for parts in gradients)
        if name != "mixtral":
            assert (one - two).norm() <= 0.05 * one.norm()


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("name", ["small-gpt", "gpt2", "bert", "t5", "lora", "attention", "encoder"])
def test_dropout_in_training_is_the_one_of_the_pass(name: str, keep_graph: bool) -> None:
    with precision(torch.float64):
        if name in ("attention", "encoder"):
            layer: nn.Module = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.4))
            if name == "attention":
                layer = layer.self_attn  # type: ignore[assignment]
            model = _Attending(layer).double()
            x = drawn(3, 5, 4)
            check_common_graph(model, lambda: model(x).square().sum((1, 2)), keep_graph=keep_graph)
            return
        if name == "small-gpt":
            case = language_model(seeded(lambda: SmallGPT(dropout=0.3)).double(), 4)
        elif name == "lora":
            base = model_of("llama", attention_dropout=0.2)
            case = case_of("llama", seeded(lambda: with_lora(base, lora_dropout=0.3)).double(), 4)
        else:
            dropouts = {
                "gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.2},
                "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
                "t5": {"dropout_rate": 0.3},
            }
            case = family(name, torch.float64, 4, **dropouts[name])
            for parameter_name, parameter in case.model.named_parameters():
                parameter.requires_grad_("relative_attention_bias" not in parameter_name)
        if name == "gpt2":
            _positions_without_dropout(case)
        check_common_graph(case.model, case.losses, keep_graph=keep_graph, rtol=1e-9)


def _positions_without_dropout(case: Case) -> None:
    """Position embeddings that are looked up once have one mask in a bare run, and one for each row in ours."""
    inner: Any = case.model
    inner.transformer.drop.p = 0.0


class _Attending(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if isinstance(self.layer, nn.MultiheadAttention):
            hidden, weights = self.layer(hidden, hidden, hidden)
            hidden = hidden + weights.diagonal(dim1=1, dim2=2)[..., None]  # both outputs count
        else:
            hidden = self.layer(hidden)
        scores: Tensor = self.last(hidden)
        return scores


# ---------------------------------------------------------------------- compiled models


# Dynamo looks at the attributes of intermediate tensors, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
@pytest.mark.parametrize("how", ["compiled before", "compiled after", "in place", "blocks"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_captured_and_steps_like_an_eager_one(how: str, combine: str, backend: str) -> None:
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model: nn.Module = seeded(SmallGPT).double()
        case = language_model(model, 4)
        called: Any = model
        if compiled:
            if how == "in place":
                model.compile(backend=backend)
            elif how == "blocks":
                for block in model.blocks:  # type: ignore[union-attr]
                    block.compile(backend=backend)
            else:
                called = torch.compile(model, backend=backend)
            case.losses_of(called, case.candidates)  # a first call: the graph is there before any hook
        given = called if how == "compiled before" else model
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.01),
            given,
            lambda: case.losses_of(called, case.target),  # noqa: B023
            filter=GreedyFilter(keep=2),
            combine=combine,
        )

        def losses(rows: Tensor | None = None) -> Tensor:
            batch = case.candidates if rows is None else {key: v[rows] for key, v in case.candidates.items()}  # noqa: B023
            return case.losses_of(called, batch)  # noqa: B023

        for _ in range(3):
            optimizer.step(losses)
        assert optimizer.selection is not None
        results.append((optimizer.selection.gram, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-11)
    torch.compiler.reset()


def test_after_a_step_a_compiled_model_runs_compiled_again() -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).double()
    compiled = torch.compile(model, backend=backend)
    x = drawn(4, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: compiled(x[:2]).square().sum(1)
    )
    optimizer.step(lambda: compiled(x).square().sum(1))
    before = len(graphs)
    torch.compiler.reset()
    compiled(x)
    assert len(graphs) == before + 1
    torch.compiler.reset()


def test_a_graph_that_calls_no_layers_is_an_error() -> None:
    """As of models exported ahead of time: nothing is captured, and nothing is silent."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(4, 3)
    traced = torch.fx.symbolic_trace(model)
    flat = torch.export.export(model, (x,)).module()
    for graph, reached in ((traced, True), (flat, False)):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: model(x[:2]).square().sum(1)
        )
        if reached:  # it calls the layers themselves
            optimizer.step(lambda: graph(x).square().sum(1))  # noqa: B023
        else:
            with pytest.raises(RuntimeError, match=r"Expected .* to be used only by calling|none was reached"):
                optimizer.step(lambda: graph(x).square().sum(1))  # noqa: B023


# ---------------------------------------------------------------------- parameters that change


def test_layers_frozen_and_unfrozen_between_steps() -> None:
    """As in gradual unfreezing: each step's Gram matrix is that of the parameters which require a gradient then."""
    case = language_model(seeded(SmallGPT).double(), 4)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters(), lr=0.01), case.model, case.target_losses, metric="euclidean"
    )
    for trained in ("blocks.1", "", "blocks.0", "norm"):
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        free = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
        rows = []
        for loss in case.losses():
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, free, retain_graph=True)]))
        before = [parameter.detach().clone() for parameter in case.model.parameters()]
        optimizer.step(case.losses)
        assert optimizer.selection is not None
        expected = torch.stack(rows) @ torch.stack(rows).T
        torch.testing.assert_close(optimizer.selection.gram, expected, rtol=1e-9, atol=1e-12)
        for old, (name, parameter) in zip(before, case.model.named_parameters(), strict=True):
            assert torch.equal(old, parameter) == (not name.startswith(trained)), name


@pytest.mark.parametrize("combine", ["factors", "graph"])
def test_parameters_swapped_after_construction(combine: str) -> None:
    """In the model and in the optimizer's groups, as sharding does; in the model alone it is an error."""
    case = language_model(seeded(lambda: SmallGPT(tied=False)).double(), 4)
    optimizer = optimizer_of(case, combine=combine)
    optimizer.step(case.losses)
    replaced = {}
    for module in case.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                replaced[id(parameter)] = module._parameters[name] = nn.Parameter(parameter.detach().clone())
    with pytest.raises(ValueError, match="that is not the model's"):
        optimizer.step(case.losses)
    for group in optimizer.param_groups:
        group["params"] = [replaced[id(parameter)] for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in case.model.parameters()]
    optimizer.step(case.losses)
    assert not any(torch.equal(old, new) for old, new in zip(before, case.model.parameters(), strict=True))


def test_a_model_moved_to_another_precision_between_steps() -> None:
    """Rules known by behaviour, ways of the fallback and a kept target gradient follow."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), Scale(), nn.RMSNorm(4), nn.Linear(4, 2)))
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))

    def losses() -> Tensor:
        return model(x.to(model[0].weight.dtype)).square().sum((1, 2))  # type: ignore[union-attr,no-any-return]

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        TargetGradient(lambda: losses()[:2], refresh_every=10),
        metric="euclidean",
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        optimizer.backward(losses)
        assert optimizer.selection is not None
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses()]
        flat = torch.stack([torch.cat([g.flatten().double() for g in row]) for row in rows])
        expected = flat @ flat.T
        rtol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
        error = (optimizer.selection.gram.double() - expected).abs().max()
        assert error <= rtol * expected.max()
        optimizer.zero_grad()


# ---------------------------------------------------------------------- the detectors, caught in the act


class Branching(nn.Module):
    """From its fifth call on it reads a weight directly, or scales by a layer that was never called before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x))))
        self.calls += torch.is_grad_enabled()
        if self.calls > 8:  # twice a step: target and candidates
            if self.how == "weight":
                hidden = hidden + functional.linear(hidden, self.middle.weight)
            elif self.how == "forward":
                hidden = self.middle.forward(hidden)
            else:
                hidden = torch.tanh(self.middle(hidden))
        scores: Tensor = self.last(hidden)
        return scores


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("how", ["weight", "forward", "call"])
def test_a_branch_first_taken_at_step_five(how: str, self_check: bool, combine: str) -> None:
    model = seeded(lambda: Branching(how)).double()
    x = drawn(4, 5, 3)
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        model,
        lambda: model(x[:2]).square().sum((1, 2)),
        combine=combine,
        self_check=self_check,
        filter=KeepAll(),
        weight=UniformWeights(),
    )
    for _ in range(4):
        optimizer.step(lambda: model(x).square().sum((1, 2)))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if how == "call":  # one more use, and captured as one
        optimizer.step(lambda: model(x).square().sum((1, 2)))
        assert optimizer.coverage["middle.weight"].uses == 2
        return
    with pytest.raises(RuntimeError, match=r"middle\.weight"):
        optimizer.step(lambda: model(x).square().sum((1, 2)))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("self_check", [True, False])
def test_a_tied_head_that_is_called_functionally_is_found_and_nothing_is_changed(
    combine: str, self_check: bool
) -> None:
    model = seeded(TiedByHand).double()
    ids = torch.tensor([[1, 2, 6], [3, 3, 0], [5, 1, 4]])
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(ids[:2]).logsumexp(-1).sum(1),
        combine=combine,
        self_check=self_check,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"tokens\.weight"):
        optimizer.step(lambda: model(ids).logsumexp(-1).sum(1))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_norm_among_the_parameters_is_refused_before_anything_runs() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).double()
    x = drawn(4, 3)

    def optimizer_for(parameters: Any) -> SelectiveOptimizer:
        return SelectiveOptimizer(
            torch.optim.SGD(parameters, lr=0.1), model, lambda: model(x[:3]).square().sum(1), combine="graph"
        )

    with pytest.raises(NotImplementedError, match=r"1\.weight: BatchNorm1d mixes the candidates.*call eval\(\)"):
        optimizer_for(model.parameters()).step(lambda: model(x).square().sum(1))
    # Out of what is scored it still mixes the rows of what is.
    optimizer = optimizer_for([*model[0].parameters(), *model[2].parameters()])
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Self-check: the captured.*0\.weight"):
        optimizer.step(lambda: (model(x).square().sum(1) + 1.0).log() * scale)
    model[1].eval()
    optimizer_for(model.parameters()).step(lambda: model(x).square().sum(1))


def test_the_last_block_of_a_checkpointed_model_is_scored_alone() -> None:
    grams = []
    for reentrant in (None, False, True):
        model: Any = model_of("llama", use_cache=False)
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        case = case_of("llama", model.double(), 4)
        optimizer = optimizer_of(case, combine="graph", scored=last_blocks(model, 1))
        optimizer.step(case.losses)
        assert optimizer.selection is not None
        grams.append(optimizer.selection.gram)
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grams[0], grams[2], rtol=1e-9, atol=1e-12)


def test_rows_are_those_of_the_batch() -> None:
    """That the helper above picks rows as the closures here do."""
    x = drawn(4, 3)
    assert torch.equal(rows_of(x, torch.tensor([2])), x[2:3])
