"""Hooks on the layers that own captured parameters: while a closure runs they record every use of such a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ftw_optim._capture.backward import node_number, take_from_node
from ftw_optim._capture.layer_use import Use, record, record_one, version_of
from ftw_optim._capture.model_inputs import ModelInputs
from ftw_optim._capture.owners import Owner, parameter_at
from ftw_optim._capture.plan import CapturePlan
from ftw_optim._capture.replay.calls import Call, autocast_dtype, detached, tensors_of
from ftw_optim._capture.sample_ids import SampleIds
from ftw_optim._capture.self_check import WAYS_OUT
from ftw_optim._capture.stand_ins import stand_ins
from ftw_optim._layers.randomness import RandomState
from ftw_optim._layers.registry import LayerRule


class Phase(Enum):
    """The phase of the capture, which decides what the hooks do."""

    FORWARD = auto()
    """The closure runs: every call of a captured layer is recorded."""
    BACKWARD = auto()
    """A plain backward pass runs: calls inside reentrant checkpoints are recorded."""
    RECOMPUTE = auto()
    """Checkpoints may run their layers again: outputs are changed as they were, and nothing is recorded."""
    REST = auto()
    """Modules are run by ourselves."""


@final
class Recorder:
    """The hooks of one capture, and the uses of layers that they have recorded.

    Args:
        plan: what to capture. The inputs of the whole model tell the number of candidates.
        sample_ids: the candidates of rows and positions; None where the rows of the model's input are the candidates.

    Attributes:
        phase: what the hooks do now.
        inputs: the inputs of the model.
        grid: the candidates as the model's inputs show them.
        uses: all uses, in order.
        uses_of: the uses of each captured parameter.
        computed_in: the dtypes that the captured layers computed in.
        expanded: layers whose output had one row for all candidates, which was made one for each.
    """

    def __init__(self, plan: CapturePlan, sample_ids: SampleIds | None) -> None:
        self._plan = plan
        finds_candidates = any(isinstance(o.rule, LayerRule) and o.rule.own_layout for o in plan.owners)
        self._handles: list[RemovableHandle] = []
        self._watched: dict[int, list[_Watched]] = {}
        self.phase = Phase.REST
        self.inputs = ModelInputs(sample_ids, bags=finds_candidates)
        self.grid = self.inputs.grid()
        self.uses: list[Use] = []
        self.uses_of: dict[str, list[Use]] = {name: [] for name in plan.parameters}
        self.computed_in: set[torch.dtype] = set()
        self.expanded: set[str] = set()

    def open(self) -> None:
        """Hook the layers, for the forward pass that is to come."""
        self.phase = Phase.FORWARD
        read_grid, before, after = self._functions()
        self._handles.append(self._plan.structure.model.register_forward_pre_hook(read_grid, with_kwargs=True))
        known = stand_ins(self._plan.structure)
        for owner in self._plan.owners:
            self._watched.setdefault(id(owner.module), []).append(_Watched(owner, self._plan.parameters, known))
        for module in {id(owner.module): owner.module for owner in self._plan.owners}.values():
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            # First of the forward hooks: it must see the output before any other hook changes it.
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=True))

    def _functions(self) -> tuple[Any, Any, Any]:
        """The hooks, as functions: a copy of a layer that a closure makes has these too, and none of the recorder."""

        def read_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._read_grid(args, kwargs)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._before(module, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._after(module, args, kwargs, output)

        return read_grid, before, after

    def close(self) -> None:
        """Remove every hook, and free the graph and the factors."""
        self.phase = Phase.REST
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()
        self.uses.clear()
        self.uses_of.clear()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """A block in which the library itself runs modules, and the hooks do nothing."""
        phase, self.phase = self.phase, Phase.REST
        try:
            yield
        finally:
            self.phase = phase

    @contextmanager
    def during_plain_backward(self) -> Iterator[None]:
        """A block in which a plain backward pass runs: nodes note the gradients that pass, also inside checkpoints."""
        self._handles += [take_from_node(one) for use in self.uses for one in use.returned]
        self.phase = Phase.BACKWARD
        try:
            yield
        finally:
            self.phase = Phase.RECOMPUTE

    def _read_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.phase is not Phase.FORWARD or not torch.is_grad_enabled():
            return
        self.inputs.add(args, kwargs)
        self.grid = self.inputs.grid()

    def settle(self, count: int) -> None:
        """Read the layouts anew if the number of losses, ``count``, shows that another input holds the candidates.

        Raises:
            NotImplementedError: an output was already expanded to another number of rows.
        """
        if self.grid.n in (None, count) or count not in self.grid.counts:
            return
        if self.expanded:
            rows = " or ".join(map(str, self.grid.counts))
            raise NotImplementedError(
                f"The model's inputs have {rows} rows, and there are {count} losses: expected the candidates in the "
                f"first input, since {', '.join(sorted(self.expanded)[:5])} gave one row for all, which was expanded "
                f"to {self.grid.n}. Put the input with the candidates first."
            )
        self.grid = self.inputs.grid(count)
        for use in self.uses:
            use.read_again(self.grid)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.phase is Phase.REST:
            return
        if id(module) not in self._watched:
            raise NotImplementedError(
                f"Expected the layers of the model to be called, got a copy of one ({type(module).__name__}) that was "
                f"made while the closure ran. Copy the model before. {WAYS_OUT}"
            )
        for watched in self._watched[id(module)]:
            watched.refuse_stand_ins()
            state = RandomState.now(module.parameters()) if watched.replays else None
            versions = list(map(version_of, tensors_of(args, kwargs))) if watched.again else []
            watched.started.append((node_number(), state, versions))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.phase is Phase.REST:
            return None
        changed = None
        for watched in reversed(self._watched.get(id(module), [])):  # each is to see what the one behind it returns
            if watched.started:
                found = self._finished(watched, args, kwargs, output if changed is None else changed)
                changed = changed if found is None else found
        return changed

    def _finished(self, watched: _Watched, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record a call that has ended; returns what the layer is to return in its output's place, None for that."""
        number, state, versions = watched.started.pop()
        if output is None or not torch.is_grad_enabled():
            return None
        owner, autocast = watched.owner, autocast_dtype(watched.owner.device)
        in_place = False
        if watched.plain and len(args) == 1 and not kwargs and type(args[0]) is type(output) is Tensor:
            use, changed = record_one(owner, args[0], output, self.grid, autocast)
        else:
            given = tensors_of(args, kwargs)
            inputs, named = detached(args, kwargs)
            drew = state is not None and state != RandomState.now(owner.module.parameters())
            call = Call(module=owner.module, args=inputs, kwargs=named, random=state, drew=drew, autocast=autocast)
            in_place = watched.again and versions != list(map(version_of, given))
            use, changed = record(owner, call, [] if in_place else given, output, self.grid)
        if use is None or self.phase is Phase.RECOMPUTE:
            return changed
        use.in_place = in_place
        self.uses.append(use)
        self.computed_in.add(use.computed_in)
        if use.expands:
            self.expanded.add(owner.name)
        if self.phase is Phase.BACKWARD:
            self._handles += map(take_from_node, use.returned)
        use.span = (number, node_number())
        for name in owner.parameters.values():
            self.uses_of[name].append(use)
        return changed


@final
class _Watched:
    """A layer whose calls are recorded: what is known of it before, and of the calls that have begun."""

    __slots__ = ("again", "known", "owner", "parameters", "plain", "replays", "started")

    def __init__(self, owner: Owner, parameters: Mapping[str, nn.Parameter], known: Mapping[str, Tensor]) -> None:
        self.owner = owner
        self.again = owner.rule is None
        self.replays = self.again or (isinstance(owner.rule, LayerRule) and owner.rule.replays)
        self.plain = not self.replays and isinstance(owner.rule, LayerRule)
        self.parameters = [(local, name, parameters[name]) for local, name in owner.parameters.items()]
        self.known = known
        self.started: list[tuple[int, RandomState | None, list[int | None]]] = []

    def refuse_stand_ins(self) -> None:
        """Refuse a call in which other tensors stand in the places of the captured parameters, but those of FSDP2."""
        for local, name, parameter in self.parameters:
            if parameter_at(self.owner.module, local) is not self.known.get(name, parameter):
                raise NotImplementedError(
                    f"Expected {self.owner.parameters[local]} in layer {self.owner.name!r} when it is called, but "
                    f"something stands in its place (torch.func.functional_call does that). {WAYS_OUT}"
                )
