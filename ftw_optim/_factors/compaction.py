"""The form in which factors wait for the combined gradient: multiplied out, where that is the smaller one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ftw_optim._factors.buckets import certainly_small, is_small
from ftw_optim._factors.factors import Factors, materialise


def compacted(uses: Sequence[Factors], shape: torch.Size) -> Sequence[Factors]:
    """The uses of one parameter, multiplied out and summed where that takes at most half of their memory.

    So it is with adapters of low rank, which have few entries and read or write wide activations. The Gram matrix wants
    them multiplied out anyway; after that the activations are free, and the weighted sum reads little. What is small
    enough to share a bucket as it is stays as it is: there it is multiplied out with others.

    Args:
        uses: the uses of one parameter, which counts in the Gram matrix.
        shape: the parameter's shape.
    """
    size = sum([use.bytes() for use in uses])
    if certainly_small(size):
        return uses
    first = uses[0]
    outer = all(use.right is not None and not use.indexed for use in uses)
    if not outer or tuple(shape) != (first.rows, first.columns):
        return uses
    if 2 * first.dtype().itemsize * first.count * shape.numel() > size or is_small(uses):
        return uses
    gradients = materialise([use.by_row() for use in uses], 0, first.rows)
    return [Factors.explicit(gradients, gradients[0])]
