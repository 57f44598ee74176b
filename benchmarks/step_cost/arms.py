"""The arms of ``step_cost.py``: one model, its batches, a plain step and a selective one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, TargetGradient, last_blocks, token_losses

from .points import SHAPES, Point

VOCABULARY = 512
TARGET_SEED, TINY = 10**6, 8

Step = Callable[..., None]
"""Takes a number, which seeds the batch; and ``t``, to use rows of another length."""


def build_config(point: Point) -> transformers.PretrainedConfig:
    """The configuration of the point's model."""
    heads = max(1, point.width // 64)
    fields: dict[str, Any] = SHAPES.get(point.shape) or {
        "vocab_size": VOCABULARY,
        "hidden_size": point.width,
        "intermediate_size": 4 * point.width,
        "num_hidden_layers": point.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": point.width // heads,
    }
    configs = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    return configs[point.family](**fields, max_position_embeddings=point.t, use_cache=False)


def build_model(point: Point, device: str) -> nn.Module:
    """A model with random weights, the same at each call on the same device; with adapters if asked for."""
    torch.manual_seed(0)
    with torch.device(device):
        models = {"llama": transformers.LlamaForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}
        model = models[point.family](build_config(point))
        if point.checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if point.lora:
            model = _adapted(model, point.lora)
    return model.to(getattr(torch, point.dtype)).train()


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    import peft  # here: it takes a second, and most points need none

    with warnings.catch_warnings():
        # PEFT 0.21 asks Transformers for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros at first: no gradient would reach the other half
            nn.init.normal_(parameter, std=0.02)
    return adapted


def batch(point: Point, count: int, seed: int, device: str, t: int | None = None) -> dict[str, Tensor]:
    """Tokens drawn at random, a few of them often, as words are: there is something that all rows teach."""
    vocabulary = SHAPES[point.shape]["vocab_size"] if point.shape else VOCABULARY
    drawn = torch.rand(count, t or point.t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = (vocabulary**drawn).long() - 1  # log-uniform: Zipf's law
    return {"input_ids": ids.to(device), "labels": ids.to(device)}


def losses_of(point: Point, model: nn.Module, rows: dict[str, Tensor], device: str) -> Tensor:
    """Each row's loss, in the point's precision."""
    context: AbstractContextManager[Any] = torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=point.autocast
    )
    with context:
        return token_losses(model, rows)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain_arm(point: Point, device: str, *, foreach: bool | None = None) -> tuple[Step, torch.optim.Optimizer]:
    """One step of AdamW on all candidates."""
    model = build_model(point, device)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-4, foreach=foreach)

    def step(number: int, t: int | None = None) -> None:
        optimizer.zero_grad()
        losses_of(point, model, batch(point, point.n, number, device, t), device).mean().backward()
        optimizer.step()

    return step, optimizer


def selective_arm(
    point: Point, way: str, device: str, *, foreach: bool | None = None
) -> tuple[Step, SelectiveOptimizer]:
    """One selective step, with this value of ``combine``."""
    model = build_model(point, device)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(trained(model).values(), lr=1e-4, foreach=foreach),
        model,
        TargetGradient(
            lambda: losses_of(point, model, batch(point, point.m, TARGET_SEED, device), device), refresh_every=point.r
        ),
        filter=KeepAll() if point.k == point.n else GreedyFilter(keep=point.k),
        combine=way,
        scored=last_blocks(model, point.scored) if point.scored else None,
        self_check=False,
    )

    def step(number: int, t: int | None = None) -> None:
        candidates = batch(point, point.n, number, device, t)

        def losses(rows: Tensor | None = None) -> Tensor:
            some = candidates if rows is None else {key: value[rows] for key, value in candidates.items()}
            return losses_of(point, model, some, device)

        optimizer.step(losses)
        if t is None and optimizer.selection is not None and optimizer.selection.skipped:
            raise RuntimeError("Expected every step to apply something, but one was skipped: it would be too fast.")

    return step, optimizer


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)
