"""Factors, target gradient and preconditioner to the small Gram matrix, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ftw_optim._factors import Factors
from ftw_optim._gram_ways import Block, Buffer, add_parameter
from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._products import Products

DEFAULT_MEMORY_LIMIT = 256 * 2**20
"""Bytes of multiplied-out gradients that may exist at a time, unless the user says otherwise."""


def products(
    found: Mapping[str, Sequence[Factors]],
    target: Mapping[str, Tensor],
    precondition: Callable[[str, Tensor], Preconditioner],
    accepted: Tensor,
    *,
    shapes: Mapping[str, torch.Size],
    metrics: Sequence[str],
    scale: float = 1.0,
    memory_limit: int | None = None,
    buffer: Buffer | None = None,
) -> dict[str, Products]:
    """Inner products of all candidates with each other and with the target, in each of the ``metrics``.

    Args:
        found: factors of each scored parameter that the candidates reached, multiplied by ``scale``. Parameters they
            did not reach are left out, of the target energy too: the step does not move them.
        target: target gradient of each scored parameter.
        precondition: ``(name, mean candidate gradient) -> P``.
        accepted: bool (n,), on the CPU: candidates that are not rejected; the factors of the others are zero.
        shapes: of the parameters.
        metrics: some of :data:`METRICS`.
        scale: what the factors were multiplied by.
        memory_limit: bytes of multiplied-out gradients that may exist at a time.
        buffer: memory for them that outlives the call.

    Returns:
        For each metric its products, on the CPU.
    """
    limit = DEFAULT_MEMORY_LIMIT if memory_limit is None else memory_limit
    first = next(iter(found.values()))[0]
    dtype = torch.float32
    for uses in found.values():
        for use in uses:
            dtype = torch.promote_types(dtype, use.dtype())
    sums = {metric: Products.zeros(len(accepted), dtype=dtype, device=first.left.device) for metric in metrics}
    mean = accepted.to(torch.float64) / accepted.sum()
    buffer = Buffer() if buffer is None else buffer
    with torch.no_grad():
        for name, given in found.items():
            block = Block(
                uses=[use.by_row() for use in given], shape=shapes[name], scale=scale, limit=limit, buffer=buffer
            )
            add_parameter(
                sums,
                block,
                target.get(name),
                lambda reference, name=name: precondition(name, reference),  # type: ignore[misc]
                mean,
            )
    return {metric: summed.on_host() for metric, summed in sums.items()}
