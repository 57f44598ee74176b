"""Ways of making a step's gradient, as weights on rows whose inner products are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor

from ftw_optim import FilterStage, GreedyFilter, Matching, NonNegativeLeastSquares, TopKFilter, WeightStage

ANCHOR = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of pool and target with all that is known of their gradients.

    Attributes:
        gram: shape ``(N, N)`` float64, inner products of all rows.
        held_out: shape ``(N,)``, those with the mean gradient of the held-out target rows.
        energy: the squared length of that gradient.
        pool: indices of the pool's rows.
        target: indices of the target rows that a step may run.
        likeness: shape ``(N,)``, of the rows to the target rows, without a model.
        own: whether a row is of the target's own source; all False where none is named.
    """

    gram: Tensor
    held_out: Tensor
    energy: float
    pool: Sequence[int]
    target: Sequence[int]
    likeness: Tensor
    own: Sequence[bool]

    def agreement(self, weights: Tensor) -> float:
        """The cosine of the combined gradient with that of the held-out rows; 0 for no gradient."""
        length = float(weights @ self.gram @ weights) * self.energy
        return float(weights @ self.held_out) / length**0.5 if length > 0.0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows of one step: ``n`` candidates, of which ``k`` are kept; ``m`` target rows; records read by likeness."""

    candidates: int
    keep: int
    target_rows: int
    read_ahead: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """What one step is made from.

    Attributes:
        read: rows of the pool in the order they are read.
        own: rows of the target's own source.
        target: target rows.
    """

    read: list[int]
    own: list[int]
    target: list[int]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to make a step.

    Attributes:
        label: in the table.
        trains_on_target: whether target rows are part of the step.
        rows: how many rows a step runs.
        weights: of all rows, in one step.
        oracle: whether it is told the target's own source.
    """

    label: str
    trains_on_target: bool
    rows: Callable[[Sizes], int]
    weights: Callable[[Rows, Drawn, Sizes], Tensor]
    oracle: bool = False


def draws(rows: Rows, sizes: Sizes, count: int, *, seed: int) -> list[Drawn]:
    """As many steps, each drawn without replacement."""
    generator = random.Random(seed)
    own = [row for row in rows.pool if rows.own[row]]
    return [
        Drawn(
            read=generator.sample(rows.pool, min(sizes.read_ahead, len(rows.pool))),
            own=generator.sample(own, min(sizes.candidates, len(own))),
            target=generator.sample(rows.target, min(sizes.target_rows, len(rows.target))),
        )
        for _ in range(count)
    ]


def agreement_of(way: Way, rows: Rows, drawn: Sequence[Drawn], sizes: Sizes) -> tuple[float, float]:
    """The mean agreement over some steps, and its standard error."""
    found = [rows.agreement(way.weights(rows, one, sizes)) for one in drawn]
    return mean(found), stdev(found) / len(found) ** 0.5


def uniform(rows: Rows, chosen: Sequence[int]) -> Tensor:
    """The same weight on each of some rows."""
    weights = torch.zeros(len(rows.gram), dtype=torch.float64)
    weights[list(chosen)] = 1 / max(1, len(chosen))
    return weights


def alike(rows: Rows, drawn: Drawn, count: int) -> list[int]:
    """Those of the records read that are most like the target rows."""
    order = rows.likeness[drawn.read].argsort(descending=True, stable=True)
    return [drawn.read[place] for place in order[:count].tolist()]


def selected(
    rows: Rows, candidates: Sequence[int], target: Sequence[int], filter: FilterStage, weight: WeightStage | None
) -> Tensor:
    """Candidates that a filter keeps to match the mean gradient of some target rows, weighed or alike."""
    gram, asked, energy = _guided(rows, candidates, target)
    matching = _matching(gram, asked, energy)
    kept = filter(matching)
    chosen = [candidates[place] for place in kept.tolist()]
    if weight is None or not chosen:
        return uniform(rows, chosen)
    return _spread(rows, chosen, weight(matching.restrict(kept)).weights)


def together(rows: Rows, candidates: Sequence[int], target: Sequence[int], weight: WeightStage) -> Tensor:
    """Candidates and target rows, each target row weighed by what the others ask for."""
    taking_part = [*candidates, *target]
    asked = rows.gram[taking_part][:, list(target)]
    n, m = len(candidates), len(target)
    own = asked[n:].diagonal()
    cross = asked.mean(dim=1)
    cross[n:] = (asked[n:].sum(dim=1) - own) / (m - 1)
    energy = max(float(asked[n:].sum() - own.sum()) / (m * (m - 1)), 0.01 * float(own.mean()))
    fitted = weight(_matching(rows.gram[taking_part][:, taking_part], cross, energy)).weights
    return _spread(rows, taking_part, fitted) if bool(fitted.any()) else uniform(rows, target)


