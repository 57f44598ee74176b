"""Runs of a small model, in one process or in several, whose steps are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ftw_optim import (
    FilterStage,
    GreedyFilter,
    NonNegativeLeastSquares,
    SelectiveOptimizer,
    Sketch,
    TargetGradient,
    WeightStage,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, weight_decay=1e-2),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Attributes:
        counts: number of candidates of each rank at each step; a negative number: that many, of which all are NaN.
        later: the same of the steps after the first; None: no others.
        targets: number of target rows of each rank.
        wrap: settings of DDP; None: no wrapper.
        shard: settings of ``fully_shard``, for every layer and the whole; None: no shards.
        mesh: shape of its mesh: one axis along which parameters are divided, perhaps behind one along which copied.
        outside: whether the optimizer is given the module inside the wrapper.
        pieces: micro-batches of a step.
        accumulated: calls of ``backward`` for one step.
        scale: of the losses.
        scored: substring of the names of scored parameters.
        sketch: numbers of a sketch; None: none.
        among: ranks of one selection; None: all.
    """

    counts: Sequence[int] = (4, 4)
    later: Sequence[int] | None = None
    targets: Sequence[int] = (3, 3)
    wrap: dict[str, Any] | None = None
    shard: dict[str, Any] | None = None
    mesh: Sequence[int] = (2,)
    outside: bool = False
    optimizer: str = "AdamW"
    combine: str = "factors"
    metric: str = "preconditioned"
    filter: FilterStage = field(default_factory=lambda: GreedyFilter(keep=0.5))
    weight: WeightStage = field(default_factory=NonNegativeLeastSquares)
    train_on_target: bool = False
    target: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    pieces: int = 1
    accumulated: int = 1
    scale: float = 1.0
    scored: str = ""
    sketch: int | None = None
    among: int | None = None
    steps: int = 3
    seed: int = 0

    def counts_at(self, number: int) -> Sequence[int]:
        """The counts of a call of ``backward``."""
        return self.counts if self.later is None or number < self.accumulated else self.later

    @property
    def scored_predicate(self) -> Callable[[str, Any], bool] | None:
        """Which parameters are scored; None: all."""
        return (lambda name, parameter: self.scored in name) if self.scored else None


class Net(nn.Module):
    """Layers of different sizes, of which one is reached by some rows alone, and one by none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 7)
        self.first = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.rare = nn.Linear(11, 11)
        self.unused = nn.Linear(3, 5)
        self.last = nn.Linear(11, 23)

    def forward(self, tokens: Tensor, *, rare: bool = False) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(self.embedding(tokens))))
        return self.last(hidden + self.rare(hidden) if rare else hidden)


def rows_of(model: nn.Module, tokens: Tensor, *, rare: bool = False) -> Tensor:
    """One loss for each row."""
    scores = model(tokens[:, :-1], rare=rare)
    losses = functional.cross_entropy(scores.mT, tokens[:, 1:], reduction="none").mean(1)
    return losses * torch.where(tokens[:, 0] == 22, torch.nan, 1.0)  # a token that spoils its row


def data(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates and target rows of every backward, of all ranks."""
    generator = torch.Generator().manual_seed(case.seed)
    for number in range(case.steps * case.accumulated):
        counts = case.counts_at(number)
        candidates = torch.randint(0, 22, (sum(map(abs, counts)), 6), generator=generator)
        targets = torch.randint(0, 9, (sum(case.targets), 6), generator=generator)
        start = 0
        for count in counts:
            if count < 0:
                candidates[start : start - count, 0] = 22
            start += abs(count)
        yield candidates, targets


