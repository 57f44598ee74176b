"""One forward and one backward pass over a model, to the factors of its parameters.

Every layer that owns a captured parameter is hooked while the closure runs: its inputs and the gradient edges of its
outputs are kept. A backward pass to these edges (:mod:`~ftw_optim._capture.backward`) gives all output gradients at
once, and forms no weight gradient. Which operations of the graph read a captured parameter is looked up at every step:
one that was not part of a call of the layers that own it is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import Enum, auto
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ftw_optim._capture.assembly import Assembly
from ftw_optim._capture.backward import Graph, as_they_come, by_edges, node_number, parameter_gradients, take_from_node
from ftw_optim._capture.layer_use import Use, record, version_of
from ftw_optim._capture.layouts import Grid
from ftw_optim._capture.owners import Owner, parameter_at
from ftw_optim._capture.plan import CapturePlan
from ftw_optim._capture.replay.calls import Call, autocast_dtype, detached, tensors_of
from ftw_optim._capture.self_check import WAYS_OUT, PassCheck, SelfChecks, refuse_uses_outside, verify_projection
from ftw_optim._factors.factors import Factors, finite_candidates
from ftw_optim._layers.randomness import RandomState
from ftw_optim._layers.registry import LayerRule


class _Phase(Enum):
    """What the hooks do."""

    FORWARD = auto()
    """The closure runs: every call of a captured layer is recorded."""
    BACKWARD = auto()
    """A plain backward pass runs: calls inside reentrant checkpoints are recorded."""
    RECOMPUTE = auto()
    """Checkpoints may run their layers again: outputs are changed as they were, and nothing is recorded."""
    REST = auto()
    """Modules are run by ourselves."""


@final
class Capture:
    """Context in which the closure runs; afterwards :meth:`differentiate` gives the factors.

    Args:
        model: the whole model; its first input tells the number of candidates.
        plan: what to capture.
        sample_ids: int64, shape of the token grid, the candidate of each position (-1 for none).
    """

    def __init__(self, model: nn.Module, plan: CapturePlan, *, sample_ids: Tensor | None = None) -> None:
        if sample_ids is not None and (sample_ids.ndim != 2 or sample_ids.dtype != torch.int64):
            raise ValueError(
                "Expected sample_ids as int64 of the token grid's shape (b, t), got "
                f"{sample_ids.dtype} of shape {tuple(sample_ids.shape)}."
            )
        self._model, self._plan = model, plan
        self._grid = Grid(n=None, positions=None, sample_ids=sample_ids)
        self._finds_candidates = any(isinstance(o.rule, LayerRule) and o.rule.own_layout for o in plan.owners)
        self._uses: list[Use] = []
        self._of: dict[str, list[Use]] = {name: [] for name in plan.parameters}
        self._handles: list[RemovableHandle] = []
        self._phase = _Phase.REST
        self._modes = hash(tuple(module.training for module in model.modules()))
        self._expanded: set[str] = set()
        self._computed_in: set[torch.dtype] = set()
        self._stance = ExitStack()

    def __enter__(self) -> Capture:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it would take a second
            # A compiled graph calls no hooks; for this pass its eager original runs in its place.
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._phase = _Phase.FORWARD
        self._handles.append(self._model.register_forward_pre_hook(self._read_grid, with_kwargs=True))
        for owner in self._plan.owners:
            before, after = self._hooks(owner)
            self._handles.append(owner.module.register_forward_pre_hook(before, with_kwargs=True))
            # First of the forward hooks: it must see the output before any other hook changes it.
            self._handles.append(
                owner.module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        in_closure, self._phase = self._phase is _Phase.FORWARD, _Phase.REST
        self._stance.close()
        for handle in self._handles:
            handle.remove()
        self._uses.clear()  # frees the graph and the factors
        self._of.clear()
        if in_closure and self._expanded and isinstance(error, RuntimeError | IndexError | ValueError):
            names = ", ".join(sorted(self._expanded)[:5])
            error.add_note(
                f"The output of {names} has one row for all candidates and was expanded to one for each. If the model "
                f"cannot take that, do not score these: scored=lambda name, parameter: not name.startswith("
                f'({", ".join(map(repr, sorted(self._expanded)[:5]))},)), with combine="graph".'
            )

    def pause(self) -> None:
        """Stop changing what layers return, while others are captured."""
        self._phase = _Phase.REST

    def resume(self) -> None:
        """Change what layers return as when they were captured: a checkpoint may run them again."""
        self._phase = _Phase.RECOMPUTE

    @property
    def count(self) -> int | None:
        """The number of candidates the model saw; None where only ``sample_ids`` or the losses tell."""
        return None if self._grid.sample_ids is not None else self._grid.n

    @property
    def computed_in(self) -> set[torch.dtype]:
        """The dtypes that the captured layers computed in."""
        return self._computed_in

    def differentiate(
        self,
        losses: Tensor,
        *,
        scale: float,
        keep_graph: bool,
        checks: SelfChecks | None,
        generator: torch.Generator,
    ) -> dict[str, list[Factors]]:
        """Factors of every captured parameter that the losses reached, each multiplied by ``scale``.

        Args:
            losses: shape ``(n,)``, of the closure. Non-finite ones contribute nothing.
            scale: multiplies the losses for the pass.
            keep_graph: leave the graph for a second backward.
            checks: what the self-check has seen, extended in place; None: no self-check.
            generator: for the random numbers of the checks.

        Raises:
            NotImplementedError: the candidates of a layer cannot be told apart, or it cannot be run again.
            RuntimeError: nothing was captured, an input was changed in place after its layer had read it, a captured
                parameter was used outside its layer, or the self-check failed.
        """
        graph, finite, total = self._looked_at(losses, scale)
        if graph.reentrant:
            found = self._by_plain_backward(
                total, graph, finite, keep_graph=keep_graph or checks is not None, generator=generator
            )
        else:
            self._phase = _Phase.RECOMPUTE
            by_edges(total, self._uses, keep_graph=keep_graph or self._is_due(checks, self._uses))
            found = self._assembled(len(losses))
        reached = [use for use in self._uses if use.reached]
        # Of what is not finite nothing can be compared: then the check waits for the next step.
        if self._is_due(checks, reached) and bool(finite_candidates(found, losses).all()):
            check = self._check(losses, graph, scale, generator, keep_graph=keep_graph)
            if check is not None:
                for name, uses in found.items():
                    check.verify(name, uses)
                self._note_passed(checks, check, [(self._key(use), use.has_gradient()) for use in reached])
        return found

    def stream(
        self,
        losses: Tensor,
        take: Callable[[str, list[Factors]], None],
        *,
        scale: float,
        checks: SelfChecks | None,
        generator: torch.Generator,
    ) -> None:
        """As :meth:`differentiate`, but hands over each parameter's factors when all of them are there, and drops them.

        Args:
            losses: as there; the graph is freed.
            take: called with each parameter's name and factors, inside of the backward pass.
            scale: as there.
            checks: as there.
            generator: as there.
        """
        graph, _, total = self._looked_at(losses, scale)
        if graph.reentrant:
            whole = self.differentiate(losses, scale=scale, keep_graph=False, checks=checks, generator=generator)
            for name in list(whole):
                take(name, whole.pop(name))
            return
        self._phase = _Phase.RECOMPUTE
        check: PassCheck | None = None
        if self._is_due(checks, self._uses) and bool(losses.isfinite().all()):
            check = self._check(losses, graph, scale, generator, keep_graph=True)
        assembly = self._assembly(len(losses))
        waiting = {name: len(uses) for name, uses in self._of.items()}
        vouched: list[tuple[tuple[object, ...], bool]] = []

        def hand_over(name: str) -> None:
            uses = assembly.found.pop(name)
            if check is not None and all(bool(use.finite().all()) for use in uses):
                check.verify(name, uses)
            take(name, uses)

        def arrived(use: Use, *, last: bool = False) -> None:
            if use.owner.rule is None and not last:
                return  # it is run again when no backward pass is under way
            with self._at_rest():
                assembly.add(use)
            if check is not None:
                vouched.append((self._key(use), use.has_gradient()))
            use.release()
            for name in use.owner.parameters.values():
                waiting[name] -= 1
                if waiting[name] == 0:
                    hand_over(name)

        as_they_come(total, graph, self._uses, arrived)
        for use in self._uses:
            if use.reached and not use.released:
                arrived(use, last=True)
        for name in list(assembly.found):  # of which some use was not reached
            hand_over(name)
        assembly.refuse_nothing()
        if check is not None:
            self._note_passed(checks, check, vouched)

    def _looked_at(self, losses: Tensor, scale: float) -> tuple[Graph, Tensor, Tensor]:
        """The graph, in which no captured parameter is used outside; which losses are finite; and their sum."""
        self._check_sample_ids(len(losses))
        graph = Graph(losses)
        outside = [name for name, p in self._plan.parameters.items() if graph.used_outside(p, self._of[name])]
        refuse_uses_outside(outside)
        finite = losses.isfinite()
        return graph, finite, torch.where(finite, losses, torch.zeros_like(losses)).sum() * scale

    def _is_due(self, checks: SelfChecks | None, uses: Iterable[Use]) -> bool:
        """Whether a layer was read in a way that the self-check has not vouched for."""
        return checks is not None and checks.due(map(self._key, uses))

    def _check(
        self, losses: Tensor, graph: Graph, scale: float, generator: torch.Generator, *, keep_graph: bool
    ) -> PassCheck | None:
        """What captured factors are to be compared with; None where that is not finite."""
        # Far apart: rows that are mixed up show by what their weights differ in.
        weights = 2 * torch.rand(len(losses), generator=generator, dtype=torch.float64)
        total = (weights.to(losses) * losses * scale).sum()
        gradients = parameter_gradients(total, self._plan.parameters, graph, self._model, keep_graph=keep_graph)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):  # the scaled sum may overflow
            return None
        layers = {name: [use.owner.name for use in uses] for name, uses in self._of.items()}
        return PassCheck(weights, gradients, layers, self.computed_in)

    def _note_passed(
        self, checks: SelfChecks | None, check: PassCheck, vouched: Iterable[tuple[tuple[object, ...], bool]]
    ) -> None:
        """Note the ways in which layers were read and whether a gradient came, if autograd found nothing else."""
        assert checks is not None
        check.finish()
        for key, conclusive in vouched:
            checks.passed(key, conclusive=conclusive)

    def _read_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._phase is not _Phase.FORWARD or not torch.is_grad_enabled():
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        if not tensors:
            return
        first = tensors[0]
        if self._finds_candidates and first.ndim == 1 and len(tensors) > 1 and not first.is_floating_point():
            return  # positions of bags of any length: the losses will tell
        n, positions = first.shape[0], first.shape[1] if first.ndim > 1 else None
        if self._grid.n is not None and n != self._grid.n:
            raise ValueError(
                f"The closure called the model on {self._grid.n} and then on {n} rows; expected all "
                "candidates in one call, or each call over all of them."
            )
        self._grid = replace(self._grid, n=n, positions=positions)

    def _hooks(self, owner: Owner) -> tuple[Any, Any]:
        again = owner.rule is None
        replays = again or (isinstance(owner.rule, LayerRule) and owner.rule.replays)
        started: list[tuple[int, Any, list[int | None]]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._phase is _Phase.REST:
                return
            for local, name in owner.parameters.items():
                if parameter_at(module, local) is not self._plan.parameters[name]:
                    raise NotImplementedError(
                        f"Expected {name} in layer {owner.name!r} when it is called, but something stands in its "
                        f"place (torch.func.functional_call does that). {WAYS_OUT}"
                    )
            state = RandomState.now(module.parameters()) if replays else None
            versions = list(map(version_of, tensors_of(args, kwargs))) if again else []
            started.append((node_number(), state, versions))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._phase is _Phase.REST or not started:
                return None
            number, state, versions = started.pop()
            if output is None or not torch.is_grad_enabled():
                return None
            given = tensors_of(args, kwargs)
            inputs, named = detached(args, kwargs)
            call = Call(
                module=module,
                args=inputs,
                kwargs=named,
                random=state,
                drew=state is not None and state != RandomState.now(module.parameters()),
                autocast=autocast_dtype(module),
            )
            in_place = again and versions != list(map(version_of, given))
            use, changed = record(owner, call, [] if in_place else given, output, self._grid)
            if use is None or self._phase is _Phase.RECOMPUTE:
                return changed
            use.in_place = in_place
            self._uses.append(use)
            self._computed_in.add(use.computed_in)
            if use.expands:
                self._expanded.add(owner.name)
            if self._phase is _Phase.BACKWARD:
                self._handles += map(take_from_node, use.returned)
            use.span = (number, node_number())
            for name in owner.parameters.values():
                self._of[name].append(use)
            return changed

        return before, after

    def _by_plain_backward(
        self,
        total: Tensor,
        graph: Graph,
        finite: Tensor,
        *,
        keep_graph: bool,
        generator: torch.Generator,
    ) -> dict[str, list[Factors]]:
        """Factors by a plain backward, whose weight gradients betray what the graph hides inside of checkpoints."""
        self._handles += [take_from_node(one) for use in self._uses for one in use.returned]
        self._phase = _Phase.BACKWARD
        try:
            gradients = parameter_gradients(total, self._plan.parameters, graph, self._model, keep_graph=keep_graph)
        finally:
            self._phase = _Phase.RECOMPUTE
        found = self._assembled(len(finite))
        weights = finite.to("cpu", torch.float64)
        verify_projection(found, gradients, weights, generator, self.computed_in)
        return found

    def _assembly(self, count: int) -> Assembly:
        return Assembly(self._plan.parameters, count, self._grid.sample_ids)

    def _assembled(self, count: int) -> dict[str, list[Factors]]:
        """The factors of all uses that a gradient reached, by parameter name."""
        assembly = self._assembly(count)
        with self._at_rest():
            for use in self._uses:
                if use.reached:
                    assembly.add(use)
        assembly.refuse_nothing()
        return assembly.found

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """A block in which modules are run by ourselves, and hooks do nothing."""
        phase, self._phase = self._phase, _Phase.REST
        try:
            yield
        finally:
            self._phase = phase

    def _check_sample_ids(self, count: int) -> None:
        ids = self._grid.sample_ids
        if ids is not None and ids.numel():
            least, most = int(ids.min()), int(ids.max())
            if least < -1 or most >= count:
                raise ValueError(
                    f"Expected sample_ids from -1 (none) to {count - 1}, one less than the number of losses, got "
                    f"{least} to {most}."
                )

    def _key(self, use: Use) -> tuple[object, ...]:
        """What the self-check vouches for: one layer, read in one way, with the model in one mode."""
        return use.owner.name, use.layout.reading, self._modes, self._grid.n == 1
