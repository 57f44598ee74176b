"""What must be the same on all ranks of a selection, so that a difference is an error before it is a wrong step."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftw_optim._capture.stand_ins import is_sharded
from ftw_optim._ranks.ranks import Ranks
from ftw_optim._ranks.shards import layout_of
from ftw_optim._step.setup import StepSetup

Digest = Mapping[str, str]
"""What is compared, each under the name that an error gives it."""

LOOK_EVERY = 100
"""Selections from one comparison of all parameters and states to the next."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**20
"""Entries of which a checksum is formed at a time."""
_PLAIN = (bool, int, float, str, type(None))


def digest_of(setup: StepSetup) -> Digest:
    """What must be the same on all ranks at this step."""
    parameters = setup.parameters
    groups = {id(group): group for group in parameters.groups.values()}
    found = {
        "parameters": _hashed([(name, p.shape, p.dtype) for name, p in parameters.updated.items()]),
        "scored parameters": _hashed(list(parameters.scored)),
        "inner optimizer": torch.typename(type(setup.inner)),
        "settings of the inner optimizer": str(
            [{k: _simple(v) for k, v in group.items() if k != "params"} for group in groups.values()]
        ),
        "filter": _described(setup.filter),
        "weight": _described(setup.weight),
        "among": str(setup.among),
        "metric": setup.metric.value,
        "gram": "exact" if setup.sketch is None else str(setup.sketch),
        "combine": setup.way.name,
        "target": str(
            (
                setup.target.refresh_every,
                setup.target.decay,
                setup.target.until,
                setup.target.held_out is not None,
                setup.target.held_out_every,
            )
        ),
        "train_on_target": "closure" if callable(setup.trains_on_target) else str(setup.trains_on_target),
        "seed and number of selections": str((setup.seed_of("digest"), setup.backwards)),
        "grad_scale": str(setup.scale),
        "self_check": str(setup.checks is not None),
        "kept target gradient": str(setup.kept_target is not None),
    }
    if _looks(setup):
        found["values of the parameters"] = str(_checksums(parameters.updated.values()))
        if not setup.ranks.met:
            found["values of what is not trained"] = str(_checksums(_frozen(setup).values()))
        states = [setup.inner.state.get(p, {}) for p in parameters.updated.values()]
        numbers = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        found["state of the inner optimizer"] = str(_checksums(numbers))
    return found


def _looks(setup: StepSetup) -> bool:
    """Whether the values of parameters and states are compared at this step."""
    return not setup.ranks.met or setup.backwards % LOOK_EVERY == 0


Parts = Mapping[tuple[str, int], Sequence[int]]
"""Checksums of the parts of parameters and of their states, by the parameter and the first of its rows there."""


def parts_of(setup: StepSetup) -> Parts:
    """The parts of sharded parameters that this rank holds, of which others may hold copies; none between two looks."""
    if not _looks(setup):
        return {}
    found = {}
    more = {} if setup.ranks.met else _frozen(setup)
    for name, parameter in {**setup.parameters.updated, **more}.items():
        if is_sharded(parameter):
            held = [parameter, *setup.inner.state.get(parameter, {}).values()]
            local: list[Any] = [one for one in held if isinstance(one, Tensor) and is_sharded(one)]
            layout = layout_of(name, parameter, setup.ranks.members)
            start = layout.rows(parameter.shape, setup.ranks.own).start
            found[name, start] = _checksums(one.to_local() for one in local)
    return found


def refuse_different_copies(told: Sequence[Parts]) -> None:
    """Refuse to go on where ranks hold different values of one part, as copies in HSDP that began apart.

    Raises:
        ValueError: some do.
    """
    first: dict[tuple[str, int], tuple[int, Sequence[int]]] = {}
    for rank, parts in enumerate(told):
        for place, sums in parts.items():
            other, expected = first.setdefault(place, (rank, sums))
            if sums != expected:
                raise ValueError(
                    f"Expected equal copies of {place[0]} and its state, but the part from row {place[1]} on differs "
                    f"on ranks {other} and {rank}. fully_shard sends no values along the first axis of its mesh: make "
                    "the model from one seed or checkpoint on all ranks before it is sharded."
                )


def _frozen(setup: StepSetup) -> Mapping[str, Tensor]:
    """The parameters that are not updated, and so stay what they were when the ranks met."""
    return {name: one for name, one in setup.structure.parameters.items() if name not in setup.parameters.updated}


def _checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A number for each tensor, exact whatever number of threads adds it up.

    It is the sum of its entries' bits, read as integers, each times a number that depends on its place.
    """
    sums = []
    places: dict[torch.device, Tensor] = {}
    for tensor in tensors:
        plain = tensor.detach()
        if type(tensor) not in (Tensor, torch.nn.Parameter) or plain.itemsize not in _INTEGERS or plain.is_complex():
            continue  # of low-bit and other subclasses nothing is known
        bits = plain.contiguous().view(-1).view(_INTEGERS[plain.itemsize])
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for number, part in enumerate(torch.split(bits, _AT_ONCE)):
            if part.device not in places:
                places[part.device] = torch.arange(1, 2 * _AT_ONCE, 2, device=part.device)
            total += (2 * number + 1) * (part * places[part.device][: len(part)]).sum()
        sums.append(total)
    return torch.stack([one.cpu() for one in sums]).tolist() if sums else []


def hashed(digest: Digest) -> str:
    """A digest in a few characters, which are compared first."""
    return _hashed(sorted(digest.items()))


def refuse_differences(ranks: Ranks, hashes: Sequence[str], digest: Digest) -> None:
    """Refuse to go on where ranks differ.

    Args:
        ranks: the ranks.
        hashes: that of each rank's digest.
        digest: this rank's.

    Raises:
        ValueError: something that must be the same is not.
    """
    if len(set(hashes)) == 1:
        return
    digests = ranks.told(lambda: digest, lambda found: found)[1]
    first = digests[0]
    for rank, other in enumerate(digests):
        for name in dict.fromkeys([*first, *other]):
            if first.get(name) != other.get(name):
                one, two = (str(digest.get(name))[:120] for digest in (first, other))
                raise ValueError(
                    f"Expected the {name} to be the same on all ranks, got {one} on rank 0 and {two} on rank {rank}. "
                    "Construct model and optimizers alike on all ranks (DistributedDataParallel sends the parameters "
                    "of rank 0), and step their schedulers together."
                )


def _hashed(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _described(stage: Any) -> str:
    """A stage's class, and those of its declared fields that are plain, or stages in their turn.

    What else it has, it may count or learn.
    """
    fields = dataclasses.fields(stage) if dataclasses.is_dataclass(stage) else ()
    settings = {field.name: getattr(stage, field.name) for field in fields}
    plain = {key: value for key, value in settings.items() if isinstance(value, _PLAIN)}
    plain |= {key: _described(value) for key, value in settings.items() if dataclasses.is_dataclass(value)}
    name = getattr(stage, "__qualname__", None) or torch.typename(type(stage))
    return f"{name} {plain}"


def _simple(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 else tuple(value.shape)
    if isinstance(value, list | tuple):
        return [_simple(entry) for entry in value]
    return value if isinstance(value, _PLAIN) else torch.typename(type(value))
