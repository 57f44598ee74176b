"""Per-candidate losses of causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
"""The label of positions that do not count, as everywhere in PyTorch and Transformers."""


def token_losses(model: nn.Module, batch: Mapping[str, Any], *, reduction: str = "token_mean") -> Tensor:
    """Each row's own next-token loss, shape ``(n,)``, ready to be returned by a closure.

    Args:
        model: a causal language model. Called with everything in ``batch`` but the labels, as keywords; returns logits
            ``(n, t, vocabulary)``, alone, first in a tuple, or as ``.logits``.
        batch: ``labels`` (n, t) int64, with -100 where a position does not count, and the model's inputs. Position
            ``t`` predicts label ``t + 1``, as in Transformers.
        reduction: ``"token_mean"`` divides a row's sum by the number of its labels, ``"token_sum"`` does not.

    Returns:
        Losses in nats, float32 or the model's dtype if wider. A row without labels has loss and gradient zero.

    Raises:
        ValueError: no labels, an unknown reduction, or logits of another shape.
    """
    if reduction not in ("token_mean", "token_sum"):
        raise ValueError(f'reduction must be "token_mean" or "token_sum", got {reduction!r}.')
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"Expected a batch with labels (-100 where a position does not count), got the keys {sorted(batch)}."
        )
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Expected logits (n, t, vocabulary) for labels of shape {tuple(labels.shape)}, got "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}."
        )
    losses, counted = position_losses(logits, shifted_labels(labels))
    total = losses.sum(dim=1)
    return total / counted.sum(dim=1).clamp(min=1) if reduction == "token_mean" else total


def shifted_labels(labels: Tensor) -> Tensor:
    """The label that each position predicts, shape ``(n, t)``: the next one; none at the last."""
    # The labels are shifted, not the logits: no copy of the larger of the two.
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def position_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each position, zero where it has no target, and which have one; both of shape ``(n, t)``.

    Args:
        logits: shape ``(n, t, vocabulary)``.
        targets: shape ``(n, t)``, the token that each position should predict, -100 for none.
    """
    # float32: the sum over a large vocabulary loses digits in half precision.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets), targets != IGNORED
