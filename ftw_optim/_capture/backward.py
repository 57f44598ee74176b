"""The graph below some losses, and backward passes over it to the outputs of layers.

``torch.autograd.grad`` to gradient edges forms no weight gradient and stops at the first captured layer. Reentrant
checkpointing refuses it, and runs its layers a second time inside the backward pass. There a plain ``backward`` is used
instead, with ``.grad`` set aside, and hooks on the nodes of the graph take the gradients as they pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from ftw_optim._capture.layer_use import Returned, Use
from ftw_optim._capture.self_check import WAYS_OUT, Link
from ftw_optim._capture.structure import Structure

REENTRANT = "CheckpointFunctionBackward"
"""The node of the graph that a reentrant checkpoint leaves."""

_CAST = "ToCopyBackward0"
_COPIES = {_CAST, "CopyBackwards", "CopySlices"}
BUILT_IN = re.compile(r"\w+Backward\d+")
"""The names of the nodes of PyTorch's own operations."""

AccumulateGrad: type = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def node_number() -> int:
    """The number that autograd will give the next node."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


@final
class Graph:
    """The graph below some losses, searched once on construction: milliseconds for thousands of nodes."""

    def __init__(self, losses: Tensor) -> None:
        self.dtypes: set[torch.dtype] = {losses.dtype}
        """The floating-point dtypes of what was computed on the way, outside of reentrant checkpoints."""
        self.leaves: list[Tensor] = []
        """The tensors that a plain backward would give a ``.grad``, outside of reentrant checkpoints."""
        self.links: set[Link] = set()
        """The links between operations, each once."""
        self._first: dict[Node, Node] = {}
        """A node that reads what another made, by that other; of all but the losses' own."""
        self._further: dict[Node, list[Node]] = {}
        """The others, of the nodes that have several."""
        self._readers: dict[int, list[Node]] = {}
        if losses.grad_fn is not None:
            self._search(losses.grad_fn)
        kinds = {kind for link in self.links for kind in link} | {type(losses.grad_fn)}
        self.reentrant = any(kind.__name__ == REENTRANT for kind in kinds)

    def _search(self, root: Node) -> None:
        first, further, readers = self._first, self._further, self._readers
        changes: dict[type, bool] = {}
        waiting = [root]
        while waiting:
            node = waiting.pop()
            kind = type(node)
            if kind not in changes:
                changes[kind] = _may_change_dtype(kind)
            if changes[kind]:
                for at in (node, *(below for below, _ in node.next_functions if below is not None)):
                    self.dtypes.update(one.dtype for one in at._input_metadata if one.dtype.is_floating_point)
            for below, _ in node.next_functions:
                if below is None:
                    continue
                self.links.add((kind, type(below)))
                if type(below) is AccumulateGrad:
                    end: Any = below
                    leaf = end.variable
                    if id(leaf) not in readers:
                        readers[id(leaf)] = []
                        self.leaves.append(leaf)
                        self.dtypes.add(leaf.dtype)
                    readers[id(leaf)].append(node)
                elif below in first:
                    further.setdefault(below, []).append(node)
                else:
                    first[below] = node
                    waiting.append(below)

    def _above(self, node: Node) -> Sequence[Node]:
        """The nodes that read what a node made."""
        if node not in self._first:
            return ()
        return self._first[node], *self._further.get(node, ())

    def above(self, nodes: set[Node]) -> set[Node]:
        """All nodes between the losses and any of these ``nodes``."""
        found: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            for node in self._above(waiting.pop()):
                if node not in found:
                    found.add(node)
                    waiting.append(node)
        return found

    def used_outside(self, parameter: Tensor, uses: Sequence[Use]) -> bool:
        """Whether the losses depend on the parameter in any other way than through the outputs of these ``uses``."""
        for node in self._readers.get(id(parameter), ()):
            # Autocast keeps the casts of a whole region: what reads the parameter is what reads its cast.
            for reader in self._above(node) if type(node).__name__ == _CAST else (node,):
                use = _made_in(reader, uses)
                if use is None or self._leaves(reader, use):
                    return True
        return False

    def _leaves(self, start: Node, use: Use) -> bool:
        """Whether what a node made is read outside of a use, other than through the outputs of the use."""
        ends = [one.edge.node for one in use.returned]
        waiting, seen = [start], set(ends)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            for above in self._above(node):
                if above not in ends and _made_in(above, (use,)) is None:
                    return True
                waiting.append(above)
        return False


def _may_change_dtype(kind: type) -> bool:
    """Whether an operation may round to another dtype: a copy, or one that is not PyTorch's own."""
    return kind.__name__ in _COPIES or not BUILT_IN.fullmatch(kind.__name__)


