"""Access to a module's own parameters, to read or exchange them, and probes of a module without side effects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ftw_optim._layers.randomness import RandomState


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter; the CPU where it has none."""
    for parameter in module._parameters.values():  # of its own, which come first: a search below costs much more
        if parameter is not None:
            return parameter.device
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module owns directly, by their local names."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def place(module: nn.Module, local: str) -> tuple[dict[str, Any], str]:
    """The place of the parameter of this dotted name in a module: the dictionary and the key in it."""
    if "." not in local:
        return module._parameters, local
    path, _, key = local.rpartition(".")
    return module.get_submodule(path)._parameters, key


def exchange(module: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``tensors`` in the places of the parameters of these dotted names; returns what was there before."""
    before = {}
    for local, tensor in tensors.items():
        parameters, key = place(module, local)
        before[local] = parameters[key]
        parameters[key] = tensor  # a plain tensor serves for a forward
    return before


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``tensors`` stand in for the parameters of these dotted names while the block runs."""
    before = exchange(module, tensors)
    try:
        yield
    finally:
        exchange(module, before)


PROBE_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, IndexError)
"""Errors that a layer may raise on inputs not meant for it, or that a comparison of its outputs may raise."""


@contextmanager
def inspected(module: nn.Module) -> Iterator[None]:
    """A block in which a layer is run to see what it does, without gradients; random generators are restored.

    Raises:
        AssertionError: the layer drew random numbers.
    """
    before = RandomState.now(module.parameters())
    try:
        with torch.no_grad():
            yield
        assert before == RandomState.now(module.parameters())
    finally:
        before.restore()
