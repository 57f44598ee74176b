"""The backward passes of a capture: to the gradients of the layers' outputs, and to parameters for the self-check.

``torch.autograd.grad`` to gradient edges forms no weight gradient and stops at the first captured layer. Reentrant
checkpointing refuses it, and runs its layers a second time inside the backward pass: there a plain ``backward`` with
``.grad`` set aside serves, and hooks on the nodes of the graph take the gradients as they pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ftw_optim._uses import Returned, Use

REENTRANT = "CheckpointFunctionBackward"
"""The node of the graph that a reentrant checkpoint leaves."""


def by_edges(total: Tensor, uses: Sequence[Use], outside: Mapping[str, nn.Parameter], *, keep_graph: bool) -> list[str]:
    """Fill in the output gradients of all ``uses``; returns which parameters ``outside`` a gradient reached."""
    returned = [one for use in uses for one in use.returned]
    wanted: list[Any] = [*(one.edge for one in returned), *outside.values()]
    if not wanted:
        return []
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=keep_graph)
    for one, gradient in zip(returned, gradients, strict=False):
        one.gradient = None if gradient is None else gradient.reshape(one.value.shape)
    beside = zip(outside, gradients[len(returned) :], strict=True)
    return [name for name, gradient in beside if gradient is not None]


def take_from_node(one: Returned) -> RemovableHandle:
    """Let the graph's node note the gradient of a layer's output when a backward pass comes by."""

    def note(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[one.edge.output_nr]
        one.gradient = None if gradient is None else gradient.detach().reshape(one.value.shape)

    return one.edge.node.register_prehook(note)


def has_node(losses: Tensor, name: str) -> bool:
    """Whether the graph of the losses has a node of this kind."""
    seen, waiting = set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if node.name() == name:
                return True
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
    return False


def summed(parts: Mapping[str, Iterable[Tensor | None]]) -> dict[str, Tensor]:
    """For each parameter the sum of the gradients that arrived, in float32 at least."""
    found = {}
    for name, gradients in parts.items():
        arrived = [gradient for gradient in gradients if gradient is not None]
        if len(arrived) == 1:
            found[name] = arrived[0]
        elif arrived:
            dtype = torch.promote_types(arrived[0].dtype, torch.float32)
            found[name] = torch.stack([gradient.to(dtype) for gradient in arrived]).sum(0)
    return found


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Every ``.grad`` is None when the block starts, and as before when it ends, whatever happens."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
