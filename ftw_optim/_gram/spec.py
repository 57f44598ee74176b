"""The inputs and options of one step's Gram matrix, exact or sketched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors
from ftw_optim._gram.blocks import Block, Buffer
from ftw_optim._gram.metric import Metric
from ftw_optim._preconditioners.maps import Preconditioner

DEFAULT_MEMORY_LIMIT = 256 * 2**20
"""Bytes of multiplied-out gradients that may exist at a time, unless the user sets a limit."""

Observe = Callable[[str, Block, Tensor, Preconditioner], None]
"""A function that is called with each added parameter: name, gradients, reference, and ``P`` at the reference."""

MATERIALISED, TOKENS, CONVOLVED = "materialised", "tokens", "convolved"
"""Ways: gradients multiplied out; pairs of positions; and, in a sketch, both sides of the factors separately."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class GramSpec:
    """The inputs and options of one step's Gram matrix.

    Attributes:
        shapes: the shapes of the scored parameters, by name.
        target: the target gradients, by name; no entry where the target does not depend on the parameter.
        precondition: ``(name, reference) -> P``.
        metrics: the metrics in which products are summed.
        dtype: the dtype of the sums.
        device: the device of the sums.
        scale: the factor by which the losses, and so the factors, were multiplied.
        memory_limit: bytes of multiplied-out gradients that may exist at a time.
        buffer: memory for these gradients, which outlives the sums.
        way: the way that every parameter takes where it can; None: the cheapest for each.
        observe: called with each parameter before it is added.
    """

    shapes: Mapping[str, torch.Size]
    target: Mapping[str, Tensor]
    precondition: Callable[[str, Tensor], Preconditioner]
    metrics: Sequence[Metric]
    dtype: torch.dtype
    device: torch.device
    scale: float = 1.0
    memory_limit: int = DEFAULT_MEMORY_LIMIT
    buffer: Buffer = field(default_factory=Buffer)
    way: str | None = None
    observe: Observe | None = None

    def block(self, name: str, uses: Sequence[Factors]) -> Block:
        """The candidates' gradients of one parameter, not multiplied out yet."""
        return Block.of(uses, self.shapes[name], scale=self.scale, limit=self.memory_limit, buffer=self.buffer)

    def preconditioner(self, name: str, block: Block, reference: Tensor) -> Preconditioner:
        """``P`` of one parameter at ``reference``, the gradient that the coming step is expected to see."""
        preconditioner = self.precondition(name, reference)
        if self.observe is not None:
            self.observe(name, block, reference, preconditioner)
        return preconditioner

    def refuse_other_ways(self, *known: str) -> None:
        """Refuse a :attr:`way` that these sums do not have.

        Raises:
            ValueError: the way is neither None nor one of the ``known`` ones.
        """
        if self.way is not None and self.way not in known:
            raise ValueError(f"way must be None or one of {', '.join(map(repr, known))}, got {self.way!r}.")
