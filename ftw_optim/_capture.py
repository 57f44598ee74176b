"""One forward and one backward pass over a model, to the factors of its parameters.

Every layer that owns a captured parameter is hooked. While it runs, a stand-in that shares the parameter's memory
takes its place (``attached=False``), so that the backward pass forms no weight gradient and a gradient that still
reaches the parameter itself betrays a use outside the layer. Its inputs and the gradient edges of its outputs are
kept; a backward pass to these edges (:mod:`ftw_optim._passes`) then gives all output gradients at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import Enum, auto
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ftw_optim._checks import WAYS_OUT, refuse_uses_outside, verify_weighted_sums
from ftw_optim._factors import Factors, finite_candidates
from ftw_optim._layers.calls import Call, autocast_dtype, detached, random_state
from ftw_optim._layers.owners import Owner, parameter_at
from ftw_optim._layers.registry import LayerRule, exchange
from ftw_optim._layouts import Grid
from ftw_optim._passes import REENTRANT, by_edges, gradients_set_aside, has_node, summed, take_from_node
from ftw_optim._plan import CapturePlan
from ftw_optim._uses import Use, factors_of, record


class _Phase(Enum):
    """What the hooks do."""

    FORWARD = auto()
    """The closure runs: every call of a captured layer is recorded."""
    BACKWARD = auto()
    """A plain backward pass runs: calls inside reentrant checkpoints are recorded, without weight gradients."""
    CHECK = auto()
    """Another one runs, to the parameters: stand-ins inside reentrant checkpoints collect their gradients."""
    REST = auto()


@final
class Capture:
    """Context in which the closure runs; afterwards :meth:`differentiate` gives the factors.

    Args:
        model: the whole model; its first input tells the number of candidates.
        plan: what to capture.
        attached: keep the parameters themselves in the graph, for an ordinary backward over it later.
        sample_ids: int64, shape of the token grid, the candidate of each position (-1 for none).
    """

    def __init__(
        self, model: nn.Module, plan: CapturePlan, *, attached: bool, sample_ids: Tensor | None = None
    ) -> None:
        if sample_ids is not None and (sample_ids.ndim != 2 or sample_ids.dtype != torch.int64):
            raise ValueError(
                "Expected sample_ids as int64 of the token grid's shape (b, t), got "
                f"{sample_ids.dtype} of shape {tuple(sample_ids.shape)}."
            )
        self._model, self._plan, self._attached = model, plan, attached
        self._grid = Grid(n=None, positions=None, sample_ids=sample_ids)
        self._uses: list[Use] = []
        self._standing: dict[int, list[tuple[Owner, dict[str, Any]]]] = {}
        self._collecting: list[tuple[str, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._phase = _Phase.REST
        self._modes = hash(tuple(module.training for module in model.modules()))
        self._without_grad: set[str] = set()
        self._with_grad: set[str] = set()
        self._expanded: set[str] = set()
        self._computed_in: set[torch.dtype] = set()
        self._stance = ExitStack()
        self._reentrant = False

    def __enter__(self) -> Capture:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it would take a second
            # A compiled graph calls no hooks; for this pass its eager original runs in its place.
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._phase = _Phase.FORWARD
        self._handles.append(self._model.register_forward_pre_hook(self._read_grid, with_kwargs=True))
        for number, owner in enumerate(self._plan.owners):
            before, after = self._hooks(number, owner)
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
        for number in self._standing:
            while self._standing[number]:
                self._restore(number)
        self._uses.clear()  # frees the graph and the factors
        self._collecting.clear()
        if in_closure and self._expanded and isinstance(error, RuntimeError | IndexError | ValueError):
            error.add_note(
                f"The output of {', '.join(sorted(self._expanded)[:5])} is the same for all candidates and was "
                f"expanded to one row for each. If the model cannot take that: {WAYS_OUT}"
            )

    @property
    def count(self) -> int | None:
        """The number of candidates the model saw; None where only ``sample_ids`` or the losses tell."""
        return None if self._grid.sample_ids is not None else self._grid.n

    @property
    def computed_in(self) -> set[torch.dtype]:
        """The dtypes that the captured layers computed in."""
        return self._computed_in

    def own_backward_gradients(self) -> dict[str, Tensor]:
        """What a closure that ran its own backward left at the stand-ins, by parameter name."""
        return summed(self._left_at_stand_ins())

    def differentiate(
        self,
        losses: Tensor,
        *,
        scale: float,
        keep_graph: bool,
        checked: set[tuple[str, str, int]] | None,
        generator: torch.Generator,
    ) -> dict[str, list[Factors]]:
        """Factors of every captured parameter that the losses reached, each multiplied by ``scale``.

        Args:
            losses: shape ``(n,)``, of the closure. Non-finite ones contribute nothing.
            scale: multiplies the losses for the pass.
            keep_graph: leave the graph for a second backward.
            checked: what the self-check has seen, extended in place; None: no self-check.
            generator: for the self-check's weights.

        Raises:
            NotImplementedError: the candidates of a layer cannot be told apart, or it cannot be run again.
            RuntimeError: nothing was captured, an input was changed in place after its layer had read it, a captured
                parameter was used outside its layer, or the self-check failed.
        """
        self._phase = _Phase.REST
        self._check_sample_ids(len(losses))
        finite = losses.isfinite()
        total = torch.where(finite, losses, torch.zeros_like(losses)).sum() * scale
        self._reentrant = has_node(losses, REENTRANT)
        due = checked is not None and (self._reentrant or any(self._key(use) not in checked for use in self._uses))
        outside = {} if self._attached else self._plan.parameters
        if self._reentrant:
            beside = self._plain_pass(total, outside, keep_graph=keep_graph or due)
        else:
            beside = by_edges(total, self._uses, outside, keep_graph=keep_graph or due)
        refuse_uses_outside(beside)
        found = self._collect(len(losses))
        due = due and any(self._key(use) not in checked for use in self._uses)  # type: ignore[operator]
        # Of what is not finite nothing can be compared: then the check waits for the next step.
        if due and bool(finite_candidates(found, losses).all()):
            assert checked is not None
            # Far apart: rows that are mixed up show by what their weights differ in.
            weights = 2 * torch.rand(len(losses), generator=generator, dtype=torch.float64)
            gradients = self._parameter_gradients((weights.to(losses) * losses * scale).sum(), keep_graph=keep_graph)
            verify_weighted_sums(found, gradients, weights, self._layers(), computed_in=self.computed_in)
            checked.update(map(self._key, self._uses))
        return found

    # ------------------------------------------------------------------ while the closure runs

    def _read_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._phase is not _Phase.FORWARD or not torch.is_grad_enabled():
            return
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.ndim > 0:
                n, positions = leaf.shape[0], leaf.shape[1] if leaf.ndim > 1 else None
                if self._grid.n is not None and n != self._grid.n:
                    raise ValueError(
                        f"The closure called the model on {self._grid.n} and then on {n} rows; expected all "
                        "candidates in one call, or each call over all of them."
                    )
                self._grid = replace(self._grid, n=n, positions=positions)
                return

    def _hooks(self, number: int, owner: Owner) -> tuple[Any, Any]:
        replays = owner.rule is None or (isinstance(owner.rule, LayerRule) and owner.rule.replays)
        random: list[dict[torch.device, Tensor]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if replays:
                random.append(random_state(module))
            inside = owner.name in self._without_grad  # of a reentrant checkpoint, which runs it again
            if self._attached and not (self._phase is _Phase.BACKWARD and inside):
                return
            # Inside, no weight gradient is wanted; but without any, the output would have no graph at all, and a layer
            # that also runs elsewhere may be in a checkpoint of the other kind, which wants everything as it was.
            wanted = not (
                self._phase is _Phase.BACKWARD
                and inside
                and owner.name not in self._with_grad
                and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
            )
            stand_ins = {
                local: own.detach().requires_grad_(wanted)
                for local in owner.parameters
                if (own := parameter_at(module, local)) is not None
            }
            self._standing.setdefault(number, []).append((owner, exchange(module, stand_ins)))
            if self._phase is _Phase.CHECK and inside:
                self._collecting += [(owner.parameters[local], tensor) for local, tensor in stand_ins.items()]

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            stand_ins = self._restore(number)
            state = random.pop() if random else None
            inside = owner.name in self._without_grad
            if output is None or not (self._phase is _Phase.FORWARD or (self._phase is _Phase.BACKWARD and inside)):
                return None
            if not torch.is_grad_enabled():
                self._without_grad.add(owner.name)
                return None
            if self._phase is _Phase.FORWARD:
                self._with_grad.add(owner.name)
            drew = state is not None and any(
                not torch.equal(one, state[device]) for device, one in random_state(module).items()
            )
            inputs, named = detached(args, kwargs)
            call = Call(
                module=module,
                args=inputs,
                kwargs=named,
                random=state,
                drew=drew,
                autocast=autocast_dtype(module),
            )
            phase, self._phase = self._phase, _Phase.REST  # recording may run the module
            try:
                use, changed = record(owner, call, output, self._grid, stand_ins)
            finally:
                self._phase = phase
            if use is not None:
                self._uses.append(use)
                self._computed_in.add(use.computed_in)
                if use.expands:
                    self._expanded.add(owner.name)
                if phase is _Phase.BACKWARD:
                    self._handles += map(take_from_node, use.returned)
            return changed

        return before, after

    def _restore(self, number: int) -> dict[str, Tensor]:
        """Put the parameters of an owner back; returns the stand-ins."""
        if not self._standing.get(number):
            return {}
        owner, parameters = self._standing[number].pop()
        return exchange(owner.module, parameters)

    # ------------------------------------------------------------------ after it

    def _plain_pass(self, total: Tensor, outside: Mapping[str, nn.Parameter], *, keep_graph: bool) -> list[str]:
        """Fill in all output gradients by a plain backward; returns which parameters outside it reached."""
        self._handles += [take_from_node(one) for use in self._uses for one in use.returned]
        with self._plain_backward(total, _Phase.BACKWARD, keep_graph=keep_graph):
            return [name for name, parameter in outside.items() if parameter.grad is not None]

    @contextmanager
    def _plain_backward(self, total: Tensor, phase: _Phase, *, keep_graph: bool) -> Iterator[None]:
        """A block in which ``.grad`` holds what a plain backward gives; afterwards it is as before."""
        with gradients_set_aside(self._model):
            self._phase = phase
            try:
                total.backward(retain_graph=keep_graph)  # type: ignore[no-untyped-call]
            finally:
                self._phase = _Phase.REST
            yield

    def _parameter_gradients(self, total: Tensor, *, keep_graph: bool) -> dict[str, Tensor]:
        """Autograd's gradients of ``total`` by the captured parameters, through the layers that own them."""
        if self._reentrant:
            for use in self._uses:
                for stand_in in use.stand_ins.values():
                    stand_in.grad = None  # left by the pass before
            with self._plain_backward(total, _Phase.CHECK, keep_graph=keep_graph):
                if self._attached:
                    return {n: p.grad for n, p in self._plan.parameters.items() if p.grad is not None}
                return summed(self._left_at_stand_ins())
        sources: dict[str, list[Tensor]] = {name: [] for name in self._plan.parameters}
        if self._attached:
            sources = {name: [parameter] for name, parameter in self._plan.parameters.items()}
        else:
            for use in self._uses:
                for local, name in use.owner.parameters.items():
                    sources[name].append(use.stand_ins[local])
        flat = [tensor for tensors in sources.values() for tensor in tensors]
        gradients = iter(torch.autograd.grad(total, flat, allow_unused=True, retain_graph=keep_graph))
        return summed({name: [next(gradients) for _ in tensors] for name, tensors in sources.items()})

    def _collect(self, count: int) -> dict[str, list[Factors]]:
        """The factors of all uses that a gradient reached, by parameter name."""
        found: dict[str, list[Factors]] = {}
        for use in self._uses:
            if not use.reached:
                continue
            for name, factors in factors_of(use, self._plan.parameters, count, self._grid.sample_ids):
                uses = found.setdefault(name, [])
                if uses and (uses[0].rows, uses[0].columns) != (factors.rows, factors.columns):
                    raise RuntimeError(
                        f"The rules of the layers that share {name} return gradients of {uses[0].rows} x "
                        f"{uses[0].columns} and of {factors.rows} x {factors.columns} entries; expected one shape."
                    )
                uses.append(factors)
        if not found:
            raise RuntimeError(
                "Expected the losses to depend on a captured parameter, but none was reached. Compute the losses "
                "with the model that was given to SelectiveOptimizer, with its layers called as modules (an exported "
                "graph, or one compiled ahead of time, calls none)."
            )
        return found

    def _left_at_stand_ins(self) -> dict[str, list[Tensor | None]]:
        """What backward passes left at the stand-ins."""
        parts: dict[str, list[Tensor | None]] = {}
        for use in self._uses:
            for local, stand_in in use.stand_ins.items():
                parts.setdefault(use.owner.parameters[local], []).append(stand_in.grad)
        for name, stand_in in self._collecting:
            parts.setdefault(name, []).append(stand_in.grad)
        return parts

    def _layers(self) -> dict[str, list[str]]:
        """The layers each parameter was captured in."""
        layers: dict[str, list[str]] = {name: [] for name in self._plan.parameters}
        for use in self._uses:
            for name in use.owner.parameters.values():
                layers[name].append(use.owner.name)
        return layers

    def _check_sample_ids(self, count: int) -> None:
        ids = self._grid.sample_ids
        if ids is not None and ids.numel():
            least, most = int(ids.min()), int(ids.max())
            if least < -1 or most >= count:
                raise ValueError(
                    f"Expected sample_ids from -1 (none) to {count - 1}, one less than the number of losses, got "
                    f"{least} to {most}."
                )

    def _key(self, use: Use) -> tuple[str, str, int]:
        """What the self-check vouches for: one layer, read in one way, with the model in one mode."""
        return use.owner.name, use.layout.reading, self._modes
