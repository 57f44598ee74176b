"""Factors, target gradient and preconditioner to the small Gram matrix, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors
from ftw_optim._gram.blocks import Block, Buffer
from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.ways import MATERIALISED, TOKENS, Observe, add_parameter, check_way
from ftw_optim._preconditioners.maps import Preconditioner

DEFAULT_MEMORY_LIMIT = 256 * 2**20
"""Bytes of multiplied-out gradients that may exist at a time, unless the user says otherwise."""


@final
class GramSums:
    """Inner products of all candidates with each other and with the target, added up parameter by parameter.

    Args:
        accepted: bool (n,), on the CPU: candidates that are not rejected; the factors of the others are zero.
        target: target gradient of each scored parameter.
        precondition: ``(name, mean candidate gradient) -> P``.
        shapes: of the parameters.
        metrics: some of :data:`METRICS`.
        dtype: to sum in.
        device: to sum on.
        scale: what the factors were multiplied by.
        memory_limit: bytes of multiplied-out gradients that may exist at a time.
        buffer: memory for them that outlives the sums.
        way: that of every parameter that allows it, ``"tokens"`` or ``"materialised"``; None: the cheaper one.
        observe: told of each parameter before it is added.
    """

    def __init__(
        self,
        accepted: Tensor,
        target: Mapping[str, Tensor],
        precondition: Callable[[str, Tensor], Preconditioner],
        *,
        shapes: Mapping[str, torch.Size],
        metrics: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        scale: float = 1.0,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        buffer: Buffer | None = None,
        way: str | None = None,
        observe: Observe | None = None,
    ) -> None:
        check_way(way, (MATERIALISED, TOKENS))
        self._sums = {metric: Products.zeros(len(accepted), dtype=dtype, device=device) for metric in metrics}
        self._mean = accepted.to(torch.float64) / accepted.sum()
        self._target, self._precondition, self._shapes, self._scale = target, precondition, shapes, scale
        self._limit = memory_limit
        self._buffer = Buffer() if buffer is None else buffer
        self._way, self._observe = way, observe

    @torch.no_grad()
    def add(self, name: str, uses: Sequence[Factors]) -> str:
        """Add the share of one scored parameter that the candidates reached; the way that was taken.

        Those they did not reach are left out, of the target energy too: the step does not move them.
        """
        block = Block(
            uses=[use.by_row() for use in uses],
            shape=self._shapes[name],
            scale=self._scale,
            limit=self._limit,
            buffer=self._buffer,
        )

        def precondition(mean: Tensor) -> Preconditioner:
            preconditioner = self._precondition(name, mean)
            if self._observe is not None:
                self._observe(name, block, mean, preconditioner)
            return preconditioner

        return add_parameter(self._sums, block, self._target.get(name), precondition, self._mean, way=self._way)

    def products(self) -> dict[str, Products]:
        """For each metric what was added up."""
        return self._sums
