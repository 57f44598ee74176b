"""A family's model from a small configuration, the batches that it reads, and one loss for each of their rows."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.auto import modeling_auto

from ftw_optim import token_losses

from .configs import LENGTH, VOCABULARY, overridden, smaller

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
LARGEST = 3_000_000
LABELS = 3
LENGTHS = ([8, 5, 7, 8], [6, 8, 8, 3])
"""Tokens that are no padding in each row, of the first step and the second."""

TRAINED = ("float32", "bfloat16 with LoRA")

MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Whose ``out_proj`` PEFT does not adapt."""

Batch = dict[str, Tensor]


class NotBuilt(Exception):
    """A family that cannot be built small, or does not run on its own; the message says why."""


@dataclass(frozen=True)
class Family:
    """One model class of Transformers, and what it is trained for: a key of ``MAPPINGS``."""

    name: str
    kind: str
    architecture: str


def families(names: list[str] | None = None) -> list[Family]:
    """All model classes of the mappings, each once; of classifiers those that are encoders."""
    found: dict[str, Family] = {}
    for kind, mapping in MAPPINGS.items():
        for name, architecture in mapping.items():
            encoder = name not in MAPPINGS["causal"] or name in MAPPINGS["masked"]
            if (kind != "classifier" or (encoder and name not in MAPPINGS["seq2seq"])) and (
                names is None or name in names
            ):
                found.setdefault(architecture, Family(name, kind, architecture))
    return list(found.values())


def parameter_count(family: Family) -> int:
    """Of the small model, without memory for it.

    Raises:
        NotBuilt: Transformers cannot make it, or it is too large.
    """
    with or_not_built("not built"), torch.device("meta"):
        count = sum(parameter.numel() for parameter in _new(family).parameters())
    if count > LARGEST:
        raise NotBuilt(f"not built: {count:,} parameters, the small configuration included")
    return count


@contextmanager
def or_not_built(what: str) -> Iterator[None]:
    """A block whose errors are Transformers' or PEFT's own."""
    try:
        yield
    except (NotBuilt, TimeoutError):
        raise
    except Exception as error:
        raise NotBuilt(f"{what}: {type(error).__name__}: {error}") from error


def _new(family: Family) -> nn.Module:
    """The small model, with random weights."""
    architecture = getattr(transformers, family.architecture)
    config_class = transformers.CONFIG_MAPPING[family.name]
    config = config_class.from_dict(overridden(family.name, smaller(config_class().to_dict())))
    if not isinstance(config, architecture.config_class):
        config = config.get_text_config(decoder=True)
    if family.kind == "causal" and "is_decoder" in config.to_dict() and not config.is_encoder_decoder:
        config.is_decoder = True
    if family.kind == "classifier":
        config.num_labels = LABELS
    model: nn.Module = architecture(config)
    return model


def model_of(family: Family, trained: str) -> nn.Module:
    """The model in training mode, whole in float32, or in bfloat16 with LoRA on all linear layers.

    Raises:
        NotBuilt: Transformers or PEFT cannot make it.
    """
    parameter_count(family)  # before memory is taken
    torch.manual_seed(0)
    with or_not_built("not built"):
        model = _new(family)
    if trained != "float32":
        with or_not_built("PEFT"):
            model = _with_lora(model.to(torch.bfloat16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide mistakes
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.nan_to_num_().add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def _with_lora(model: nn.Module) -> nn.Module:
    import peft  # here, since it takes seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what it reads from transformers, and on Conv1D's stored layout
        without = ["out_proj"] if model.config.model_type in MAMBAS else None
        options = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", exclude_modules=without)
        adapted: nn.Module = peft.get_peft_model(model, options)
    return adapted


@dataclass(frozen=True)
class Case:
    """A model with two batches of candidates, and the losses of a batch: as plain code has them, and as users do."""

    model: nn.Module
    batches: list[Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    given: Callable[[nn.Module, Batch], Tensor]


def case_of(family: Family, trained: str) -> Case:
    """The model of a family with its batches and losses."""
    model = model_of(family, trained)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    kind = family.kind
    if kind == "seq2seq" and not inner.config.is_encoder_decoder:
        kind = "causal"  # texts that follow sounds, here without
    batches = [_batch(inner, kind, lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    losses = {"causal": _next_token_losses, "classifier": _class_losses}.get(kind, _token_losses)
    return Case(model, batches, losses, token_losses if kind == "causal" else losses)


def _batch(model: nn.Module, kind: str, lengths: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    rows = len(lengths)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    padding = config.get_text_config().to_dict().get("pad_token_id")
    padding = padding if isinstance(padding, int) and padding >= 0 else 0

    def tokens() -> Tensor:
        return torch.randint(3, VOCABULARY // 2, (rows, LENGTH), generator=generator)

    ids = tokens().masked_fill(mask == 0, padding)
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "seq2seq":
        answers = tokens()
        batch |= {"decoder_input_ids": answers, "labels": answers.roll(-1, 1).masked_fill(mask == 0, -100)}
    elif kind == "classifier":
        batch["labels"] = torch.randint(LABELS, (rows,), generator=generator)
    else:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    taken = inspect.signature(model.forward).parameters
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    return {key: value for key, value in batch.items() if anything or key in taken or key == "labels"}


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits.float()


def _next_token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return _means(_logits(model, batch)[:, :-1], batch["labels"][:, 1:])


def _token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return _means(_logits(model, batch), batch["labels"])


def _class_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return functional.cross_entropy(_logits(model, batch), batch["labels"], reduction="none")


def _means(logits: Tensor, labels: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.mT, labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)
