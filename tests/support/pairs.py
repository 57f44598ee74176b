"""Candidates of two rows each: pairs, concatenated as trainers of preferences do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.models import CASES, Case


def pair_ids(n: int) -> Tensor:
    """The pair of each of ``2 n`` rows: first all chosen rows, then all rejected ones."""
    return torch.arange(n).repeat(2)


def pairs(name: str, n: int, dtype: torch.dtype = torch.float64, *, at_once: bool = True) -> Case:
    """A case of :data:`CASES` whose candidates and target examples are pairs of its rows, with a loss of each pair.

    Both halves run at once, in one batch of twice as many rows; or each by a call of its own, whose rows are pairs.
    """
    case, other = CASES[name](dtype, n), CASES[name](dtype, 2 * n)

    def joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{side}/{key}": value for side, part in enumerate((first, second)) for key, value in part.items()}

    def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        keys = [key.partition("/")[2] for key in batch if key.startswith("0/")]
        halves = [{key: batch[f"{side}/{key}"] for key in keys} for side in (0, 1)]
        if at_once:
            rows = {key: torch.cat([half[key] for half in halves]) for key in keys}
            chosen, rejected = case.losses_of(model, rows).chunk(2)
        else:
            chosen, rejected = (case.losses_of(model, half) for half in halves)
        return -functional.logsigmoid(2 * (rejected - chosen)) + 0.1 * chosen.square()

    first, second = ({k: v[part] for k, v in other.candidates.items()} for part in (slice(n), slice(n, None)))
    target = joined(case.target, {key: value.flip(0) for key, value in case.target.items()})
    return Case(case.model, joined(first, second), target, losses_of)
