"""Activated LoRA on checkpointed blocks: PEFT's hooks are there in every backward pass, and gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from ftw_optim import GreedyFilter, SelectiveOptimizer, token_losses
from ftw_optim._capture.armed_hooks import ARMED
from tests.support.families import checkpoint_blocks
from tests.support.models import seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.skipif(
        "alora_invocation_tokens" not in signature(peft.LoraConfig).parameters, reason="PEFT has no activated LoRA"
    ),
]
INVOCATION = (5, 6)


def adapted(*, reentrant: bool | None) -> peft.PeftModel:
    """A small Llama whose adapters are active from two given tokens on; None: without checkpoints."""
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    adapter = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "v_proj"],
        alora_invocation_tokens=list(INVOCATION),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    base = seeded(lambda: transformers.LlamaForCausalLM(config)).double()
    model = seeded(lambda: peft.get_peft_model(base, adapter)).double()
    if reentrant is not None:
        model.enable_input_require_grads()
        checkpoint_blocks(model.get_base_model(), reentrant=reentrant)
    return model.train()


def rows(count: int, seed: int, start: int) -> dict[str, Tensor]:
    """Sequences with the invocation at ``start``; at the same place in all, or PEFT would drop positions by row."""
    ids = torch.randint(7, 31, (count, 9), generator=torch.Generator().manual_seed(seed))
    ids[:, start : start + 2] = torch.tensor(INVOCATION)
    return {"input_ids": ids, "labels": ids}


def selected(model: nn.Module, combine: str, *, micro_batches: bool, self_check: Any) -> list[Tensor]:
    """The Gram matrix, weights and gradients of two selections."""
    batch, other, target = rows(4, 0, 2), rows(2, 1, 5), rows(3, 2, 3)

    def losses(rows: Tensor | None = None) -> Any:
        if micro_batches and rows is None:
            return parts()
        return token_losses(model, batch if rows is None else {key: value[rows] for key, value in batch.items()})

    def parts() -> Iterator[Tensor]:
        yield token_losses(model, batch)
        yield token_losses(model, other)

    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer = SelectiveOptimizer(
        inner,
        model,
        lambda: token_losses(model, target),
        filter=GreedyFilter(keep=3),
        combine=combine,
        self_check=self_check,
    )
    found: list[Tensor] = []
    for _ in range(2):
        with torch.no_grad():
            token_losses(model, target)  # as an evaluation between steps: PEFT arms hooks, and no backward follows
        _cleared(model)
        optimizer.zero_grad()
        optimizer.backward(losses)
        assert optimizer.selection is not None
        found += [optimizer.selection.gram, optimizer.selection.weights]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


def _cleared(model: nn.Module) -> None:
    """What a user would do after a pass without a backward, since PEFT asks for it."""
    for module in model.modules():
        for handle in module.__dict__.get(ARMED, ()):
            handle.remove()
        module.__dict__.pop(ARMED, None)


def hooks_of(model: nn.Module) -> int:
    names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # in the evaluation
@pytest.mark.parametrize(
    ("combine", "micro_batches"),
    [("factors", False), ("factors", True), ("graph", False), ("graph", True), ("rerun", False)],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_nothing(reentrant: bool, combine: str, micro_batches: bool) -> None:
    plain = selected(adapted(reentrant=None), combine, micro_batches=micro_batches, self_check=True)
    for self_check in (True, False):
        model = adapted(reentrant=reentrant)
        before = hooks_of(model)
        found = selected(model, combine, micro_batches=micro_batches, self_check=self_check)
        assert hooks_of(model) == before
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


def test_the_adapters_are_active_from_their_invocation_on() -> None:
    """What the comparison above rests on: other offsets are other gradients."""
    model = adapted(reentrant=None)
    assert isinstance(model, peft.PeftModel)
    batch = rows(2, 0, 2)
    losses = token_losses(model, batch)
    with model.disable_adapter():
        assert not torch.allclose(losses, token_losses(model, batch))
    moved = {**batch, "alora_offsets": [9, 9]}
    assert not torch.allclose(losses, token_losses(model, moved))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_given_up_leaves_no_hook(reentrant: bool) -> None:
    """Where what follows the output layer mixes positions, the losses run the model once more, on all."""
    grads = []
    for head in ("all", "auto"):
        model = adapted(reentrant=reentrant)
        layer = model.get_output_embeddings()
        layer.register_forward_hook(lambda module, args, output: output - output.mean(1, keepdim=True))
        before, batch = hooks_of(model), rows(4, 0, 2)
        batch["labels"] = batch["labels"].masked_fill(torch.arange(9) < 4, -100)
        inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        target = rows(2, 1, 3)
        optimizer = SelectiveOptimizer(inner, model, lambda model=model, target=target: token_losses(model, target))
        optimizer.backward(lambda model=model, batch=batch, head=head: token_losses(model, batch, head=head))
        assert hooks_of(model) == before
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_an_error_in_the_closure_leaves_no_hook() -> None:
    model = adapted(reentrant=False)
    before = hooks_of(model)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer = SelectiveOptimizer(inner, model, lambda: token_losses(model, rows(2, 1, 3)))

    def failing() -> Tensor:
        token_losses(model, rows(4, 0, 2))
        raise RuntimeError("the data end here")

    with pytest.raises(RuntimeError, match="the data end here"):
        optimizer.step(failing)
    assert hooks_of(model) == before
    optimizer.step(lambda: token_losses(model, rows(4, 0, 2)))
