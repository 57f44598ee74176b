"""Buckets: the factors of parameters that are alike, stacked, so that one operation serves them all.

Where layers are small, a step costs what its operations cost to launch, not their arithmetic. A large layer fills the
machine by itself, and a copy of its factors would cost more than is saved: it stays alone.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.factors import Factors

SMALL = 2**20
"""Bytes of a parameter's factors and multiplied-out gradients up to which it shares a bucket."""

LARGEST = 2**25
"""Bytes of the factors and multiplied-out gradients of a bucket, at most."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """``B`` parameters of one shape, each of which was used once, with the candidates' rows as rows.

    Their factors are stacked each time they are needed, into a buffer: what a method returns, but for sums, is lost
    when the buffer is used again.

    Attributes:
        names: the parameters.
        shape: the shape of each.
        uses: the use of each, all of the same form.
    """

    names: Sequence[str]
    shape: torch.Size
    uses: Sequence[Factors]

    def among(self, names: Container[str]) -> Bucket:
        """The bucket of those of the parameters that have one of these names."""
        some = [(name, use) for name, use in zip(self.names, self.uses, strict=True) if name in names]
        return replace(self, names=[name for name, _ in some], uses=[use for _, use in some])

    @property
    def count(self) -> int:
        """The number of candidates."""
        return self.uses[0].count

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.uses[0].left.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: that of the factors, float32 at least."""
        return self.uses[0].dtype()

    def _stacked(self, buffer: Buffer, *, beside: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
        """Both sides of the factors, and room for as many entries ``beside`` them.

        Returns:
            left ``(n, B, t, rows)``; right ``(n, B, t, columns)``, None for a single column of ones; and the room.
        """
        lefts, rights = [use.left for use in self.uses], [use.right for use in self.uses if use.right is not None]
        sizes = [sum(part.numel() for part in parts) for parts in (lefts, rights)]
        memory = buffer.of(sum(sizes) + beside, self.dtype, self.device)

        def joined(parts: Sequence[Tensor], start: int, size: int) -> Tensor:
            n, *rest = parts[0].shape
            return torch.stack(parts, dim=1, out=memory[start : start + size].view(n, len(parts), *rest))  # type: ignore[arg-type]

        left = joined(lefts, 0, sizes[0])
        right = joined(rights, sizes[0], sizes[1]) if rights else None
        return left, right, memory[sum(sizes) : sum(sizes) + beside]

    def finite(self, buffer: Buffer) -> Tensor:
        """Mask of the candidates whose factors are all finite: bool, shape ``(n,)``."""
        left, right, _ = self._stacked(buffer)
        total = left.sum(dim=(1, 2, 3))
        return (total if right is None else total + right.sum(dim=(1, 2, 3))).isfinite()

    def materialise(self, buffer: Buffer) -> Tensor:
        """Multiply out all gradients, in :attr:`dtype`: shape ``(n + 1, B * numel)``, with a last row to be filled."""
        n, width = self.count, len(self.names) * self.shape.numel()
        left, right, room = self._stacked(buffer, beside=(n + 1) * width)
        rows = room.view(n + 1, width)
        if right is None:
            torch.sum(left, dim=2, out=rows[:n].view(n, len(self.names), -1))
        else:
            left, right = left.flatten(0, 1), right.flatten(0, 1)
            torch.bmm(left.mT, right, out=rows[:n].view(len(left), left.shape[2], right.shape[2]))
        return rows

    def weighted_sum(self, weights: Tensor, buffer: Buffer) -> Tensor:
        """``sum_i weights[i] g_i`` of each parameter, shape ``(B, *shape)``, without forming any single ``g_i``.

        Args:
            weights: shape ``(n,)``, on the CPU. Candidates of weight zero are not read.
            buffer: memory for the factors.
        """
        chosen = weights.nonzero()[:, 0]
        share = weights[chosen].to(self.device, self.dtype)[:, None, None]
        index, first = chosen.to(self.device), self.uses[0]
        sizes = [
            0 if side is None else len(self.uses) * len(chosen) * side[0].numel() for side in (first.left, first.right)
        ]
        left, right, room = self._stacked(buffer, beside=sum(sizes))

        def some(part: Tensor, room: Tensor) -> Tensor:  # (B, chosen, t, ...)
            part = part.transpose(0, 1)
            return torch.index_select(part, 1, index, out=room.view(len(part), len(chosen), *part.shape[2:]))

        left = some(left, room[: sizes[0]])
        if right is None:
            return left.mul_(share).sum(dim=(1, 2)).view(-1, *self.shape)
        right = some(right, room[sizes[0] :])
        smaller = left if left.shape[3] <= right.shape[3] else right
        smaller.mul_(share)
        return torch.bmm(left.flatten(1, 2).mT, right.flatten(1, 2)).view(-1, *self.shape)

    def projection(self, weights: Tensor, left: Tensor, right: Tensor, buffer: Buffer) -> tuple[Tensor, Tensor]:
        """The projection of each parameter's weighted sum and the size of its rounding, see :func:`projection`.

        Args:
            weights: shape ``(n,)``.
            left: shape ``(B, rows)``.
            right: shape ``(B, columns)``.
            buffer: memory for the factors.
        """
        lefts, rights, _ = self._stacked(buffer)
        columns = right if rights is None else (rights @ right[..., None])[..., 0]
        terms = (lefts @ left[..., None])[..., 0] * columns * weights.to(left)[:, None, None]  # (n, B, t)
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
    alike: dict[Hashable, dict[str, Factors]] = {}
    for name, kind in kinds.items():
        uses = found.get(name, ())
        if len(uses) == 1 and (form := _form(use := uses[0].as_sum())) is not None:
            alike.setdefault((kind, shapes[name], form), {})[name] = use
    buckets = []
    for together in alike.values():
        names = list(together)
        first = together[names[0]]
        most = min(LARGEST, limit) // max(1, _bytes([first]))
        if not is_small([first]) or len(names) < 2 or not most:
            continue
        at_once = math.ceil(len(names) / math.ceil(len(names) / most))  # in equal parts
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            buckets.append(Bucket(names=some, shape=shapes[some[0]], uses=[together[name] for name in some]))
    return buckets


def is_small(uses: Sequence[Factors]) -> bool:
    """Whether a parameter with these uses is small enough to share a bucket."""
    return _bytes(uses) <= SMALL


def certainly_small(size: int) -> bool:
    """Whether factors of this size are small, provided that the gradients multiplied out take at most half of it.

    Args:
        size: bytes of the factors.
    """
    return 2 * size <= SMALL  # with the target's gradient, which takes no more than those of the candidates


def _bytes(uses: Sequence[Factors]) -> int:
    """The bytes of a parameter's factors and multiplied-out gradients, and of the target's gradient."""
    first = uses[0]
    gradients = first.dtype().itemsize * (first.count + 1) * first.rows * first.columns
    return gradients + sum([use.bytes() for use in uses])


def _form(use: Factors) -> Hashable | None:
    """What the factors of one use must have in common with others to be stacked; None where they cannot be."""
    if use.indexed or use.positions is not None or not use.left.numel():
        return None
    left, right = use.left, use.right
    return left.shape, left.dtype, left.device, None if right is None else (right.shape, right.dtype)
