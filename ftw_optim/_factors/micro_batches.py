"""Factors of several micro-batches as those of one, and what factors came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors


@final
@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a captured parameter's factors came to.

    Attributes:
        uses: how often the parameter was used.
        multiplications: for one candidate's gradient to be multiplied out.
        bytes: of memory.
    """

    uses: int
    multiplications: int
    bytes: int

    @classmethod
    def of(cls, uses: Sequence[Factors]) -> Footprint:
        """Of all uses of one parameter."""
        return cls(
            uses=len(uses),
            multiplications=sum(use.multiplications() for use in uses),
            bytes=sum(use.bytes() for use in uses),
        )


def joined(parts: Sequence[Sequence[Factors]], counts: Sequence[int]) -> list[Factors]:
    """The uses of one parameter in several micro-batches, as those of all their candidates one after another.

    Args:
        parts: the uses in each micro-batch, none where it did not reach the parameter.
        counts: how many candidates each micro-batch has.
    """
    slots: dict[tuple[Any, ...], list[Factors | None]] = {}
    for batch, uses in enumerate(parts):
        seen: dict[tuple[Any, ...], int] = {}
        for use in uses:
            kind = (use.indexed, use.whole, use.right is None)
            seen[kind] = seen.get(kind, 0) + 1
            slots.setdefault((*kind, seen[kind]), [None] * len(parts))[batch] = use.by_row()
    return [_one_after_another(uses, counts) for uses in slots.values()]


def _one_after_another(uses: Sequence[Factors | None], counts: Sequence[int]) -> Factors:
    """One use in each micro-batch, padded with zeros to as many positions as the longest has."""
    given = [use for use in uses if use is not None]
    first, longest = given[0], max(use.left.shape[1] for use in given)

    def padded(part: Tensor, count: int) -> Tensor:
        if part.shape[:2] == (count, longest):
            return part
        wide = part.new_zeros(count, longest, *part.shape[2:])
        if len(part):
            wide[:, : part.shape[1]] = part
        return wide

    def together(which: str) -> Tensor:
        some = getattr(first, which)
        pieces = [some[:0] if use is None else getattr(use, which) for use in uses]
        return torch.cat([padded(piece, count) for piece, count in zip(pieces, counts, strict=True)])

    terms = [use.terms for use in given if use.terms is not None]
    return replace(
        first,
        left=together("left"),
        right=None if first.right is None else together("right"),
        whole=first.whole and len(given) == len(uses),  # zeros have no rows of their own
        terms=torch.linalg.vector_norm(torch.stack(terms)) if terms else None,
    )


def largest(footprints: Iterable[Mapping[str, Footprint]]) -> dict[str, Footprint]:
    """By parameter, of factors that were dropped before the next micro-batch came."""
    found: dict[str, Footprint] = {}
    for batch in footprints:
        for name, one in batch.items():
            found[name] = max(one, found.get(name, one), key=lambda footprint: footprint.bytes)
    return found
