"""One forward and one backward pass over a model, to the factors of its parameters.

Every layer that owns a captured parameter is hooked. While it runs, a stand-in that shares the parameter's memory
takes its place (``attached=False``), so that the backward pass forms no weight gradient and a gradient that still
reaches the parameter itself betrays a use outside the layer. Its inputs and the gradient edge of its output are
kept; ``torch.autograd.grad`` then gives all output gradients at once, and never touches ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ftw_optim._checks import WAYS_OUT, refuse_uses_outside, verify_weighted_sums
from ftw_optim._factors import Factors, PositionMap, finite_candidates
from ftw_optim._layers.coverage import Covered, Owner, owners, table
from ftw_optim._layers.registry import LayerRule


@final
@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """What is captured: parameters by name, and the layers that own them."""

    parameters: Mapping[str, nn.Parameter]
    owners: tuple[Owner, ...]


def uncovered(model_owners: Iterable[Owner], names: Iterable[str], model: nn.Module) -> list[Covered]:
    """Those of the named parameters that no rule captures."""
    wanted = set(names)
    rows = table(list(model_owners), dict(model.named_parameters()))
    return [row for row in rows if row.name in wanted and row.rule is None]


def plan(model: nn.Module, names: Iterable[str], model_owners: list[Owner] | None = None) -> CapturePlan:
    """The plan that captures the named parameters.

    Raises:
        NotImplementedError: a parameter that no rule captures.
    """
    names = set(names)
    found = owners(model) if model_owners is None else model_owners
    missing = uncovered(found, names, model)
    if missing:
        listed = "; ".join(f"{row.name}: {row.reason or 'no layer owns it'}" for row in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise NotImplementedError(
            f"Expected a layer rule for every parameter to capture, but there is none for {listed}{more}. {WAYS_OUT}"
        )
    kept = []
    for owner in found:
        own = {local: name for local, name in owner.parameters.items() if name in names}
        if own:
            kept.append(replace(owner, parameters=own))
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    return CapturePlan(parameters=parameters, owners=tuple(kept))


@final
@dataclass(kw_only=True, eq=False)
class _Use:
    """One call of a captured layer."""

    owner: Owner
    inputs: tuple[Any, ...]
    versions: tuple[int | None, ...]
    edge: GradientEdge
    shape: torch.Size
    stand_ins: dict[str, Tensor]
    reading: str
    """Which axis of the inputs was read as the candidate's."""


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
        self._sample_ids = sample_ids
        self._grid: torch.Size | None = None
        self._uses: list[_Use] = []
        self._standing: dict[nn.Module, list[dict[str, nn.Parameter | None]]] = {}
        self._handles: list[RemovableHandle] = []
        self._recording = False
        self._modes = hash(tuple(module.training for module in model.modules()))
        self._without_grad: set[str] = set()
        self._computed_in: set[torch.dtype] = set()

    def __enter__(self) -> Capture:
        self._recording = True
        self._handles.append(self._model.register_forward_pre_hook(self._read_grid, with_kwargs=True))
        for owner in self._plan.owners:
            before, after = self._hooks(owner)
            self._handles.append(owner.module.register_forward_pre_hook(before))
            # First of the forward hooks: it must see the output before any other hook changes it.
            self._handles.append(
                owner.module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recording = False
        for handle in self._handles:
            handle.remove()
        for module in list(self._standing):
            while self._standing.get(module):
                self._restore(module)
        self._uses.clear()  # frees the graph and the factors

    @property
    def count(self) -> int | None:
        """The number of candidates the model saw; None where only ``sample_ids`` or the losses tell."""
        return None if self._grid is None or self._sample_ids is not None else self._grid[0]

    @property
    def computed_in(self) -> set[torch.dtype]:
        """The dtypes that the captured layers computed in."""
        return self._computed_in

    def own_backward_gradients(self) -> dict[str, Tensor]:
        """What a closure that ran its own backward left at the stand-ins, by parameter name."""
        found: dict[str, Tensor] = {}
        for use in self._uses:
            for local, stand_in in use.stand_ins.items():
                if stand_in.grad is not None:
                    name = use.owner.parameters[local]
                    found[name] = found[name] + stand_in.grad if name in found else stand_in.grad
        return found

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
            RuntimeError: nothing was captured, an input was changed in place after its layer had read it, a captured
                parameter was used outside its layer, or the self-check failed.
        """
        self._recording = False
        if self._sample_ids is not None and self._sample_ids.numel():
            least, most = int(self._sample_ids.min()), int(self._sample_ids.max())
            if least < -1 or most >= len(losses):
                raise ValueError(
                    f"Expected sample_ids from -1 (none) to {len(losses) - 1}, one less than the number of losses, got "
                    f"{least} to {most}."
                )
        finite = losses.isfinite()
        total = torch.where(finite, losses, torch.zeros_like(losses)).sum() * scale
        self._refuse_reentrant_checkpointing(losses)
        due = checked is not None and any(self._key(use) not in checked for use in self._uses)
        edges: list[Any] = [use.edge for use in self._uses]
        outside: dict[str, Any] = {} if self._attached else dict(self._plan.parameters)
        gradients: tuple[Tensor | None, ...] = ()
        if edges or outside:
            gradients = torch.autograd.grad(
                total, [*edges, *outside.values()], allow_unused=True, retain_graph=keep_graph or due
            )
        beside = zip(outside, gradients[len(edges) :], strict=True)
        refuse_uses_outside([name for name, gradient in beside if gradient is not None])
        found: dict[str, list[Factors]] = {}
        for use, gradient in zip(self._uses, gradients, strict=False):
            if gradient is None:
                continue
            for name, factors in self._factors(use, gradient.reshape(use.shape), len(losses)).items():
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
                "with the model that was given to SelectiveOptimizer, with its layers called as modules; compiled "
                "models are not supported yet."
            )
        # Of what is not finite nothing can be compared: then the check waits for the next step.
        if due and bool(finite_candidates(found, losses).all()):
            assert checked is not None
            sources, layers = self._sources()
            verify_weighted_sums(
                losses * scale,
                found,
                sources,
                layers,
                keep_graph=keep_graph,
                generator=generator,
                computed_in=self._computed_in,
            )
            checked.update(map(self._key, self._uses))
        return found

    # ------------------------------------------------------------------ while the closure runs

    def _read_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._recording or not torch.is_grad_enabled():
            return
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.ndim > 0:
                grid = leaf.shape[:2]
                if self._grid is not None and grid[0] != self._grid[0]:
                    raise ValueError(
                        f"The closure called the model on {self._grid[0]} and then on {grid[0]} rows; expected all "
                        "candidates in one call, or each call over all of them."
                    )
                self._grid = grid
                return

    def _hooks(self, owner: Owner) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._attached:
                stand_ins = {
                    local: own.detach().requires_grad_()
                    for local in owner.parameters
                    if (own := module._parameters[local]) is not None
                }
                self._standing.setdefault(module, []).append({local: module._parameters[local] for local in stand_ins})
                module._parameters.update(stand_ins)  # type: ignore[arg-type]

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            stand_ins = self._restore(module)
            if not self._recording or output is None:
                return None
            if not torch.is_grad_enabled():
                self._without_grad.add(owner.name)
                return None
            return self._record(owner, (*args, *kwargs.values()), output, stand_ins)

        return before, after

    def _restore(self, module: nn.Module) -> dict[str, Tensor]:
        """Put the parameters back; returns the stand-ins."""
        if not self._standing.get(module):
            return {}
        parameters = self._standing[module].pop()
        stand_ins = {local: module._parameters[local] for local in parameters}
        module._parameters.update(parameters)
        return {local: tensor for local, tensor in stand_ins.items() if tensor is not None}

    def _record(
        self, owner: Owner, inputs: tuple[Any, ...], output: Any, stand_ins: dict[str, Tensor]
    ) -> Tensor | None:
        if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
            raise NotImplementedError(
                f"Expected layer {owner.name!r} to take a tensor first and return one, got "
                f"{[type(value).__name__ for value in inputs]} to {type(output).__name__}. {WAYS_OUT}"
            )
        if not output.requires_grad:
            return None
        reading, rows = self._reading(owner, inputs[0])
        changed = None
        detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)
        if rows is not None:  # autograd sums over rows before a gradient arrives, unless they are made here
            missing = reading != "one row for all"
            wide = (output[None] if missing else output).expand(rows, *output.shape[not missing :])
            output = changed = wide.clone()  # of its own memory: the model may go on in place
            first = detached[0][None] if missing else detached[0]
            detached = (first.expand(rows, *first.shape[1:]), *detached[1:])
        edge, copied = _edge(output)
        changed = copied if changed is None else changed
        device = output.device.type
        self._computed_in.add(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype)
        self._uses.append(
            _Use(
                owner=owner,
                inputs=detached,
                versions=tuple(_version(value) for value in detached),
                edge=edge,
                shape=output.shape,
                stand_ins=stand_ins,
                reading=reading,
            )
        )
        return changed

    def _reading(self, owner: Owner, x: Tensor) -> tuple[str, int | None]:
        """Which axis of ``x`` is the candidate's, and how many rows to expand it to, if it has none."""
        if self._sample_ids is not None:
            if x.shape[:2] != self._sample_ids.shape:
                self._refuse_layout(owner, x, f"the grid of sample_ids, {tuple(self._sample_ids.shape)}, first")
            return "sample_ids", None
        if self._grid is None:  # the closure calls a part of the model: the losses will tell
            return "rows", None
        n, positions = self._grid[0], self._grid[1] if len(self._grid) > 1 else None
        index = not x.is_floating_point()
        if x.ndim == 0:
            self._refuse_layout(owner, x, f"the {n} candidates first")
        if index and x.ndim == 1 and x.shape[0] == positions:
            return "positions", n
        if x.ndim > 1 or index:
            if x.shape[0] == n:
                return "rows", None
            if x.shape[0] == 1 and x.ndim > 1:
                return "one row for all", n
        self._refuse_layout(owner, x, f"the {n} candidates (or 1, for all of them) first")
        return None

    @staticmethod
    def _refuse_layout(owner: Owner, x: Tensor, expected: str) -> NoReturn:
        raise NotImplementedError(
            f"Expected layer {owner.name!r} to take inputs with {expected}, got shape {tuple(x.shape)}: which "
            f"candidate a position belongs to is not known. {WAYS_OUT}"
        )

    # ------------------------------------------------------------------ after the backward pass

    def _factors(self, use: _Use, output_grad: Tensor, count: int) -> dict[str, Factors]:
        if use.versions != tuple(_version(value) for value in use.inputs):
            raise RuntimeError(
                f"An input of layer {use.owner.name!r} was changed in place after the layer had read it, so its "
                "gradient can no longer be formed. Use the out-of-place form of that operation."
            )
        rule = use.owner.rule
        assert isinstance(rule, LayerRule)
        with torch.no_grad():
            returned = rule.function(use.owner.module, use.inputs, output_grad)
        found = {}
        for local, name in use.owner.parameters.items():
            value = returned.get(local)
            if value is None:
                raise RuntimeError(
                    f"The rule {rule.name!r} returned no gradient for {local!r} of layer {use.owner.name!r}; expected "
                    "one for each of its trainable parameters."
                )
            factors = _explicit(value, self._plan.parameters[name]) if isinstance(value, Tensor) else value
            if factors.rows * factors.columns != self._plan.parameters[name].numel():
                raise RuntimeError(
                    f"The rule {rule.name!r} returned gradients of {factors.rows} x {factors.columns} entries for "
                    f"{name}, expected its shape {tuple(self._plan.parameters[name].shape)}."
                )
            if self._sample_ids is not None:
                if isinstance(value, Tensor):
                    self._refuse_layout(use.owner, value, "positions that sample_ids can tell apart")
                grid = PositionMap(candidates=self._sample_ids.to(value.left.device), count=count)
                times = value.left.shape[1] // max(1, self._sample_ids.shape[1])
                factors = replace(factors, positions=grid.repeated(times))
            if factors.count != count:
                raise ValueError(
                    f"The closure returned {count} losses, but layer {use.owner.name!r} ran on {factors.count} rows. "
                    "Expected one loss for each row of the model's input; call the model itself (not a part of it), "
                    "on all candidates at once."
                )
            found[name] = factors
        return found

    def _key(self, use: _Use) -> tuple[str, str, int]:
        """What the self-check vouches for: one layer, read in one way, with the model in one mode."""
        return use.owner.name, use.reading, self._modes

    def _refuse_reentrant_checkpointing(self, losses: Tensor) -> None:
        """Its first pass runs without gradients, so the layers in it leave nothing to capture."""
        if self._without_grad and "CheckpointFunctionBackward" in _node_names(losses):
            raise NotImplementedError(
                f"Layers such as {sorted(self._without_grad)[0]!r} ran inside reentrant gradient checkpointing, which "
                "hides them. Use use_reentrant=False (gradient_checkpointing_kwargs in Transformers)."
            )

    def _sources(self) -> tuple[dict[str, list[Tensor]], dict[str, list[str]]]:
        """The tensors of the graph that stand for each parameter, and the layers they were used in."""
        sources: dict[str, list[Tensor]] = {name: [] for name in self._plan.parameters}
        layers: dict[str, list[str]] = {name: [] for name in self._plan.parameters}
        for use in self._uses:
            for local, name in use.owner.parameters.items():
                layers[name].append(use.owner.name)
                sources[name] += [] if self._attached else [use.stand_ins[local]]
        if self._attached:
            sources = {name: [parameter] for name, parameter in self._plan.parameters.items()}
        return sources, layers


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _edge(output: Tensor) -> tuple[GradientEdge, Tensor | None]:
    """The gradient edge of a layer's output, and a copy that must take its place if no edge of itself would last.

    An operation in place on a view moves the view's edge out of the graph. A Linear layer's output is one: all of the
    matrix product below it, whose own edge stays.
    """
    base = output._base
    if base is None:
        return get_gradient_edge(output), None
    whole = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    below = None if output.grad_fn is None else output.grad_fn.next_functions
    if whole and below and base.grad_fn is not None and below[0][0] is base.grad_fn:
        return get_gradient_edge(base), None
    copied = output.clone()
    return get_gradient_edge(copied), copied


def _explicit(gradients: Tensor, parameter: Tensor) -> Factors:
    """Candidates' gradients ``(n, *shape)`` as factors of as many rows and columns as other rules give."""
    n = len(gradients)
    if parameter.ndim < 2 or gradients[0].numel() != parameter.numel():
        return Factors(left=gradients.reshape(n, 1, -1))
    rows = parameter.shape[0]
    index = torch.arange(rows, device=gradients.device).expand(n, rows)
    return Factors(left=index, right=gradients.reshape(n, rows, -1), rows=rows)


def _node_names(losses: Tensor) -> set[str]:
    """The kinds of all nodes in the graph of the losses."""
    names: set[str] = set()
    seen, waiting = set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [below for below, _ in node.next_functions]
    return names
