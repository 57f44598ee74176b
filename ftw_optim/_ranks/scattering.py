"""Gradients that every rank forms whole, a few at a time, and of which each keeps the sum of the part that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._capture.stand_ins import is_sharded
from ftw_optim._ranks.ranks import BUCKET, Ranks
from ftw_optim._ranks.shards import layout_of


@final
class Scattered:
    """The sums over all ranks of gradients of sharded parameters; no more of them than a bucket exist whole.

    All ranks add gradients of the same parameters in the same order, as FSDP2 counts on, too.

    Args:
        ranks: the ranks.
        parameters: the parameters, by name; plain ones are not taken.
    """

    def __init__(self, ranks: Ranks, parameters: Mapping[str, Tensor]) -> None:
        self._ranks = ranks
        self._parameters: dict[str, Any] = {name: one for name, one in parameters.items() if is_sharded(one)}
        self._waiting: list[tuple[str, Tensor]] = []
        self._bytes = 0
        self.parts: dict[str, Tensor] = {}
        """The part of this rank of each sum."""

    def takes(self, name: str) -> bool:
        """Whether a parameter is sharded."""
        return name in self._parameters

    def add(self, name: str, whole: Tensor) -> None:
        """Add this rank's gradient of one parameter, which may be sent to the others at once."""
        whole = whole.detach().to(self._parameters[name].dtype)  # that of a stand-in may be shorter
        self._waiting.append((name, whole))
        self._bytes += whole.nbytes
        if self._bytes >= BUCKET:
            self._send(last=False)

    def finish(self) -> dict[str, Tensor]:
        """The sums, as the parameters are held, once all ranks have added theirs."""
        while not self._send(last=True):
            pass
        found: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            like = self._parameters[name]
            found[name] = type(like).from_local(
                part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return found

    def _send(self, *, last: bool) -> bool:
        """Exchange what waits; whether no rank has more to come.

        Raises:
            RuntimeError: the ranks have formed the gradients of different parameters.
        """
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        names = [name for name, _ in waiting]
        _, told = self._ranks.told(lambda: (names, last), lambda found: found)
        for rank, (others, _) in enumerate(told):
            if others != names:
                one = next(iter({*others} ^ {*names}), names[0] if names else "")
                raise RuntimeError(
                    f"Expected the backward passes of all ranks to reach the parameters of a sharded model in the same "
                    f"order, but those of rank {self._ranks.own} and rank {rank} differ at {one!r}. A layer that only "
                    "some ranks run has no place in such a model."
                )
        for dtype in dict.fromkeys(whole.dtype for _, whole in waiting):
            self._exchange([(name, whole) for name, whole in waiting if whole.dtype == dtype])
        return all(is_last for _, is_last in told)

    def _exchange(self, some: list[tuple[str, Tensor]]) -> None:
        ranks = self._ranks
        layouts = [(name, whole, layout_of(name, self._parameters[name], ranks.members)) for name, whole in some]
        sent = [
            torch.cat([whole[layout.rows(whole.shape, rank)].flatten() for _, whole, layout in layouts])
            for rank in range(ranks.count)
        ]
        own = len(sent[ranks.own])
        received = ranks.exchanged(torch.cat(sent), [len(part) for part in sent], [own] * ranks.count)
        summed = received.view(ranks.count, own).sum(0)
        for name, whole, layout in layouts:
            size = layout.size(whole.shape, ranks.own)
            part, summed = summed[:size].view(-1, *whole.shape[1:]), summed[size:]
            self.parts[name] = self.parts[name] + part if name in self.parts else part.clone()
