"""Buckets: the factors of parameters that are alike, stacked, so that one operation serves them all.

Where layers are small, a step costs what its operations cost to launch, not their arithmetic. A large layer fills the
machine by itself, and a copy of its factors would cost more than is saved: it stays alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors

SMALL = 2**20
"""Bytes of a parameter's factors and multiplied-out gradients up to which it shares a bucket."""

LARGEST = 2**25
"""Bytes of the factors and multiplied-out gradients of a bucket, at most."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """The factors of ``B`` parameters of one shape, each of which was used once, with the candidates' rows as rows.

    Attributes:
        names: the parameters.
        shape: the shape of each.
        left: shape ``(n, B, t, rows)``.
        right: shape ``(n, B, t, columns)``, or None for a single column of ones.
    """

    names: Sequence[str]
    shape: torch.Size
    left: Tensor
    right: Tensor | None

    @classmethod
    def of(cls, names: Sequence[str], uses: Sequence[Factors], shape: torch.Size) -> Bucket:
        """The bucket of some parameters' uses, one for each, which are copied."""
        rights = [use.right for use in uses if use.right is not None]
        return cls(
            names=names,
            shape=shape,
            left=torch.stack([use.left for use in uses], dim=1),
            right=torch.stack(rights, dim=1) if rights else None,
        )

    @property
    def count(self) -> int:
        """The number of candidates."""
        return len(self.left)

    @property
    def numel(self) -> int:
        """The number of entries of all parameters together."""
        return len(self.names) * self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: that of the factors, float32 at least."""
        return self.use(0).dtype()

    def use(self, number: int) -> Factors:
        """The factors of one of the parameters, which share the bucket's memory."""
        right = None if self.right is None else self.right[:, number]
        return Factors(left=self.left[:, number], right=right)

    def finite(self) -> Tensor:
        """Mask of the candidates whose factors are all finite: bool, shape ``(n,)``."""
        total = self.left.sum(dim=(1, 2, 3), dtype=self.dtype)
        if self.right is not None:
            total = total + self.right.sum(dim=(1, 2, 3), dtype=self.dtype)
        return total.isfinite()

    def materialise(self, out: Tensor) -> None:
        """Multiply out all gradients, in :attr:`dtype`, into ``out`` of shape ``(n, numel)``, which is contiguous."""
        left = self.left.to(self.dtype)
        if self.right is None:
            torch.sum(left, dim=2, out=out.view(self.count, len(self.names), -1))
            return
        left, right = left.flatten(0, 1), self.right.to(self.dtype).flatten(0, 1)
        torch.bmm(left.mT, right, out=out.view(len(left), left.shape[2], right.shape[2]))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_i weights[i] g_i`` of each parameter, shape ``(B, *shape)``, without forming any single ``g_i``.

        Args:
            weights: shape ``(n,)``, on the CPU. Candidates of weight zero are not read.
        """
        chosen = weights.nonzero()[:, 0]
        weights, index = (one.to(self.left.device) for one in (weights[chosen].to(self.dtype), chosen))

        def some(part: Tensor) -> Tensor:  # (B, chosen, t, ...)
            return part.transpose(0, 1).index_select(1, index).to(self.dtype)

        left, right = some(self.left), None if self.right is None else some(self.right)
        share = weights[:, None, None]
        if right is None:
            total = (left * share).sum(dim=(1, 2))
        elif left.shape[3] <= right.shape[3]:
            total = torch.bmm((left * share).flatten(1, 2).mT, right.flatten(1, 2))
        else:
            total = torch.bmm(left.flatten(1, 2).mT, (right * share).flatten(1, 2))
        return total.view(len(self.names), *self.shape)

    def projection(self, weights: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The projection of each parameter's weighted sum and the size of its rounding, see :func:`projection`.

        Args:
            weights: shape ``(n,)``.
            left: shape ``(B, rows)``.
            right: shape ``(B, columns)``.
        """
        terms = (self.left.to(left) @ left[..., None])[..., 0]  # (n, B, t)
        columns = right if self.right is None else (self.right.to(right) @ right[..., None])[..., 0]
        terms = terms * columns * weights.to(terms)[:, None, None]
        return terms.sum(dim=(0, 2)), torch.linalg.vector_norm(terms, dim=(0, 2))


def buckets_of(
    found: Mapping[str, Sequence[Factors]],
    shapes: Mapping[str, torch.Size],
    kinds: Mapping[str, Hashable],
    *,
    limit: int,
) -> list[Bucket]:
    """The parameters that share buckets with others.

    Args:
        found: the uses of each parameter.
        shapes: the shape of each parameter.
        kinds: what else parameters must have in common to share a bucket; none does that has no entry.
        limit: bytes of a bucket, if less than :data:`LARGEST`.
    """
    alike: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        uses = found.get(name, ())
        if len(uses) == 1 and (form := _form(uses[0])) is not None:
            alike.setdefault((kind, shapes[name], form), []).append(name)
    buckets = []
    for names in alike.values():
        first = found[names[0]][0]
        size = first.dtype().itemsize * (first.count + 1) * first.rows * first.columns + first.bytes()
        most = min(LARGEST, limit) // max(1, size)
        if size > SMALL or len(names) < 2 or not most:
            continue
        at_once = math.ceil(len(names) / math.ceil(len(names) / most))  # in equal parts
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            buckets.append(Bucket.of(some, [found[name][0] for name in some], shapes[some[0]]))
    return buckets


def _form(use: Factors) -> Hashable | None:
    """What the factors of one use must have in common with others to be stacked; None where they cannot be."""
    if use.indexed or use.whole or use.positions is not None or not use.left.numel():
        return None
    left, right = use.left, use.right
    return left.shape, left.dtype, left.device, None if right is None else (right.shape, right.dtype)
