"""Draws from records that are the same in whatever order the records come.

Every random number is a hash of the record, the seed and the number of the call. So a run that is resumed needs no
state of a generator, and records change places without changing what is drawn.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

BEST_SHARE = 1 / 16
"""Share of the records read, the most alike ones, that count as equally alike."""

_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # the multipliers of splitmix64, as signed numbers


def salt(*parts: object) -> int:
    """A number of 64 bits, signed, that differs wherever a part does."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def mixed(values: Tensor) -> Tensor:
    """Hashes of int64 ``values``: all 64 bits of each depend on all of its value (the finaliser of splitmix64)."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)  # shifts of int64 copy the sign


def uniforms(keys: Tensor, salt: int) -> Tensor:
    """Numbers between 0 and 1, float64, one for each int64 key; equal keys have equal numbers."""
    return (_shifted(mixed(mixed(keys) ^ salt), 11).double() + 0.5) * 2.0**-53


def apart(keys: Tensor) -> Tensor:
    """Keys of which no two are equal: those of equal records, which may change places, are told apart."""
    order = keys.argsort(stable=True)
    ordinals = torch.empty_like(keys)
    ordinals[order] = _ordinals(keys[order])
    return torch.where(ordinals > 0, keys ^ mixed(ordinals), keys)


def explored(count: int, explore: float, salt: int) -> int:
    """How many of ``count`` to draw uniformly: ``count * explore`` on average, rounded up or down at random."""
    whole = int(count * explore)
    drawn = float(uniforms(torch.zeros(1, dtype=torch.int64), salt))
    return whole + int(drawn < count * explore - whole)


def best_and_uniform(
    scores: Tensor,
    keys: Tensor,
    sources: Tensor,
    count: int,
    *,
    explore: float,
    explore_by: str,
    salt: int,
    as_good: float = 0.0,
) -> Tensor:
    """Positions of the highest ``scores``, or of some of them, then of those drawn uniformly from the rest, int64.

    Args:
        scores: shape ``(n,)``; among equal ones the draw decides.
        keys: shape ``(n,)`` int64, no two of them equal (:func:`apart`), of which each draw is a function.
        sources: shape ``(n,)``, a number for each source.
        count: number of positions; all, if there are fewer.
        explore: share of ``count`` that is drawn uniformly.
        explore_by: ``"record"``: every record is equally likely. ``"source"``: every source is, and none is drawn from
            again before all others were.
        salt: the seed of the draw.
        as_good: share of the finite scores, the highest, that count as equally high: where these are more than are
            taken of them, it is drawn which.
    """
    count = min(count, len(keys))
    drawn = explored(count, explore, salt)
    among = math.ceil(as_good * int(scores.isfinite().sum()))
    shuffled = uniforms(keys, salt).argsort(stable=True)
    best = shuffled[scores[shuffled].argsort(descending=True, stable=True)][: max(count - drawn, among)]
    if len(best) > count - drawn:
        best = best[uniforms(keys[best], salt ^ _SECOND).argsort(stable=True)][: count - drawn]
    left = torch.ones(len(keys), dtype=torch.bool)
    left[best] = False
    # Other numbers than those above, by which what is left is sorted already.
    shuffled = uniforms(keys, ~salt).argsort(stable=True)
    rest = shuffled[left[shuffled]]
    if explore_by == "source":
        rest = rest[_turns(sources[rest], salt)]
    return torch.cat([best, rest[:drawn]])


def _turns(sources: Tensor, salt: int) -> Tensor:
    """The order in which sources take turns: the first of each source, in random order, then the second of each."""
    by_source = sources.argsort(stable=True)
    turn = torch.empty(len(sources), dtype=torch.int64)
    turn[by_source] = _ordinals(sources[by_source])
    order = uniforms(sources.long(), salt).argsort(stable=True)
    return order[turn[order].argsort(stable=True)]


def _ordinals(ordered: Tensor) -> Tensor:
    """How many equal numbers come before each, where equal ones follow each other."""
    places = torch.arange(len(ordered))
    begins = torch.ones(len(ordered), dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    return places - torch.where(begins, places, 0).cummax(0).values
