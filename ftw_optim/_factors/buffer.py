"""Memory that outlives what is written into it."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor


@final
class Buffer:
    """Memory that is used again and again: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffer, ()  # copies and pickles are empty

    def of(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor of at least ``numel`` entries; the contents of the one returned before are lost."""
        memory = self._memory
        if memory is None or memory.numel() < numel or memory.dtype != dtype or memory.device != device:
            self._memory = memory = None  # free the old one first
            memory = self._memory = torch.empty(numel, dtype=dtype, device=device)
        return memory
