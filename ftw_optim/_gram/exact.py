"""The exact Gram matrix, added up parameter by parameter from factors, target gradient and preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket
from ftw_optim._factors.factors import Factors
from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.spec import MATERIALISED, TOKENS, GramSpec
from ftw_optim._gram.ways import add_bucket, add_parameter


@final
class GramSums:
    """Inner products of all candidates with each other and with the target, added up parameter by parameter.

    Args:
        spec: the inputs and options of the Gram matrix.
        accepted: mask of the candidates that are not rejected, bool (n,) on the CPU; the factors of others are zero.
    """

    def __init__(self, spec: GramSpec, accepted: Tensor) -> None:
        spec.refuse_other_ways(MATERIALISED, TOKENS)
        self._spec = spec
        self._sums = {
            metric: Products.zeros(len(accepted), dtype=spec.dtype, device=spec.device) for metric in spec.metrics
        }
        self._mean = accepted.to(torch.float64) / accepted.sum()

    @torch.no_grad()
    def add(self, name: str, uses: Sequence[Factors]) -> str:
        """Add the share of one scored parameter that the candidates reached; returns the way that was taken.

        Parameters that no candidate reached are left out, of the target energy too: the step does not move them.
        """
        spec, block = self._spec, self._spec.block(name, uses)
        if not block.rows * block.columns:
            return MATERIALISED  # a parameter without entries has no share
        return add_parameter(
            self._sums,
            block,
            spec.target.get(name),
            lambda reference: spec.preconditioner(name, block, reference),
            self._mean,
            way=spec.way,
        )

    @torch.no_grad()
    def add_all(self, bucket: Bucket) -> None:
        """Add the shares of all parameters of a bucket."""
        spec = self._spec
        add_bucket(
            self._sums,
            bucket,
            [spec.target.get(name) for name in bucket.names],
            lambda references: spec.preconditioner_of_all(bucket, references),
            self._mean,
            scale=spec.scale,
            buffer=spec.buffer,
        )

    def products(self) -> dict[Metric, Products]:
        """The products added up so far, by metric."""
        return self._sums