def accepted(rows: Rows, candidates: Sequence[int], target: Sequence[int]) -> Tensor:
    """The target rows, and candidates whose product with them is not below zero, all alike."""
    _, asked, _ = _guided(rows, candidates, target)
    return uniform(rows, [*target, *(row for row, b in zip(candidates, asked.tolist(), strict=True) if b > 0.0)])


def _guided(rows: Rows, candidates: Sequence[int], target: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    guide = list(target)
    asked = rows.gram[list(candidates)][:, guide].mean(dim=1)
    return rows.gram[list(candidates)][:, list(candidates)], asked, float(rows.gram[guide][:, guide].mean())


def _matching(gram: Tensor, cross_gram: Tensor, energy: float) -> Matching:
    return Matching(
        gram=gram,
        cross_gram=cross_gram,
        target_energy=energy,
        losses=torch.zeros(len(gram)),
        generator=torch.Generator().manual_seed(0),
    )


def _spread(rows: Rows, chosen: Sequence[int], weights: Tensor) -> Tensor:
    found = torch.zeros(len(rows.gram), dtype=torch.float64)
    found[list(chosen)] = weights.double()
    return found


FIT = NonNegativeLeastSquares()
ANCHORED = NonNegativeLeastSquares(anchor=ANCHOR, anchor_to="positive")

WAYS = [
    Way(
        label="n of the pool",
        trains_on_target=False,
        rows=lambda sizes: sizes.candidates,
        weights=lambda rows, drawn, sizes: uniform(rows, drawn.read[: sizes.candidates]),
    ),
    Way(
        label="n most alike",
        trains_on_target=False,
        rows=lambda sizes: sizes.candidates,
        weights=lambda rows, drawn, sizes: uniform(rows, alike(rows, drawn, sizes.candidates)),
    ),
    Way(
        label="top k of n",
        trains_on_target=False,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: selected(
            rows, drawn.read[: sizes.candidates], drawn.target, TopKFilter(keep=sizes.keep), None
        ),
    ),
    Way(
        label="filter-then-weight, k of n",
        trains_on_target=False,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: selected(
            rows, drawn.read[: sizes.candidates], drawn.target, GreedyFilter(keep=sizes.keep), FIT
        ),
    ),
    Way(
        label="the same, of the n most alike",
        trains_on_target=False,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: selected(
            rows, alike(rows, drawn, sizes.candidates), drawn.target, GreedyFilter(keep=sizes.keep), FIT
        ),
    ),
    Way(
        label="n of the own source",
        trains_on_target=False,
        rows=lambda sizes: sizes.candidates,
        weights=lambda rows, drawn, sizes: uniform(rows, drawn.own),
        oracle=True,
    ),
    Way(
        label="m target rows",
        trains_on_target=True,
        rows=lambda sizes: sizes.target_rows,
        weights=lambda rows, drawn, sizes: uniform(rows, drawn.target),
    ),
    Way(
        label="m and n of the pool, uniform",
        trains_on_target=True,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: uniform(rows, [*drawn.target, *drawn.read[: sizes.candidates]]),
    ),
    Way(
        label="m and n of the pool, weighed",
        trains_on_target=True,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: together(rows, drawn.read[: sizes.candidates], drawn.target, ANCHORED),
    ),
    Way(
        label="m and n most alike, uniform",
        trains_on_target=True,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: uniform(rows, [*drawn.target, *alike(rows, drawn, sizes.candidates)]),
    ),
    Way(
        label="m and n most alike, weighed",
        trains_on_target=True,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: together(rows, alike(rows, drawn, sizes.candidates), drawn.target, ANCHORED),
    ),
    Way(
        label="m and n most alike, accepted",
        trains_on_target=True,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: accepted(rows, alike(rows, drawn, sizes.candidates), drawn.target),
    ),
    Way(
        label="m and n of the own source",
        trains_on_target=True,
        rows=lambda sizes: sizes.candidates + sizes.target_rows,
        weights=lambda rows, drawn, sizes: uniform(rows, [*drawn.target, *drawn.own]),
        oracle=True,
    ),
]
