"""Per-candidate losses of causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim._step.label_head import IGNORED as IGNORED
from ftw_optim._step.label_head import label_logits, logits_of


def token_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    reduction: str = "token_mean",
    label_tokens: int | Tensor | None = None,
    candidates: int | None = None,
    head: str = "auto",
) -> Tensor:
    """Each row's own next-token loss, shape ``(n,)``, ready to be returned by a closure.

    The two reductions differ in how much a token counts. With ``"token_mean"`` every candidate counts the same, however
    long; the mean over candidates is a mean of means. With ``"token_sum"`` every token counts the same; the mean over
    candidates is the model's own loss, the mean over all label tokens, so uniform weights make a trainer's step.

    Args:
        model: a causal language model. Called with everything in ``batch`` but the labels, as keywords; returns logits
            ``(n, t, vocabulary)``, alone, first in a tuple, or as ``logits`` (an attribute or a key).
        batch: ``labels`` (n, t) int64, with -100 where a position does not count, and the model's inputs. Position
            ``t`` predicts label ``t + 1``, as in Transformers.
        reduction: ``"token_mean"`` divides a row's sum by the number of its own labels, ``"token_sum"`` by
            ``label_tokens / candidates``, the mean number of labels of a candidate.
        label_tokens: with ``"token_sum"``: number of labels in the whole accumulation window, see
            :func:`count_label_tokens`; None: the number in this batch.
        candidates: with ``"token_sum"``: number of candidates that a selection is made among, all of the window or
            those of this micro-batch; None: the rows of this batch.
        head: positions that the output layer runs on: ``"labels"``: those that predict a label, which saves time, and
            most of the memory of a large vocabulary; ``"all"``; ``"auto"``: ``"labels"`` where the model allows it and
            a tenth of the positions has none. Labels that lie on a device are waited for. A model allows it where
            ``get_output_embeddings()`` is a linear layer that is called once, on all positions, and what follows
            treats each number alike; the graph shows that at every call. Without gradients: ``"all"``.

    Returns:
        Losses in nats, float32 or the model's dtype if wider. A row without labels has loss and gradient zero.

    Raises:
        ValueError: the batch has no labels, the reduction or ``head`` is unknown or not possible, counts are given
            without ``"token_sum"``, or the logits have another shape.
    """
    if reduction not in ("token_mean", "token_sum"):
        raise ValueError(f'reduction must be "token_mean" or "token_sum", got {reduction!r}.')
    if reduction == "token_mean" and (label_tokens is not None or candidates is not None):
        raise ValueError(
            'label_tokens and candidates are those of a window for reduction="token_sum"; "token_mean" divides each '
            "row by its own labels. Leave them out, or ask for the sum."
        )
    shifted = shifted_labels(_labels_of(batch))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    found = label_logits(model, lambda: logits_of(model(**inputs)), shifted, head)
    if not isinstance(found.logits, Tensor) or found.logits.shape[:-1] != found.targets.shape:
        raise ValueError(
            f"Expected logits (n, t, vocabulary) for labels of shape {tuple(shifted.shape)}, got "
            f"{tuple(found.logits.shape) if isinstance(found.logits, Tensor) else type(found.logits).__name__}."
        )
    losses, counted = found.losses()
    total, counts = losses.sum(dim=1), counted.sum(dim=1)
    if reduction == "token_mean":
        return total / counts.clamp(min=1)
    window = counts.sum() if label_tokens is None else torch.as_tensor(label_tokens, device=total.device)
    return total * (len(total) if candidates is None else candidates) / window.clamp(min=1)


def count_label_tokens(*batches: Mapping[str, Any]) -> int:
    """The number of labels that :func:`token_losses` counts in some batches: those with a position before them.

    Raises:
        ValueError: a batch has no labels.
    """
    return sum(int((shifted_labels(_labels_of(batch)) != IGNORED).sum()) for batch in batches)


def shifted_labels(labels: Tensor) -> Tensor:
    """The label that each position predicts, shape ``(n, t)``: the next one; -100 at the last position."""
    # The labels are shifted, not the logits: no copy of the larger of the two.
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _labels_of(batch: Mapping[str, Any]) -> Tensor:
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"Expected a batch with labels (-100 where a position does not count), got the keys {sorted(batch)}."
        )
    return labels
