"""The bytes that a rank sends in one step, counted on a step that runs as the first of many ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import GreedyFilter, SelectiveOptimizer
from ftw_optim._ranks.owners import owners
from ftw_optim._ranks.ranks import Ranks


class Pretended(Ranks):
    """The first of some ranks, whose others have the same candidates as it and send what it sends.

    Attributes:
        sent: bytes that this rank sends, by what they are: ``objects``, ``exchange`` and ``sums``. A sum over the ranks
            in a ring sends each number twice but for the own share.
    """

    def __init__(self, count: int) -> None:
        self.own, self.count, self.met = 0, count, True
        self.sent = {"objects": 0, "exchange": 0, "sums": 0}

    def told(self, work: Callable[[], Any], tell: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
        found = work()
        message = tell(found)
        self.sent["objects"] += len(pickle.dumps((message, None))) * (self.count - 1)
        return found, [message] * self.count

    def as_first_says(self, work: Callable[[], Any]) -> Any:
        found = work()
        self.sent["objects"] += len(pickle.dumps((found, None)))  # along a tree, once or twice from each rank
        return found

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        total = sum(tensor.nbytes for tensor in tensors)
        self.sent["sums"] += 2 * total * (self.count - 1) // self.count
        return [tensor.clone() for tensor in tensors]

    def exchanged(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        self.sent["exchange"] += (sum(sent) - sent[0]) * values.element_size()
        return values[: sent[0]].repeat(self.count)


@dataclass(frozen=True, kw_only=True)
class Count:
    """The bytes of a step, and what the formulas say of them.

    Attributes:
        ranks: number of ranks.
        sent: counted, see :class:`Pretended`.
        expected: by the formulas: ``b n_r (P_s - own)`` exchanged, with ``b`` bytes a number, ``n_r`` candidates of a
            rank, ``P_s`` scored numbers and those that the rank owns; and ``2 b f (P_s + M (n^2 + n + 1) + P_u)``
            summed, with ``f = 1 - 1 / ranks``, for the target's gradient, ``M`` matrices and the combined gradient.
    """

    ranks: int
    sent: dict[str, int]
    expected: dict[str, int] = field(default_factory=dict)


def counted(ranks: int, *, candidates: int = 2, width: int = 16, layers: int = 4) -> Count:
    """Count one step of a small model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, width), *(nn.Linear(width, width) for _ in range(layers)), nn.Linear(width, 64)
    )
    tokens = torch.randint(0, 64, (candidates, 9))

    def losses(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(rows[:, :-1]).mT, rows[:, 1:], reduction="none").mean(1)

    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = SelectiveOptimizer(inner, model, lambda: losses(tokens), filter=GreedyFilter(keep=2), self_check=False)
    pretended = Pretended(ranks)
    optimizer._ranks.now = lambda **_: pretended  # type: ignore[method-assign]
    optimizer.step(lambda: losses(tokens))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    own = sum(sizes[name] for name, owner in owners(sizes, ranks).items() if owner == 0)
    total, n = sum(sizes.values()), ranks * candidates
    expected = {
        "exchange": 4 * candidates * (total - own),
        "sums": sum(2 * 4 * part * (ranks - 1) // ranks for part in (total, n * n + n + 1, total)),
    }
    return Count(ranks=ranks, sent=pretended.sent, expected=expected)
