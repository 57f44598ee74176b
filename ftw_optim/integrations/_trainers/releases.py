"""Differences between releases of Transformers that selection must know: which labels count, who decides the order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

if TYPE_CHECKING:
    from transformers import Trainer


def loss_shifts_labels(trainer: Trainer) -> bool:
    """Whether the model's own loss is the next-token loss: the label of a position is predicted by the one before."""
    known = getattr(trainer, "_loss_shifts_labels", None)
    if known is not None:
        return bool(known)
    model: Any = trainer.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss and not encodes


def counts_first_label(trainer: Trainer) -> bool:
    """Whether the trainer counts a row's first label, which nothing predicts, among those that it divides by."""
    return not hasattr(trainer, "_loss_shifts_labels")


def own_order(args: Any) -> str | None:
    """The setting by which the trainer would order the data itself, such as ``group_by_length=True``; None: none."""
    if (strategy := getattr(args, "train_sampling_strategy", "random")) != "random":
        return f"train_sampling_strategy={strategy!r}"
    return "group_by_length=True" if getattr(args, "group_by_length", False) else None
