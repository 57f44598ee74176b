"""One call of a module, remembered well enough to run it again and get the same output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ftw_optim._layers.registry import dotted, swapped


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The detached inputs of one call of a module, and the state it ran in.

    Attributes:
        module: which module.
        args: positional inputs.
        kwargs: keyword inputs.
        random: the random state before the call, by device; None where it was not recorded.
        drew: the call drew random numbers.
        autocast: the dtype of the autocast region the call was in; None outside of one.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: Mapping[torch.device, Tensor] | None = None
    drew: bool = False
    autocast: torch.dtype | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs, in order."""
        if _only_tensors(self.args, self.kwargs):
            return list(self.args)
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def inputs(self) -> tuple[Any, ...]:
        """All inputs in the order of the module's ``forward``, keyword ones too."""
        if not self.kwargs:
            return self.args
        bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return (*bound.args, *bound.kwargs.values())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A block in which the module's random state and precision are those of the call, and its buffers are copies.

        The random state outside is as if nothing had been drawn.
        """
        devices = [device for device in self.random or {} if device.type != "cpu"]
        kind = devices[0].type if devices else "cuda"
        buffers = [(sub, dict(sub._buffers)) for sub in self.module.modules() if sub._buffers]
        device = _device(self.module)
        try:
            for sub, kept in buffers:
                sub._buffers.update({name: None if b is None else b.clone() for name, b in kept.items()})
            with (
                torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind),
                torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None),
            ):
                for one, state in (self.random or {}).items():
                    _set_random(one, state)
                yield
        finally:
            for sub, kept in buffers:
                sub._buffers.update(kept)

    def run(self, parameters: Mapping[str, Tensor], args: Any = None, kwargs: Any = None) -> Any:
        """The module's ``forward``, without its hooks, with some parameters and perhaps other inputs."""
        with swapped(self.module, parameters):
            return self.module.forward(
                *(self.args if args is None else args), **(self.kwargs if kwargs is None else kwargs)
            )


def detached(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The inputs of a call with their tensors out of the graph, and without the caches that the call has filled since.

    What a cache held before a call in training is nothing; where it was something, the module gives something else when
    it is run again, and is refused.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        return None if _is_cache(value) else value

    if _only_tensors(args, kwargs):  # the tree functions would take longer than a small layer
        return tuple(value.detach() for value in args), kwargs
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = tree_map(leaf, (args, kwargs), is_leaf=_is_cache)
    return inputs


def _only_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return not kwargs and all(type(value) is Tensor for value in args)


def _is_cache(value: Any) -> bool:
    return any(dotted(cls) == "transformers.cache_utils.Cache" for cls in type(value).__mro__)


def random_state(module: nn.Module) -> dict[torch.device, Tensor]:
    """The state of the generators that a module's call may draw from."""
    device = _device(module)
    state = {torch.device("cpu"): torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        state[device] = torch.get_device_module(device.type).get_rng_state(device)
    return state


def autocast_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the autocast region around, or None."""
    kind = _device(module).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _set_random(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device.type).set_rng_state(state, device)


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
