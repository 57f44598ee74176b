"""Records of module calls, complete enough to run the call again with the same output."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointFunction

from ftw_optim._layers.module_parts import device_of, swapped
from ftw_optim._layers.randomness import RandomState
from ftw_optim._layers.special import is_cache


@final
@dataclass(kw_only=True, eq=False, slots=True)
class Call:
    """The detached inputs of one call of a module, and the state it ran in.

    Attributes:
        module: the module that was called.
        args: positional inputs.
        kwargs: keyword inputs.
        random: the random state before the call; None where it was not recorded.
        drew: whether the call drew random numbers.
        autocast: the dtype of the autocast region the call was in; None outside of one.
        for_all: whether the inputs are the same for all candidates, as positions are.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: RandomState | None = None
    drew: bool = False
    autocast: torch.dtype | None = None
    for_all: bool = False

    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs, in order."""
        return tensors_of(self.args, self.kwargs)

    def inputs(self) -> tuple[Any, ...]:
        """All inputs in the order of the module's ``forward``, keyword ones too."""
        if not self.kwargs:
            return self.args
        bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return (*bound.args, *bound.kwargs.values())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A block in which the module can run as in the call, without side effects.

        Random state and autocast dtype are those of the call. Afterwards the random state, and the buffers and
        attributes of the module and of those below it, are as before.
        """
        device = device_of(self.module)
        with (
            _unchanged(self.module),
            _without_reentrant_checkpoints(),
            torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            if self.random is not None:
                self.random.restore()
            yield

    def run(self, parameters: Mapping[str, Tensor], args: Any = None, kwargs: Any = None) -> Any:
        """Run the module's ``forward``, without its hooks, with these parameters and optionally other inputs."""
        with swapped(self.module, parameters):
            return self.module.forward(
                *(self.args if args is None else args), **(self.kwargs if kwargs is None else kwargs)
            )


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among some inputs, in order."""
    if _only_tensors(args, kwargs):  # the tree functions would take longer than a small layer
        return list(args)
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def detached(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The inputs of a call, with tensors detached and with None in place of caches, which the call has filled.

    In training a cache is empty before the call. If it was not, the module returns something else when it is run again,
    and is refused.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        return None if is_cache(value) else value

    if _only_tensors(args, kwargs):
        return tuple(value.detach() for value in args), kwargs
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = tree_map(leaf, (args, kwargs), is_leaf=is_cache)
    return inputs


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of the autocast region around, for this kind of device, or None."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    """A block in which reentrant checkpoints simply run their function: they refuse ``torch.autograd.grad``."""

    def run(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)

    setattr(CheckpointFunction, "apply", run)  # noqa: B010  # shadows the inherited method
    try:
        yield
    finally:
        delattr(CheckpointFunction, "apply")


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """A block after which the random state, and what the modules keep, are as before."""
    state = RandomState.now(module.parameters())
    kept = [(sub, dict(sub.__dict__), _copies(sub)) for sub in module.modules()]
    try:
        for sub, _, _ in kept:
            for name, buffer in sub._buffers.items():
                sub._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for sub, attributes, contents in kept:
            sub.__dict__.clear()
            sub.__dict__.update(attributes)
            for container, content in contents:
                _refill(container, content)
        state.restore()


def _copies(module: nn.Module) -> list[tuple[Any, Any]]:
    """The containers among a module's attributes, buffers included, each with a copy of its contents."""
    held = module.__dict__.items()
    return [
        (value, value.copy())
        for name, value in held
        if isinstance(value, dict | list | set | deque) and name not in ("_modules", "_parameters")
    ]


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.extend(content) if isinstance(container, deque) else container.update(content)


def _only_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if kwargs:
        return False
    return all([type(value) is Tensor for value in args])  # noqa: C419  # a generator takes twice as long