def _made_in(node: Node, uses: Sequence[Use]) -> Use | None:
    """The use during which autograd made a node; None if it was made in none of them."""
    number = node._sequence_nr()
    for use in uses:
        if use.span[0] <= number < use.span[1]:
            return use
    return None


def by_edges(total: Tensor, uses: Sequence[Use], *, keep_graph: bool) -> None:
    """Fill in the output gradients of all ``uses``, in one backward pass to their gradient edges."""
    returned = [one for use in uses for one in use.returned]
    wanted: list[Any] = [one.edge for one in returned]
    if not wanted:
        return
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=keep_graph)
    for one, gradient in zip(returned, gradients, strict=True):
        one.gradient = None if gradient is None else gradient.reshape(one.shape)


def as_they_come(total: Tensor, graph: Graph, uses: Sequence[Use], arrived: Callable[[Use], None]) -> None:
    """Fill in the output gradients of all ``uses``, and call ``arrived`` with each use once it has all of its own.

    The pass itself keeps only the gradients of outputs that have no other captured layer below them.
    """
    above = graph.above({one.edge.node for use in uses for one in use.returned})
    last = [one for use in uses for one in use.returned if one.edge.node not in above]
    done: set[int] = set()

    def look(use: Use) -> None:
        if id(use) not in done and all(one.gradient is not None for one in use.returned):
            done.add(id(use))
            arrived(use)

    handles = [
        take_from_node(one, then=partial(look, use)) for use in uses for one in use.returned if one.edge.node in above
    ]
    try:
        wanted: list[Any] = [one.edge for one in last]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
    finally:
        for handle in handles:
            handle.remove()
    for one, gradient in zip(last, gradients, strict=True):
        one.gradient = None if gradient is None else gradient.reshape(one.shape)
    for use in uses:
        if id(use) not in done and use.reached:
            arrived(use)


def take_from_node(one: Returned, then: Callable[[], None] | None = None) -> RemovableHandle:
    """Hook the node of a layer's output: a backward pass stores the output's gradient, then calls ``then``."""

    def note(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[one.edge.output_nr]
        one.gradient = None if gradient is None else gradient.detach().reshape(one.shape)
        if then is not None:
            then()

    return one.edge.node.register_prehook(note)


def parameter_gradients(
    total: Tensor, parameters: Mapping[str, Tensor], graph: Graph, structure: Structure, *, keep_graph: bool = False
) -> dict[str, Tensor]:
    """Autograd's gradients of ``total`` with respect to the parameters it reaches; no ``.grad`` is changed.

    Args:
        total: a scalar.
        parameters: the parameters, by name.
        graph: the graph below ``total``. Where it holds reentrant checkpoints, only a plain backward works.
        structure: the model; a plain backward gives its other parameters a gradient too, which is set aside.
        keep_graph: leave the graph for another pass.
    """
    found: tuple[Tensor | None, ...]
    if not graph.reentrant:
        with nothing_nested(structure):
            found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=keep_graph)
    else:
        with gradients_set_aside([*graph.leaves, *structure.parameters.values(), *parameters.values()]):
            total.backward(retain_graph=keep_graph)  # type: ignore[no-untyped-call]
            found = tuple(parameter.grad for parameter in parameters.values())
    pairs = zip(parameters, found, strict=True)
    return {name: gradient for name, gradient in pairs if gradient is not None}


@contextmanager
def nothing_nested(structure: Structure) -> Iterator[None]:
    """A block of backward passes to given tensors, in which no parameter of the model may get a ``.grad``.

    One does where a function of the graph, or a hook, runs layers and a backward of its own inside of the backward, as
    reversible layers do. That stays unseen: the graph has none of these layers.

    Raises:
        NotImplementedError: a parameter got a gradient; those from before are as they were.
    """
    names: list[str] = []
    with gradients_set_aside(structure.parameters.values()):
        yield
        if any(parameter.grad is not None for parameter in structure.parameters.values()):
            names = [name for name, parameter in structure.parameters.items() if parameter.grad is not None]
    if names:
        raise NotImplementedError(
            f"Expected one backward pass, but a function or hook of the model ran another one inside of it, from which "
            f"{', '.join(names[:5])} got gradients (reversible layers do that): whose candidates' they are is not "
            f"known. {WAYS_OUT}"
        )


@contextmanager
def gradients_set_aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A block in which every ``.grad`` starts as None; afterwards each is as before, also after an exception."""
    held = [(tensor, tensor.grad) for tensor in tensors]
    try:
        for tensor, _ in held:
            tensor.grad = None
        yield
    finally:
        for tensor, gradient in held:
            tensor.grad = gradient
