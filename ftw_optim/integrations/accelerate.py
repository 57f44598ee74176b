"""Training loops with accelerate: the ``grad_scale`` with which :meth:`SelectiveOptimizer.backward` fits in.

The prepared optimizer is stepped and cleared as usual. It forwards no attributes, so keep the selective one beside it.

::

    selective = SelectiveOptimizer(torch.optim.AdamW(model.parameters()), model, target)
    model, optimizer, loader, scheduler = accelerator.prepare(model, selective, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            selective.backward(lambda: token_losses(model, batch), grad_scale=loss_scale(accelerator))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]


def loss_scale(accelerator: Accelerator, *, accumulation_steps: int | None = None) -> float:
    """The factor that ``accelerator.backward`` applies to a loss: the GradScaler's scale over the accumulation steps.

    Args:
        accelerator: the accelerator that prepared the optimizer.
        accumulation_steps: number of ``backward`` calls that one step adds up; None: the accelerator's. Pass 1 where
            one selection is made over the whole window, or where the losses are shares of the window's loss
            (``token_losses(..., reduction="token_sum", label_tokens=...)``).

    Raises:
        ValueError: the number of steps is not positive.
    """
    steps = accelerator.gradient_accumulation_steps if accumulation_steps is None else accumulation_steps
    if steps < 1:
        raise ValueError(f"accumulation_steps must be a positive integer, got {steps!r}.")
    if accelerator.scaler is None:
        return 1.0 / steps
    # Not get_scale(): a fresh scaler makes its scale at its first call of scale().
    return float(accelerator.scaler.scale(torch.ones((), device=accelerator.device))) / steps
