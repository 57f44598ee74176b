"""One map for several parameters: their states and references stacked along a first axis.

A rule that treats all entries alike, but for what :mod:`~ftw_optim._preconditioners.look_ahead` does for it, forms such
a map as it forms that of one parameter. It may, where parameters are alike in everything that is no entry of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

Numbers = tuple[tuple[str, Any], ...]
"""What a parameter's state holds beside tensors of the parameter's shape, by name."""


def numbers_of(states: Sequence[Mapping[str, Any]], shapes: Sequence[torch.Size]) -> list[Numbers | None]:
    """The numbers in each state; None where it holds something that cannot be stacked. A device is waited for once.

    Args:
        states: the states of some parameters.
        shapes: the shapes of these parameters, none of a single entry.
    """
    found = [_beside(state, shape) for state, shape in zip(states, shapes, strict=True)]
    scalars: dict[tuple[torch.device, torch.dtype], list[tuple[dict[str, Any], str]]] = {}
    for numbers in found:
        for name, value in (numbers or {}).items():
            if numbers is not None and isinstance(value, Tensor):
                scalars.setdefault((value.device, value.dtype), []).append((numbers, name))
    for places in scalars.values():
        values = torch.stack([numbers[name] for numbers, name in places]).tolist()
        for (numbers, name), value in zip(places, values, strict=True):
            numbers[name] = value
    return [None if numbers is None else tuple(sorted(numbers.items())) for numbers in found]


def _beside(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Any] | None:
    """Numbers, flags and tensors without axes in a state; None where it holds anything else of another shape."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            if type(value) is not Tensor or (value.ndim and value.shape != shape):
                return None
            if value.ndim:
                continue
        elif value is not None and not isinstance(value, bool | int | float):
            return None
        found[name] = value
    return found


@final
class StackedState(Mapping[str, Any]):
    """The states of some parameters as one: tensors of their shape are stacked when they are read.

    Args:
        states: the states; everything else in them is the same in all.
    """

    def __init__(self, states: Sequence[Mapping[str, Any]]) -> None:
        self._states = states

    def __getitem__(self, name: str) -> Any:
        first = self._states[0][name]
        if isinstance(first, Tensor) and first.ndim:
            return torch.stack([state[name] for state in self._states])
        return first

    def __iter__(self) -> Iterator[str]:
        return iter(self._states[0])

    def __len__(self) -> int:
        return len(self._states[0])


def together(params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
    """The parameters stacked, shape ``(B, *shape)``; copied only where weight decay makes a map depend on them."""
    if group.get("weight_decay") and not group.get("decoupled_weight_decay"):
        return torch.stack([param.detach() for param in params])
    return params[0].detach().expand(len(params), *params[0].shape)
