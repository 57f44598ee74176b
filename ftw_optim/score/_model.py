"""The model whose gradients are compared, and the part of it that is trained: adapters, last blocks, or both."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ftw_optim._step.blocks import last_blocks


def load_model(
    name: str, *, lora: int | None, blocks: int | None, seed: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode and its tokenizer; what is to be trained requires a gradient.

    Args:
        name: a directory or hub name; of a PEFT adapter too, which is then what is trained.
        lora: rank of new LoRA adapters on all linear layers; None: no new ones.
        blocks: number of last blocks outside of which nothing is trained; None: no bound.
        seed: draws the new adapters.
        device: where the model lies.
        dtype: of its parameters.

    Raises:
        ImportError: adapters are asked for and peft is missing.
        ValueError: the model has fewer blocks, nothing to train is named, or an adapter is to get another one.
        OSError: there is no such model.
    """
    adapter = Path(name, "adapter_config.json")
    if adapter.is_file():
        if lora is not None:
            raise ValueError(f"Expected a model without adapters for new ones, but {name} is an adapter: leave --lora.")
        base = json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"]
        peft = _peft()
        with _quiet_peft():
            model = peft.AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, dtype=dtype)
        has_tokenizer = Path(name, "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(name if has_tokenizer else base)
    else:
        if lora is None and blocks is None:
            raise ValueError("Expected what is trained: --lora RANK, --last-blocks N, or both (LoRA on these blocks).")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if lora is not None:
            peft = _peft()
            with torch.random.fork_rng(devices=[]), _quiet_peft():
                torch.manual_seed(seed)
                config = peft.LoraConfig(
                    r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM"
                )
                model = peft.get_peft_model(model, config)
    if blocks is not None:
        inside = last_blocks(model, blocks)
        for part, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and inside(part, parameter))
    return model.to(device).eval(), tokenizer


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def digest(model: nn.Module) -> int:
    """A number that differs where a parameter or a buffer does."""
    total = 0
    for name, value in sorted(model.state_dict().items()):
        total = zlib.crc32(name.encode(), total)
        flat = value.detach().cpu().contiguous().view(-1)
        for part in flat.split(1 << 22):
            total = zlib.crc32(part.view(torch.uint8).numpy().data, total)
    return total


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """A block without the warning that PEFT reads an attribute which Transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise ImportError("LoRA adapters need peft: pip install peft, or take --last-blocks N.") from error