def run(case: Case, *, alone: bool = False) -> dict[str, Any]:
    """What came of a run: the selections, the gradients and the parameters; for a job, too."""
    own = 0 if alone else dist.get_rank()
    torch.manual_seed(3)
    net = Net().to(case.dtype)
    parameters = list(net.parameters())
    model: nn.Module = net
    if case.wrap is not None and not alone:
        model = DistributedDataParallel(net, **case.wrap)
    if case.shard is not None and not alone:
        sharded(net, case.mesh, **case.shard)
        parameters = list(net.parameters())
    batch: dict[str, Tensor] = {}
    optimizer = SelectiveOptimizer(
        OPTIMIZERS[case.optimizer](parameters),
        net if case.outside else model,
        TargetGradient(lambda: rows_of(model, batch["targets"], rare=True), **case.target),
        filter=case.filter,
        weight=case.weight,
        metric=case.metric,
        combine=case.combine,
        train_on_target=case.train_on_target,
        scored=case.scored_predicate,
        gram="exact" if case.sketch is None else Sketch(dim=case.sketch),
        among=None if alone else case.among,
    )
    found: dict[str, Any] = {"selections": [], "gradients": [], "mine": []}
    for number, (candidates, targets) in enumerate(data(case)):
        if not alone:
            candidates = candidates.split([abs(count) for count in case.counts_at(number)])[own]
            targets = targets.split(list(case.targets))[own]
        batch["targets"] = targets

        def losses(rows: Tensor | None = None, candidates: Tensor = candidates) -> Any:
            some = candidates if rows is None else candidates[rows]
            # The layer is reached by the candidates of the first rank alone, one after the other.
            rare = own == 0 and not alone and case.wrap is not None and bool(case.wrap.get("find_unused_parameters"))
            if not len(some) and rows is None:
                return torch.empty(0)
            if case.pieces == 1:
                return rows_of(model, some, rare=rare)
            return (rows_of(model, part, rare=rare) for part in some.tensor_split(case.pieces) if len(part))

        optimizer.backward(losses, grad_scale=case.scale)
        selection = optimizer.selection
        assert selection is not None
        found["selections"].append(selection)
        found["mine"].append(selection.mine)
        if (number + 1) % case.accumulated == 0:
            found["gradients"].append(
                {name: whole(p.grad).clone() for name, p in net.named_parameters() if p.grad is not None}
            )
            for p in parameters:
                if p.grad is not None:
                    p.grad.div_(case.scale)
            optimizer.step()
            optimizer.zero_grad()
    found["parameters"] = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
    return found


@cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """The processes of the run in this shape; made once, as each has threads that never rest."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])


def sharded(net: nn.Module, mesh: Sequence[int], **settings: Any) -> None:
    """Shard every layer that has parameters, and what is left, over the processes of the run."""
    devices = mesh_of(tuple(mesh))
    for layer in net.children():
        fully_shard(layer, mesh=devices, **settings)
    fully_shard(net, mesh=devices, **settings)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


CANDIDATES = torch.arange(4 * 4 * 6).reshape(4, 4, 6) % 22
"""Those of each of four ranks."""
TARGETS = torch.arange(3 * 6).reshape(3, 6) % 9


def made(
    *, net: nn.Module | None = None, group: Any = None, lr: float = 1e-2, shards: bool = False, **options: Any
) -> tuple[nn.Module, SelectiveOptimizer, Callable[..., Tensor]]:
    """A model on this rank, in DDP or in shards, its optimizer, and the closure of the rank's candidates."""
    torch.manual_seed(3)
    model: nn.Module = (Net() if net is None else net).double()
    if shards:
        sharded(model, (dist.get_world_size(),))
    else:
        model = DistributedDataParallel(model, process_group=group)
    candidates = CANDIDATES[dist.get_rank()]

    def losses(rows: Tensor | None = None) -> Tensor:
        return rows_of(model, candidates if rows is None else candidates[rows], rare=True)

    options = {"target": lambda: rows_of(model, TARGETS, rare=True), "filter": GreedyFilter(keep=3), **options}
    return model, SelectiveOptimizer(torch.optim.AdamW(model.parameters(), lr=lr), model, **options), losses
