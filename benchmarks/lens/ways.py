"""Ways of making a step's gradient, as weights on rows whose inner products are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import NamedTuple

import torch
from pays.arms import Sizes
from torch import Tensor

from ftw_optim import FilterStage, GreedyFilter, Matching, NonNegativeLeastSquares, TopKFilter, WeightStage
from ftw_optim.testing import matching_with_targets

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
        likeness: of each row of the pool to the target rows, beyond that to the pool, without a model.
        plain_likeness: the same without regard to the pool.
        own: whether a row is of the target's own source; all False where none is named.
        tokens: shape ``(N,)`` float64, the number of response tokens of each row.
        damaged: whether a row is; no way is told.
    """

    gram: Tensor
    held_out: Tensor
    energy: float
    pool: Sequence[int]
    target: Sequence[int]
    likeness: Tensor
    plain_likeness: Tensor
    own: Sequence[bool]
    tokens: Tensor
    damaged: Sequence[bool]

    def agreement(self, weights: Tensor) -> float:
        """The cosine of the combined gradient with that of the held-out rows; 0 for no gradient."""
        length = float(weights @ self.gram @ weights) * self.energy
        return float(weights @ self.held_out) / length**0.5 if length > 0.0 else 0.0


class Agreement(NamedTuple):
    """What a way comes to over some steps: its mean agreement, the standard error, the damaged rows' mean weight."""

    value: float
    error: float
    damaged: float


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


Candidates = Callable[[Rows, Drawn, Sizes], Sequence[int]]
"""The candidates of a step."""
Treatment = Callable[[Rows, Sequence[int], Sequence[int], int], Tensor]
"""The weights of all rows, from candidates, target rows, and the number of candidates to keep."""


@dataclass(frozen=True)
class Way:
    """One way to make a step.

    Attributes:
        label: in the table.
        candidates: rows of the pool that it runs; None: none.
        treatment: what it makes of them.
        trains_on_target: whether target rows are part of the step.
    """

    label: str
    candidates: Candidates | None
    treatment: Treatment
    trains_on_target: bool = False

    @property
    def oracle(self) -> bool:
        """Whether it is told the target's own source."""
        return self.candidates is of_own_source

    def rows(self, sizes: Sizes) -> int:
        """How many rows a step runs, those of a target that only guides among them."""
        asks_target = self.trains_on_target or self.treatment not in (unweighed, by_token)
        return sizes.candidates * (self.candidates is not None) + sizes.target_rows * asks_target

    def weights(self, rows: Rows, drawn: Drawn, sizes: Sizes) -> Tensor:
        """The weights of all rows in one step."""
        chosen = [] if self.candidates is None else self.candidates(rows, drawn, sizes)
        return self.treatment(rows, chosen, drawn.target, sizes.keep)


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


def agreement_of(way: Way, rows: Rows, drawn: Sequence[Drawn], sizes: Sizes) -> Agreement:
    """The mean agreement over some steps, its standard error, and the damaged rows' mean share of the weight."""
    weights = [way.weights(rows, one, sizes) for one in drawn]
    found = [rows.agreement(some) for some in weights]
    damaged = torch.tensor(rows.damaged)
    shares = [float(some[damaged].sum() / some.sum()) if bool(some.any()) else 0.0 for some in weights]
    return Agreement(mean(found), stdev(found) / len(found) ** 0.5, mean(shares))


def uniform(rows: Rows, chosen: Sequence[int]) -> Tensor:
    """The same weight on each of some rows."""
    weights = torch.zeros(len(rows.gram), dtype=torch.float64)
    weights[list(chosen)] = 1 / max(1, len(chosen))
    return weights


def alike(likeness: Tensor, drawn: Drawn, count: int) -> list[int]:
    """Those of the records read that are most like the target rows."""
    order = likeness[drawn.read].argsort(descending=True, stable=True)
    return [drawn.read[place] for place in order[:count].tolist()]


def selected(
    rows: Rows, candidates: Sequence[int], target: Sequence[int], filter: FilterStage, weight: WeightStage | None
) -> Tensor:
    """Candidates that a filter keeps to match the mean gradient of some target rows, weighed or alike."""
    guide, some = list(target), list(candidates)
    matching = Matching(
        gram=rows.gram[some][:, some],
        cross_gram=asked(rows, candidates, target),
        target_energy=float(rows.gram[guide][:, guide].mean()),
        losses=torch.zeros(len(some)),
        generator=torch.Generator().manual_seed(0),
    )
    kept = filter(matching)
    chosen = [candidates[place] for place in kept.tolist()]
    if weight is None or not chosen:
        return uniform(rows, chosen)
    return _spread(rows, chosen, weight(matching.restrict(kept)).weights)


