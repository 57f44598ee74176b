"""Every model family of the table, whole and with adapters: exact against autograd, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MixtralForCausalLM

from ftw_optim import SelectiveOptimizer, coverage, last_blocks, token_losses
from tests.support.checks import check_against_oracle, optimizer_of
from tests.support.families import CONFIGS, LORA_TARGETS, case_of, family, labelled_losses, model_of
from tests.support.grids import slow
from tests.support.models import Case, precision, seeded, with_lora

N = 5
TENSORS = hasattr(MixtralForCausalLM, "set_experts_implementation")
LAYERS_ON_THEIR_OWN_ROWS = () if TENSORS else ("mixtral", "qwen3-moe")
"""Experts that are layers, called on the rows of their tokens, as older releases of Transformers have them."""
WHERE_TENSORS = pytest.mark.skipif(not TENSORS, reason="experts of this release are layers on their own rows")


def check(case: Case, **options: Any) -> SelectiveOptimizer:
    """Cold and warm, the Gram matrix, the cross-Gram and the applied gradient are the oracle's."""
    optimizer = optimizer_of(case, **options)
    check_against_oracle(case, optimizer, torch.float64)
    optimizer.step(case.losses)
    check_against_oracle(case, optimizer, torch.float64)
    return optimizer


RULES = {
    "llama": {"Embedding", "Linear", "scale norm"},
    "qwen3": {"Embedding + Linear", "Linear", "scale norm"},
    "gemma3": {"scaled Embedding + Linear", "Linear", "scale norm"},
    "phi3": {"Embedding", "Linear", "scale norm"},
    "gpt2": {"Embedding + Linear", "Embedding", "Conv1D", "LayerNorm"},
    "bert": {"Embedding + Linear", "Embedding", "Linear", "LayerNorm"},
    "t5": {"Embedding + Linear", "Embedding", "Linear", "scale norm"},
    "mixtral": {"Embedding", "Linear", "scale norm", "fallback"},  # routers and experts
    "qwen3-moe": {"Embedding", "Linear", "scale norm", "fallback"},
    "gpt-oss": {"Embedding", "Linear", "scale norm", "fallback"},  # and attention sinks
    "mamba2": {"Embedding", "Linear", "scale norm", "fallback"},  # A_log, D, dt_bias, and the convolution they read
    "mamba": {"Embedding + Linear", "Linear", "scale norm", "fallback"},
    "whisper": {"Embedding + Linear", "Linear", "LayerNorm", "Conv1d", "fallback"},  # positions read as a slice
    "vit": {"Linear", "LayerNorm", "Conv2d", "fallback"},  # class token and positions
}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in LAYERS_ON_THEIR_OWN_ROWS])
def test_a_family_is_exact_in_all_its_parameters(name: str) -> None:
    with precision(torch.float64):
        case = family(name, torch.float64, N)
        assert {row.rule for row in coverage(case.model)} == RULES[name]
        if name == "t5":
            with pytest.raises(
                NotImplementedError,
                match=r"Expected layer 'encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias' to take "
                r"inputs with the 5 candidates first, not pairs of positions, got shape \(7, 7\).*combine=\"graph\"",
            ):
                optimizer_of(case).step(case.losses)
            _freeze(case.model, "relative_attention_bias")
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # A linear layer each, but where experts or another layer is adapted.
    [
        name if name in ("llama", "gpt2", "t5", "mixtral", "mamba2") else slow(name)
        for name in CONFIGS
        if name not in LAYERS_ON_THEIR_OWN_ROWS
    ],
)
def test_a_family_is_exact_with_lora(name: str) -> None:
    with precision(torch.float64):
        case = family(name, torch.float64, N, lora=True)
        # Mixtral's and Qwen3-MoE's experts are adapted as whole tensors, of which no layer is called.
        experts = {"fallback"} if name in ("mixtral", "qwen3-moe") else set()
        assert {row.rule for row in coverage(case.model)} == {"Linear"} | experts
        check(case)


@pytest.mark.skipif(TENSORS, reason="experts of this release are whole tensors, which are exact")
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_that_are_layers_on_their_own_rows_are_refused(name: str) -> None:
    case = family(name, torch.float32, N)
    with pytest.raises(NotImplementedError, match=r"experts\.\d.*in order and in equal parts"):
        optimizer_of(case).step(case.losses)


@pytest.mark.parametrize("name", ["t5", pytest.param("mixtral", marks=WHERE_TENSORS), "mamba2", "vit"])
def test_what_is_not_scored_is_updated_exactly_in_any_family(name: str) -> None:
    """T5's relative position bias, experts and mixers, by a backward over the common graph."""
    with precision(torch.float64):
        case = family(name, torch.float64, N)
        # That T5's bias is looked up without a candidate's axis shows only when it runs.
        combine = "graph" if name == "t5" else "auto"
        optimizer = check(case, scored=last_blocks(case.model, 1), combine=combine)
        assert optimizer.selection is not None
        assert optimizer.selection.combine == "graph"


