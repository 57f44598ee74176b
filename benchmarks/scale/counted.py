"""The bytes that a rank sends in one step, counted on a step that runs as the first of many ranks."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftw_optim import GreedyFilter, SelectiveOptimizer
from ftw_optim._ranks.owners import owners
from ftw_optim._ranks.ranks import END, Ranks

_TOKENS = 9


class Pretended(Ranks):
    """The first of some ranks, whose others have the same candidates as it and send what it sends.

    Attributes:
        sent: bytes that this rank sends, by what they are: ``objects``, ``exchange`` and ``sums``. A sum over the ranks
            in a ring sends each number twice but for the own share.
    """

    def __init__(self, count: int) -> None:
        self.own, self.count, self.met = 0, count, True
        self.members = range(count)
        self.sent = {"objects": 0, "exchange": 0, "sums": 0}

    def told(self, work: Callable[[], Any], tell: Callable[[Any], Any], *, at: str = END) -> tuple[Any, list[Any]]:
        found = work()
        message = tell(found)
        self.sent["objects"] += len(pickle.dumps((message, None, at))) * (self.count - 1)
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
        own = values[: sent[0]]
        return torch.cat([own.repeat(-(-size // max(1, len(own))))[:size] for size in received])


@dataclass(frozen=True, kw_only=True)
class Count:
    """The bytes of a step, and what the formulas say of them.

    Attributes:
        ranks: number of ranks.
        sent: counted, see :class:`Pretended`.
        expected: by the formulas: ``b n_r (P_s - own)`` exchanged, with ``b`` bytes a number, ``n_r`` candidates of a
            rank, ``P_s`` scored numbers (of an embedding the touched rows and their indices alone) and those that the
            rank owns; and ``2 b f (P_s + M (n^2 + n + 1) + P_u)`` summed, with ``f = 1 - 1 / ranks``, for the target's
            gradient, ``M`` matrices and the combined gradient. Of a sharded model the combined gradient is exchanged,
            not summed: ``b (P_u - held)``, with the numbers that a rank holds; and so are the parts of parameters and
            state that go to owners: ``b (1 + states) (held - own)``.
    """

    ranks: int
    sent: dict[str, int]
    expected: dict[str, int] = field(default_factory=dict)


def counted(ranks: int, *, shards: bool = False, candidates: int = 2, width: int = 16, layers: int = 4) -> Count:
    """Count one step of a small model.

    Args:
        ranks: number of ranks.
        shards: whether ``fully_shard`` divides the model among them, by collectives that send nothing.
        candidates: of each rank.
        width: of the model's layers.
        layers: their number.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, width), *(nn.Linear(width, width) for _ in range(layers)), nn.Linear(width, 96)
    )
    whole = {name: p.shape for name, p in model.named_parameters()}
    with _sharded(model, ranks) if shards else nullcontext():
        sent = _sent(model, ranks, candidates)
        held = {name: p.to_local().numel() if shards else p.numel() for name, p in model.named_parameters()}
    sizes = {name: shape.numel() for name, shape in whole.items()}
    mine = {name for name, owner in owners(sizes, ranks).items() if owner == 0}
    total, n = sum(sizes.values()), ranks * candidates
    places = _TOKENS - 1  # rows of the embedding that a candidate touches, each with an index of eight bytes
    travel = {**sizes, "0.weight": places * (width + 2)}
    exchanged = candidates * sum(travel[name] for name in sizes.keys() - mine)
    summed = [total, n * n + n + 1]
    if shards:
        states = 2  # of AdamW
        exchanged += (1 + states) * sum(held[name] for name in sizes.keys() - mine)
        exchanged += sum(sizes[name] - held[name] for name in sizes)
    else:
        summed.append(total)
    expected = {"exchange": 4 * exchanged, "sums": sum(2 * 4 * part * (ranks - 1) // ranks for part in summed)}
    return Count(ranks=ranks, sent=sent, expected=expected)


@contextmanager
def _sharded(model: nn.Sequential, ranks: int) -> Iterator[None]:
    """A block in which the model is sharded over so many ranks, of which this process is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with warnings.catch_warnings():  # that a layer returns a view of its output, which nobody changes in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            yield
    finally:
        dist.destroy_process_group()


def _sent(model: nn.Module, ranks: int, candidates: int) -> dict[str, int]:
    """What the second of two steps sends: at the first there is no state."""
    tokens = torch.randint(0, 64, (candidates, _TOKENS))

    def losses(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(rows[:, :-1]).mT, rows[:, 1:], reduction="none").mean(1)

    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = SelectiveOptimizer(inner, model, lambda: losses(tokens), filter=GreedyFilter(keep=2), self_check=False)
    pretended = Pretended(ranks)
    optimizer._ranks.now = lambda **_: pretended  # type: ignore[method-assign]
    for _ in range(2):
        pretended.sent = dict.fromkeys(pretended.sent, 0)
        optimizer.step(lambda: losses(tokens))
    return pretended.sent
