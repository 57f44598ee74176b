"""The inputs and options of one step's Gram matrix, exact or sketched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket
from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.factors import Factors
from ftw_optim._gram.blocks import Block
from ftw_optim._gram.metric import Metric
from ftw_optim._preconditioners.maps import Diagonal, Preconditioner, Scalar

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
        precondition_all: ``(names, references) -> P`` of parameters that share a bucket, all stacked.
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
    precondition_all: Callable[[Sequence[str], Tensor], Scalar | Diagonal] | None = None

    def block(self, name: str, uses: Sequence[Factors]) -> Block:
        """The candidates' gradients of one parameter, not multiplied out yet."""
        return Block.of(uses, self.shapes[name], scale=self.scale, limit=self.memory_limit, buffer=self.buffer)

    def preconditioner(self, name: str, block: Block, reference: Tensor) -> Preconditioner:
        """``P`` of one parameter at ``reference``, the gradient that the coming step is expected to see."""
        preconditioner = self.precondition(name, reference)
        if self.observe is not None:
            self.observe(name, block, reference, preconditioner)
        return preconditioner

    def preconditioner_of_all(self, bucket: Bucket, references: Tensor) -> Scalar | Diagonal:
        """``P`` of all parameters of a bucket, stacked, at their references ``(B, *shape)``."""
        assert self.precondition_all is not None
        found = self.precondition_all(bucket.names, references)
        if self.observe is not None:
            for number, (name, reference) in enumerate(zip(bucket.names, references, strict=True)):
                own = Diagonal(found.values[number]) if isinstance(found, Diagonal) else found
                self.observe(name, self.block(name, [bucket.uses[number]]), reference, own)
        return found

    def refuse_other_ways(self, *known: str) -> None:
        """Refuse a :attr:`way` that these sums do not have.

        Raises:
            ValueError: the way is neither None nor one of the ``known`` ones.
        """
        if self.way is not None and self.way not in known:
            raise ValueError(f"way must be None or one of {', '.join(map(repr, known))}, got {self.way!r}.")