def _freeze(model: nn.Module, pattern: str) -> None:
    for name, parameter in model.named_parameters():
        if re.search(pattern, name):
            parameter.requires_grad_(False)


@WHERE_TENSORS
def test_experts_by_the_kernel_that_transformers_takes_by_default() -> None:
    """In float32, the only precision that it shares with the oracle."""
    case = family("mixtral", torch.float32, N)
    default = case_of("mixtral", _default_experts(), N)
    optimizers = [optimizer_of(one) for one in (case, default)]
    for optimizer, one in zip(optimizers, (case, default), strict=True):
        optimizer.backward(one.losses)
    first, second = (optimizer.selection for optimizer in optimizers)
    assert first is not None
    assert second is not None
    scale = first.gram.diagonal().max()
    assert (first.gram - second.gram).abs().max() <= 1e-5 * scale


def _default_experts() -> nn.Module:
    import transformers

    model = model_of("mixtral")
    options = transformers.MixtralConfig(**CONFIGS["mixtral"][1])
    again = seeded(lambda: transformers.MixtralForCausalLM(options))
    again.load_state_dict(model.state_dict())
    assert again.config._experts_implementation != "eager"
    return again.train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_kinds_of_attention(name: str, attention: str) -> None:
    with precision(torch.float64):
        check(family(name, torch.float64, N, attn_implementation=attention))


ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "DoRA": ({"use_dora": True}, {"lora_magnitude_vector": "fallback", "lora_A": "Linear"}),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {"lora_embedding_A": "fallback"}),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}, {"tokens_delta": "fallback"}),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"lm_head": "Linear"}),
    "bias": ({"bias": "lora_only", "target_modules": ["c_attn"]}, {"bias": "Conv1D"}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_other_kinds(kind: str) -> None:
    options, rules = ADAPTERS[kind]
    with precision(torch.float64):
        name = "gpt2" if kind == "bias" else "llama"
        model = seeded(lambda: with_lora(model_of(name), **options)).double()
        table = coverage(model)
        for part, rule in rules.items():
            assert {row.rule for row in table if part in row.name} == {rule}
        check(case_of(name, model, N))


def test_a_mask_that_mamba_leaves_out_for_one_row_alone_is_there_for_the_fallback() -> None:
    """The mixer reads its batch's size, so neither vmap nor single rows repeat what it did: the whole batch does."""
    with precision(torch.float64):
        case = family("mamba2", torch.float64, N)
        case.candidates["attention_mask"][1, 5:] = 0
        optimizer = optimizer_of(case, metric="euclidean")
        optimizer.backward(case.losses)
        parameters = [p for p in case.model.parameters() if p.requires_grad]
        losses = case.losses()
        rows = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        expected = torch.stack(rows) @ torch.stack(rows).T
        assert optimizer.selection is not None
        torch.testing.assert_close(optimizer.selection.gram, expected, rtol=1e-9, atol=1e-12 * float(expected.max()))


class FusedHead(nn.Module):
    """As fused losses do: the head's weight goes to a kernel of its own, and the head is never called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        inner: Any = self.model
        hidden = inner.model(input_ids=input_ids).last_hidden_state
        return _Fused.apply(hidden, inner.lm_head.weight, labels)  # type: ignore[no-any-return]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        return _Fused.losses(hidden, weight, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, labels = (one.detach() for one in ctx.saved_tensors)
        with torch.enable_grad():
            hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
            found = torch.autograd.grad(_Fused.losses(hidden, weight, labels), (hidden, weight), grad)
        return *found, None

    @staticmethod
    def losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden[:, :-1] @ weight.T
        return functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("self_check", [True, False])
def test_a_fused_head_that_no_hook_sees_is_found_and_the_rest_scored(combine: str, self_check: bool) -> None:
    with precision(torch.float64):
        model = FusedHead(model_of("llama")).double()
        case = case_of("llama", model, N)
        for batch in (case.candidates, case.target):
            batch["labels"] = batch["input_ids"]
            del batch["attention_mask"]
        case = Case(model, case.candidates, case.target, lambda model, batch: model(**batch))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(RuntimeError, match=r"model\.lm_head\.weight"):
            optimizer_of(case, combine=combine, self_check=self_check).step(case.losses)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        check(case, combine="graph", scored=lambda name, parameter: "lm_head" not in name, self_check=self_check)


def test_losses_of_every_family_are_one_for_each_row() -> None:
    """That the oracle's rows are what the closures return."""
    for name in ("bert", "vit"):
        case = family(name, torch.float32, 3)
        assert case.losses().shape == (3,)
        assert case.losses_of is labelled_losses
    losses: Callable[..., Tensor] = family("llama", torch.float32, 3).losses_of
    assert losses is token_losses
    assert not LORA_TARGETS.keys() - CONFIGS.keys()
