"""The whole parameters that stand in for sharded ones while a model runs: FSDP2 puts them where its shards were.

The graph of the losses has these as its leaves, not the shards that the optimizer holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ftw_optim._capture.structure import Structure, is_sharding

Place = tuple[dict[str, Any], str, str]
"""The parameters that a module holds, the name of one in it, and its name in the model."""


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which each process holds a part or a copy."""
    return type(parameter) not in (nn.Parameter, Tensor) and hasattr(parameter, "placements")


def stand_ins(structure: Structure) -> dict[str, Tensor]:
    """The stand-ins that were seen, by the names of their parameters; FSDP2 keeps them from pass to pass."""
    return structure.once("stand-ins", dict)


def leaves(structure: Structure, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leaves of a graph that these parameters are: themselves, or what stood in for them."""
    known = stand_ins(structure)
    return {name: known.get(name, parameter) for name, parameter in parameters.items()} if known else dict(parameters)


def whole_zeros(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros in the shape of a whole parameter, sharded or not."""
    return torch.zeros(parameter.shape, dtype=dtype or parameter.dtype, device=parameter.device)


@contextmanager
def noting_stand_ins(structure: Structure) -> Iterator[None]:
    """A block in which the model runs, and its stand-ins are noted."""
    places = structure.once("places of shards", lambda: _places(structure))
    with ExitStack() as stack:
        for name, held in places.items():
            # After the hook that brings the whole parameters, which FSDP2 puts first.
            handle = structure.modules[name].register_forward_pre_hook(_noting(stand_ins(structure), held))
            stack.callback(handle.remove)
        yield


def _noting(known: dict[str, Tensor], held: Iterable[Place]) -> Any:
    def note(module: nn.Module, inputs: Any) -> None:
        for parameters, local, name in held:
            found = parameters[local]
            if not is_sharded(found):
                known[name] = found

    return note


def _places(structure: Structure) -> dict[str, list[Place]]:
    """The sharded parameters that each module brings together, by the name of the module."""
    found: dict[str, list[Place]] = {}
    for path, module in structure.modules.items():
        for local, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter):
                brings = path
                while brings and not is_sharding(structure.modules[brings]):
                    brings = brings.rpartition(".")[0]
                found.setdefault(brings, []).append((module._parameters, local, structure.names[id(parameter)]))
    return found
