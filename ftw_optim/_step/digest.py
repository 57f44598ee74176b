"""What must be the same on all ranks of a selection, so that a difference is an error before it is a wrong step."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftw_optim._ranks.ranks import Ranks
from ftw_optim._step.setup import StepSetup

Digest = Mapping[str, str]
"""What is compared, each under the name that an error gives it."""

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
        "metric": setup.metric.value,
        "combine": setup.way.name,
        "target": str((setup.target.refresh_every, setup.target.decay, setup.target.held_out_every)),
        "train_on_target": "closure" if callable(setup.trains_on_target) else str(setup.trains_on_target),
        "seed and number of selections": str((setup.seed_of("digest"), setup.backwards)),
        "grad_scale": str(setup.scale),
        "kept target gradient": str(setup.kept_target is not None),
    }
    if not setup.ranks.met:
        values = [p.detach().double().sum() for p in parameters.updated.values()]
        found["values of the parameters"] = str(torch.stack([v.cpu() for v in values]).tolist())
    return found


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
    """A stage's class, and those of its settings that are plain."""
    if dataclasses.is_dataclass(stage):
        settings = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    else:
        settings = dict(getattr(stage, "__dict__", {}))
    name = getattr(stage, "__qualname__", None) or torch.typename(type(stage))
    return f"{name} { ({key: value for key, value in settings.items() if isinstance(value, _PLAIN)}) }"


def _simple(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 else tuple(value.shape)
    return value if isinstance(value, _PLAIN) else str(value)[:80]
