"""Hooks that PEFT arms on checkpointed blocks, by which an activated LoRA finds its offsets when a block runs again.

PEFT arms them in every forward pass of the model and disarms them in the first backward through a block, and refuses a
second forward before that. So it breaks with forward passes without gradients, with backward passes that stop at the
outputs of layers, and with several over one graph; all of which selection makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

ARMED = "_peft_gradient_checkpointing_forward_hooks"
"""The attribute of a checkpointed block in which PEFT keeps the handles of the hooks that it has armed."""

_Entries = list[tuple[MutableMapping[int, Any], int, Any]]
"""Dictionaries of hooks with the key and the value that belong there."""


@final
class ArmedHooks:
    """A context that decides in PEFT's place how long the hooks of its forward pass stay armed.

    Args:
        modules: all modules of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = modules
        self._entries: _Entries = []
        self._blocks: list[nn.Module] | None = None  # those that PEFT arms, once the forward pass has run

    def __enter__(self) -> ArmedHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disarm()
        self._entries.clear()

    def take_over(self) -> None:
        """Keep the hooks that the forward pass has armed until :meth:`disarm`, whatever backward passes run."""
        for handle in self._handles():
            self._entries += _entries(handle)

    def arm(self) -> None:
        """Put the hooks back, for a backward pass over the graph of their forward pass."""
        for hooks, key, value in self._entries:
            hooks[key] = value

    def disarm(self) -> None:
        """Take the hooks away until :meth:`arm`, and for good those armed since by blocks that ran again."""
        for handle in self._handles():
            handle.remove()
        for hooks, key, _ in self._entries:
            hooks.pop(key, None)

    def _handles(self) -> list[RemovableHandle]:
        """The handles that PEFT holds now, which it then holds no longer."""
        taken: list[RemovableHandle] = []
        if self._blocks is None:
            self._blocks = [module for module in self._modules if ARMED in module.__dict__]
        for block in self._blocks:
            if handles := block.__dict__.get(ARMED):
                taken += handles
                handles.clear()
        return taken


@contextmanager
def passing_without_trace(model: nn.Module) -> Iterator[None]:
    """A block for one forward pass without gradients, which leaves no hook, and the buffers as they were."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), ArmedHooks(model.modules()), warnings.catch_warnings():
        # What reentrant checkpoints say of every such pass.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        try:
            yield
        finally:
            for name, buffer in model.named_buffers():  # averages and counters go on in training mode
                if name in before and before[name].shape == buffer.shape:
                    buffer.copy_(before[name])


def _entries(handle: RemovableHandle) -> _Entries:
    """What the handle would remove."""
    places = [handle.hooks_dict_ref(), *(reference() for reference in handle.extra_dict_ref)]
    return [(place, handle.id, place[handle.id]) for place in places if place is not None and handle.id in place]
