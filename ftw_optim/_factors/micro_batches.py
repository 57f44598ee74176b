"""Factors of several micro-batches, joined to those of one batch; and the footprint of factors."""

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
    """The cost of a captured parameter's factors.

    Attributes:
        uses: number of times the parameter was used.
        multiplications: number of multiplications that multiply out one candidate's gradient.
        bytes: memory of the factors.
    """

    uses: int
    multiplications: int
    bytes: int

    @classmethod
    def of(cls, uses: Sequence[Factors]) -> Footprint:
        """The footprint of all uses of one parameter."""
        return cls(
            uses=len(uses),
            multiplications=sum([use.multiplications() for use in uses]),
            bytes=sum([use.bytes() for use in uses]),
        )


def joined(parts: Sequence[Sequence[Factors]], counts: Sequence[int]) -> list[Factors]:
    """The uses of one parameter over all candidates of several micro-batches, in the order of the micro-batches.

    Args:
        parts: the uses in each micro-batch; empty where the micro-batch did not reach the parameter.
        counts: the number of candidates in each micro-batch.
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
    """One use joined over the micro-batches, padded with zeros to the largest number of positions."""
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
    """Each parameter's largest footprint, in bytes, over the micro-batches."""
    found: dict[str, Footprint] = {}
    for batch in footprints:
        for name, one in batch.items():
            found[name] = max(one, found.get(name, one), key=lambda footprint: footprint.bytes)
    return found
