"""Parameters of which each process holds a part: how the rank that measures one gets all of it, and who holds what.

A rank owns whole parameters here too, and so is sent the other ranks' parts of these and of the optimizer's state:
as many bytes as it holds itself, however many ranks there are. With them every preconditioner is what one process has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._capture.stand_ins import is_sharded
from ftw_optim._ranks.ranks import Ranks

State = Mapping[str, Any]


def layout_of(name: str, tensor: Any, members: Sequence[int]) -> Layout:
    """The layout of a DTensor, which must be copied to, or divided along its first axis among, all of ``members``.

    Raises:
        NotImplementedError: it is something else; ``name`` says whose it is.
    """
    found = _layout(tensor.device_mesh, tuple(tensor.placements), tuple(members))
    if isinstance(found, str):
        raise NotImplementedError(f"Expected {name} {found}.")
    return found


@lru_cache(maxsize=64)
def _layout(mesh: Any, placements: Sequence[Any], members: Sequence[int]) -> Layout | str:
    """The layout, or what was expected and what came."""
    devices = sorted(mesh.mesh.flatten().tolist())
    if devices != sorted(members):
        return f"on a mesh of the processes {list(members)} of the selection, got one of {devices}"
    divided = [axis for axis, one in enumerate(placements) if not one.is_replicate()]
    if len(divided) > 1 or not all(placements[axis].is_shard(0) for axis in divided):
        return f"divided along its first axis or copied, as fully_shard does, got {placements}"
    along = divided[0] if divided else None
    places = [(mesh.mesh == rank).nonzero()[0].tolist() for rank in members]
    return Layout(
        parts=[0 if along is None else place[along] for place in places],
        copies=[any(at for axis, at in enumerate(place) if axis != along) for place in places],
        count=1 if along is None else mesh.mesh.shape[along],
    )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Which rows of tensors each rank holds that are laid out like one of them.

    Attributes:
        parts: for each rank the number of its part along the first axis.
        copies: for each rank whether another, before it, holds the same part.
        count: the number of parts.
    """

    parts: Sequence[int]
    copies: Sequence[bool]
    count: int

    def rows(self, shape: torch.Size, rank: int) -> slice:
        """The rows of a whole tensor of this shape that a rank holds."""
        if self.count == 1:
            return slice(0, shape[0])
        size = -(-shape[0] // self.count)
        start = min(self.parts[rank] * size, shape[0])
        return slice(start, min(start + size, shape[0]))

    def size(self, shape: torch.Size, rank: int) -> int:
        """The number of entries that a rank holds of a tensor of this shape."""
        if self.count == 1:
            return shape.numel()
        rows = self.rows(shape, rank)
        return int(rows.stop - rows.start) * math.prod(shape[1:])


@final
class WholeParameters:
    """An optimizer's parameters as the rank that owns them measures them: whole, with the whole state.

    Args:
        inner: the optimizer, which holds shards.
        parameters: its parameters, by name.
        ranks: the ranks.
        owner: the rank that owns each parameter, within its group.
        device: where the parts are sent from.
        among: the number of neighbouring ranks in a group, of which each has owners of its own.
    """

    def __init__(
        self,
        inner: Optimizer,
        parameters: Mapping[str, Tensor],
        ranks: Ranks,
        owner: Mapping[str, int],
        device: torch.device,
        *,
        among: int,
    ) -> None:
        self._inner, self._parameters, self._ranks, self._owner = inner, parameters, ranks, owner
        self._device, self._among = device, among
        self.found: dict[str, Tensor] = {}
        """The parameters that have been brought together and not let go; of plain ones all."""
        self.optimizer = inner
        """The optimizer as it would be with these."""
        self.any_sharded = any(map(is_sharded, parameters.values()))
        if self.any_sharded:
            # No copy of an optimizer may run its __init__ or forget what it has beside groups and state.
            self.optimizer = object.__new__(type(inner))
            self.optimizer.__dict__.update(inner.__dict__)
            self.optimizer.state = defaultdict(dict)
            self.optimizer.param_groups = [{**group, "params": []} for group in inner.param_groups]
            self._groups = {
                id(parameter): number
                for number, group in enumerate(inner.param_groups)
                for parameter in group["params"]
            }
        else:
            self.found.update(parameters)

    def bring(self, names: Sequence[str]) -> None:
        """Bring the named parameters and their states to the ranks that own them; called by all of them."""
        if not self.any_sharded:
            return
        ranks = self._ranks
        of = [[name for name in names if self._owner[name] == rank % self._among] for rank in range(ranks.count)]
        sent = [self._bytes([held for name in some for held in self._divided(name)]) for some in of]
        own = of[ranks.own]
        layouts = {name: self._divided(name) for name in own}
        sizes = [
            sum(
                one.itemsize * layout.size(one.shape, rank)
                for some in layouts.values()
                for one, layout in some
                if not layout.copies[rank]
            )
            for rank in range(ranks.count)
        ]
        received = ranks.exchanged(torch.cat(sent), [len(part) for part in sent], sizes)
        rest = list(torch.split(received, sizes))
        for name in own:
            whole = []
            for one, layout in layouts[name]:
                pieces: dict[int, Tensor] = {}
                for rank, part in enumerate(layout.parts):
                    if not layout.copies[rank]:
                        length = one.itemsize * layout.size(one.shape, rank)
                        pieces[part], rest[rank] = rest[rank][:length], rest[rank][length:]
                joined = torch.cat([pieces[part] for part in sorted(pieces)])  # a copy, so aligned for its dtype
                whole.append(joined.view(one.dtype).view(one.shape))
            self._hold(name, iter(whole))

    def let_go(self, names: Sequence[str]) -> None:
        """Forget the whole of these parameters."""
        if self.any_sharded:
            for name in names:
                parameter = self.found.pop(name, None)
                if parameter is not None:
                    self.optimizer.state.pop(parameter, None)
                    group = self.optimizer.param_groups[self._groups[id(self._parameters[name])]]
                    group["params"] = [one for one in group["params"] if one is not parameter]

    def _state(self, name: str) -> State:
        state: State = self._inner.state.get(self._parameters[name], {})
        return state

    def _divided(self, name: str) -> list[tuple[Any, Layout]]:
        """The parameter and the DTensors of its state with their layouts, in an order that is the same on all ranks."""
        held = [self._parameters[name], *self._state(name).values()]
        return [
            (one, layout_of(f"{name} and its state", one, self._ranks.members))
            for one in held
            if isinstance(one, Tensor) and is_sharded(one)
        ]

    def _bytes(self, tensors: Sequence[tuple[Any, Layout]]) -> Tensor:
        """The parts that this rank sends of these, one behind the other."""
        parts = [one.to_local() for one, layout in tensors if not layout.copies[self._ranks.own]]
        flat = [part.detach().contiguous().view(-1).view(torch.uint8) for part in parts if part.numel()]
        return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=self._device)

    def _hold(self, name: str, whole: Iterator[Tensor]) -> None:
        parameter = self._parameters[name]
        found = next(whole) if is_sharded(parameter) else parameter
        state = {
            key: next(whole) if isinstance(value, Tensor) and is_sharded(value) else value
            for key, value in self._state(name).items()
        }
        self.found[name] = found
        self.optimizer.param_groups[self._groups[id(parameter)]]["params"].append(found)
        if state:
            self.optimizer.state[found] = state