def together(rows: Rows, candidates: Sequence[int], target: Sequence[int], weight: WeightStage) -> Tensor:
    """Candidates and target rows, each target row weighed by what the others ask for."""
    taking_part = [*candidates, *target]
    fitted = weight(matching_with_targets(rows.gram[taking_part][:, taking_part], len(target))).weights
    return _spread(rows, taking_part, fitted) if bool(fitted.any()) else uniform(rows, target)


def accepted(rows: Rows, candidates: Sequence[int], target: Sequence[int], keep: int = 0) -> Tensor:
    """The target rows, and candidates whose product with them is not below zero, all alike."""
    products = asked(rows, candidates, target).tolist()
    return uniform(rows, [*target, *(row for row, product in zip(candidates, products, strict=True) if product > 0.0)])


def asked(rows: Rows, candidates: Sequence[int], target: Sequence[int]) -> Tensor:
    """The candidates' mean products with the target rows."""
    return rows.gram[list(candidates)][:, list(target)].mean(dim=1)


def _spread(rows: Rows, chosen: Sequence[int], weights: Tensor) -> Tensor:
    found = torch.zeros(len(rows.gram), dtype=torch.float64)
    found[list(chosen)] = weights.double()
    return found


FIT = NonNegativeLeastSquares()
ANCHORED = NonNegativeLeastSquares(anchor=ANCHOR, anchor_to="positive")


def first_read(rows: Rows, drawn: Drawn, sizes: Sizes) -> Sequence[int]:
    """The records as they come."""
    return drawn.read[: sizes.candidates]


def most_alike(rows: Rows, drawn: Drawn, sizes: Sizes) -> Sequence[int]:
    """Those of the records read that are most like the target rows, beyond their likeness to the pool.

    As it is proposed while no more than 16 times as many are read.
    """
    return alike(rows.likeness, drawn, sizes.candidates)


def most_plainly_alike(rows: Rows, drawn: Drawn, sizes: Sizes) -> Sequence[int]:
    """The same as it is proposed with ``contrast=False``."""
    return alike(rows.plain_likeness, drawn, sizes.candidates)


def of_own_source(rows: Rows, drawn: Drawn, sizes: Sizes) -> Sequence[int]:
    """Records of the target's own source."""
    return drawn.own


def unweighed(rows: Rows, candidates: Sequence[int], target: Sequence[int], keep: int) -> Tensor:
    """All candidates alike; the target is not asked."""
    return uniform(rows, candidates)


def by_token(rows: Rows, candidates: Sequence[int], target: Sequence[int], keep: int) -> Tensor:
    """All candidates by the lengths of their responses, as in a mean over tokens; the target is not asked."""
    tokens = rows.tokens[list(candidates)]
    return _spread(rows, candidates, tokens / tokens.sum())


def top_k(rows: Rows, candidates: Sequence[int], target: Sequence[int], keep: int) -> Tensor:
    """Those with the largest products with the target rows, alike."""
    return selected(rows, candidates, target, TopKFilter(keep=keep), None)


def filtered_and_weighed(rows: Rows, candidates: Sequence[int], target: Sequence[int], keep: int) -> Tensor:
    """The published method."""
    return selected(rows, candidates, target, GreedyFilter(keep=keep), FIT)


def beside_target(rows: Rows, candidates: Sequence[int], target: Sequence[int], keep: int) -> Tensor:
    """Target rows and candidates, all alike."""
    return uniform(rows, [*target, *candidates])


def weighed_by_each_other(rows: Rows, candidates: Sequence[int], target: Sequence[int], keep: int) -> Tensor:
    """Target rows and candidates by what the other target rows ask for, anchored."""
    return together(rows, candidates, target, ANCHORED)


WAYS = [
    Way("n of the pool", first_read, unweighed),
    Way("n of the pool, by token", first_read, by_token),
    Way("n most alike", most_alike, unweighed),
    Way("n most alike, by token", most_alike, by_token),
    Way("n plainly alike", most_plainly_alike, unweighed),
    Way("n plainly alike, by token", most_plainly_alike, by_token),
    Way("top k of n", first_read, top_k),
    Way("filter-then-weight, k of n", first_read, filtered_and_weighed),
    Way("the same, of the n most alike", most_alike, filtered_and_weighed),
    Way("n of the own source", of_own_source, unweighed),
    Way("m target rows", None, beside_target, trains_on_target=True),
    Way("m and n of the pool, uniform", first_read, beside_target, trains_on_target=True),
    Way("m and n of the pool, weighed", first_read, weighed_by_each_other, trains_on_target=True),
    Way("m and n most alike, uniform", most_alike, beside_target, trains_on_target=True),
    Way("m and n most alike, weighed", most_alike, weighed_by_each_other, trains_on_target=True),
    Way("m and n most alike, accepted", most_alike, accepted, trains_on_target=True),
    Way("m and n of the own source", of_own_source, beside_target, trains_on_target=True),
]
