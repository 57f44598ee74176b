"""The order of one step, and all lasting state."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim._capture import Capture, plan, uncovered, verify_projection
from ftw_optim._factors import Factors, weighted_sum
from ftw_optim._filters import FilterStage, GreedyFilter
from ftw_optim._gram import METRICS, products
from ftw_optim._layers.coverage import Coverage, Owner, coverage, owners
from ftw_optim._matching import Selection
from ftw_optim._preconditioners.registry import Preconditioners, preconditioner_rule
from ftw_optim._selection import NORMALIZATIONS, metrics_of, select
from ftw_optim._target import TargetGradient
from ftw_optim._weights import NonNegativeLeastSquares, WeightStage
from ftw_optim._wrapper import OptimizerWrapper

UPDATES = ("auto", "factors", "graph", "rerun")

Scored = Callable[[str, nn.Parameter], bool]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Members:
    """The optimizer's parameters that require a gradient, by their names in the model."""

    parameters: Mapping[str, nn.Parameter]
    groups: Mapping[str, dict[str, Any]]
    scored: Mapping[str, nn.Parameter]
    all_trained: bool
    """No other parameter of the model requires a gradient."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """What one backward found; nothing is applied yet."""

    loss: Tensor
    selection: Selection
    gradients: Mapping[str, Tensor]
    members: _Members
    target: Mapping[str, Tensor] | None
    uses: Mapping[str, int]
    multiplications: Mapping[str, int]


@final
class SelectiveOptimizer(OptimizerWrapper):
    r"""Wraps an optimizer so that each step applies only the candidates that its target asks for.

    At every step a closure gives the candidates' losses. Their gradients ``g_i`` are captured in factorized form, the
    preconditioner ``P`` is read from the inner optimizer's state, and weights ``w >= 0`` on at most ``k`` candidates
    are fitted so that ``sum_i w_i g_i`` makes the update that the target gradient would make: minimal
    ``w @ gram @ w / 2 - cross_gram @ w`` with ``gram[i, j] = <g_i, P g_j>`` and ``cross_gram[i] = <g_i, P target>``.

    Args:
        optimizer: the inner optimizer; all of its parameters must be the model's.
        model: the module that the closures call.
        target: a closure that returns the target examples' losses, shape ``(m,)``, or a :class:`TargetGradient`.
        filter: which candidates are kept.
        weight: how much each of the kept counts.
        metric: ``"preconditioned"`` (``<g_i, P g_j>``), ``"update"`` (``<P g_i, P g_j>``) or ``"euclidean"``.
        update: where the combined gradient comes from: ``"factors"`` (the captured factors), ``"graph"`` (a weighted
            backward over the same graph), ``"rerun"`` (the kept candidates once more, ``closure(rows=kept)``) or
            ``"auto"``: factors where every updated parameter has a layer rule, else graph.
        scored: predicate ``(name, parameter)`` of what counts in the Gram matrix, such as ``last_blocks(model, 1)``;
            None: all that is updated.
        gram: ``"exact"``.
        memory_limit: bytes of multiplied-out per-candidate gradients that may exist at a time; None: 256 MiB.
        self_check: compare the captured gradients with autograd's at the first backward, and whenever a layer is read
            in a new way.
        seed: of the target's random state, and of stages that draw.

    Raises:
        ValueError: an option is not one of those above, or a group parameter is not the model's.
        NotImplementedError: no preconditioner is known for the inner optimizer.

    Source: Wang et al. (2026), arXiv 2604.00001.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        target: Callable[[], Tensor] | TargetGradient,
        *,
        filter: FilterStage | None = None,
        weight: WeightStage | None = None,
        metric: str = "preconditioned",
        update: str = "auto",
        scored: Scored | None = None,
        gram: str = "exact",
        memory_limit: int | None = None,
        self_check: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected the model as an nn.Module, got {type(model).__name__}.")
        preconditioner_rule(optimizer)
        for name, value, known in (
            ("metric", metric, METRICS),
            ("update", update, UPDATES),
            ("gram", gram, ("exact",)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit!r}.")
        super().__init__(optimizer)
        self.model = model
        self.filter = GreedyFilter(keep=0.25) if filter is None else filter
        self.weight = NonNegativeLeastSquares() if weight is None else weight
        if (normalize := getattr(self.weight, "normalize", "sum")) not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}.")
        for stage in (self.filter, self.weight):
            if not callable(stage) or not set(metrics_of(stage)) <= set(METRICS):
                raise ValueError(
                    f"Expected a callable stage whose metrics are some of {METRICS}, got {stage!r} with metrics "
                    f"{metrics_of(stage)!r}."
                )
        self.metric, self.update, self.scored = metric, update, scored
        self.gram, self.memory_limit, self.self_check, self.seed = gram, memory_limit, self_check, seed
        self.target = target
        self._selection: Selection | None = None
        self._kept_target: Mapping[str, Tensor] | None = None
        self._backwards = 0
        self._pending: bool | None = None  # since the last step: None no backward, False all skipped, True one applied
        self._checked: set[tuple[str, str]] = set()
        self._last_capture: tuple[frozenset[str], Mapping[str, int], Mapping[str, int]] | None = None
        self._warned_own_backward = False
        self._members()  # says now what a step would say

    # ------------------------------------------------------------------ what the user sees

    @property
    def target(self) -> TargetGradient:
        """The target; set it to a closure or a :class:`TargetGradient`."""
        target: TargetGradient | None = self.__dict__.get("_target")
        if target is None:
            raise RuntimeError(
                "The target is not part of a pickle or copy: set optimizer.target to a closure that returns the target "
                "losses, or to a TargetGradient, before the next step."
            )
        return target

    @target.setter
    def target(self, target: Callable[[], Tensor] | TargetGradient) -> None:
        self._target = target if isinstance(target, TargetGradient) else TargetGradient(target)

    @property
    def selection(self) -> Selection | None:
        """What the last backward chose; None before the first."""
        return self._selection

    @property
    def coverage(self) -> Coverage:
        """Which rule captures which parameter; after a backward also what was captured and at which cost."""
        table = coverage(self.model)
        if self._last_capture is None:
            return table
        scored, uses, multiplications = self._last_capture
        return table.after(scored.__contains__, uses, multiplications)

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Select among the closure's candidates and apply the inner optimizer's step to their combined gradient.

        Args:
            closure: returns the candidates' own losses, shape ``(n,)``; run once, with gradients enabled. What
                ``.grad`` held before is discarded. None, or a closure that returns None: the inner optimizer's step on
                whatever ``.grad`` holds, or nothing if every :meth:`backward` since the last step was skipped.

        Returns:
            The weighted loss, detached (weights summing to one; skipped: the mean of the finite losses; all rejected:
            NaN). Without a closure None.

        Raises:
            TypeError: the closure returned no tensor.
            ValueError: the losses are reduced, detached, empty or not one for each candidate; the target is not finite.
            NotImplementedError: a parameter to capture has no layer rule, or an input has no candidate axis.
            RuntimeError: a captured parameter was used outside its layers, or the self-check failed.
        """
        if closure is None:
            skipped, self._pending = self._pending is False, None
            if not skipped:
                self.optimizer.step()
            return None
        outcome = self._select(closure, scale=1.0, sample_ids=None, plain_allowed=True)
        self._pending = None
        if not isinstance(outcome, _Outcome):
            self.optimizer.step()
            return outcome
        for name, parameter in outcome.members.parameters.items():
            parameter.grad = outcome.gradients.get(name)
        self._commit(outcome)
        if not outcome.selection.skipped:
            self.optimizer.step()
        return outcome.loss

    def backward(
        self,
        closure: Callable[..., Any],
        *,
        grad_scale: float | Tensor = 1.0,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """The first half of a step: select, and add the combined gradient to ``.grad`` as ``loss.backward()`` does.

        Then clip, unscale, accumulate, and call :meth:`step` without a closure.

        Args:
            closure: returns the candidates' own losses, shape ``(n,)``; run once, with gradients enabled.
            grad_scale: multiplies the losses for the pass, and so ``.grad``: ``scaler.get_scale()``, over the number of
                accumulated calls.
            sample_ids: int64, the shape of the token grid: the candidate of each position, -1 for none, where rows are
                packed from several candidates.

        Returns:
            The weighted loss, as :meth:`step` does.

        Raises:
            As :meth:`step`; on any exception ``.grad`` is as before.
        """
        if not grad_scale > 0.0:
            raise ValueError(f"grad_scale must be positive, got {grad_scale!r}.")
        outcome = self._select(closure, scale=float(grad_scale), sample_ids=sample_ids, plain_allowed=False)
        assert isinstance(outcome, _Outcome)
        with torch.no_grad():
            for name, parameter in outcome.members.parameters.items():
                gradient = outcome.gradients.get(name)
                if gradient is None and outcome.selection.skipped and grad_scale != 1.0 and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # a GradScaler must find something to unscale
                elif gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._pending = bool(self._pending) or not outcome.selection.skipped
        self._commit(outcome)
        return outcome.loss

    # ------------------------------------------------------------------ one selection

    def _select(
        self, closure: Callable[..., Any], *, scale: float, sample_ids: Tensor | None, plain_allowed: bool
    ) -> _Outcome | Any:
        """One selection, applied to nothing; or the value of a closure after which the inner step is due."""
        members = self._members()
        found_owners = owners(self.model)
        update = self._update(members, found_owners)
        if update == "rerun" and not _takes_rows(closure):
            raise TypeError('update="rerun" needs a closure that accepts rows: closure(rows=kept) -> losses (k,).')
        captured = members.parameters if update == "factors" else members.scored
        plan_ = plan(self.model, captured, found_owners)
        target = self.target.gradients(
            members.scored, self._kept_target, calls=self._backwards, scale=scale, seed=self._seed("target")
        )
        before = _gradient_marks(members.parameters)
        with (
            torch.enable_grad(),
            Capture(self.model, plan_, attached=update == "graph", sample_ids=sample_ids) as capture,
        ):
            losses = closure()
            if plain_allowed and self._is_plain(losses, capture, members, before):
                return losses
            losses = _checked_losses(losses, capture.count)
            if sample_ids is not None and int(sample_ids.max()) >= len(losses):
                raise ValueError(
                    f"Expected sample_ids below the number of losses, {len(losses)}, got {int(sample_ids.max())}."
                )
            found = capture.differentiate(
                losses,
                scale=scale,
                keep_graph=update == "graph",
                checked=self._checked if self.self_check else None,
                generator=self._generator("check"),
            )
        values = losses.detach()
        finite = values.isfinite().cpu()
        accepted = finite & _finite_factors(found).cpu()
        overflow = scale > 1.0 and (target is None or bool((finite & ~accepted).any()))
        if not bool(accepted.all()):
            found = {name: [use.without(~accepted.to(use.left.device)) for use in uses] for name, uses in found.items()}
        selection = self._match(found, target or {}, members, values.cpu(), accepted, scale, overflow=overflow)
        gradients: Mapping[str, Tensor] = {}
        if overflow:
            gradients = {name: torch.full_like(members.parameters[name], torch.inf) for name in found}
        elif not selection.skipped:
            with torch.enable_grad():
                selection, gradients = self._combine(update, found, selection, losses, members, closure, scale=scale)
        return _Outcome(
            loss=_weighted_loss(values, selection),
            selection=selection,
            gradients=gradients,
            members=members,
            target=target if self.target.remembers else None,
            uses={name: len(uses) for name, uses in found.items()},
            multiplications={
                name: sum(use.multiplications() for use in uses)
                for name, uses in found.items()
                if name in members.scored
            },
        )

    def _match(
        self,
        found: Mapping[str, list[Factors]],
        target: Mapping[str, Tensor],
        members: _Members,
        losses: Tensor,
        accepted: Tensor,
        scale: float,
        *,
        overflow: bool,
    ) -> Selection:
        """Gram matrix, filter and weights."""
        preconditioners = Preconditioners(self.optimizer)
        scored = {} if overflow else {name: uses for name, uses in found.items() if name in members.scored}
        metrics = {self.metric, "preconditioned", *metrics_of(self.filter), *metrics_of(self.weight)}
        if not scored or not bool(accepted.any()):
            return _nothing(losses, accepted)
        return select(
            products(
                scored,
                target,
                lambda name, reference: preconditioners(members.scored[name], members.groups[name], reference),
                accepted,
                shapes={name: parameter.shape for name, parameter in members.scored.items()},
                metrics=[metric for metric in METRICS if metric in metrics],
                scale=scale,
                memory_limit=self.memory_limit,
            ),
            losses,
            accepted,
            metric=self.metric,
            filter_stage=self.filter,
            weight_stage=self.weight,
            generator=self._generator("stages"),
            learning_rate_is_zero=preconditioners.learning_rate_is_zero,
        )

    def _combine(
        self,
        update: str,
        found: Mapping[str, list[Factors]],
        selection: Selection,
        losses: Tensor,
        members: _Members,
        closure: Callable[..., Any],
        *,
        scale: float,
    ) -> tuple[Selection, Mapping[str, Tensor]]:
        """The weighted gradient of every updated parameter that was reached, times ``scale``."""
        weights = torch.zeros(len(losses), dtype=torch.float64)
        weights[selection.kept] = selection.weights
        if update == "graph" and len(selection.rejected):
            # 0 * NaN inside the layers: the common graph can no longer serve.
            if members.scored.keys() == members.parameters.keys():
                update = "factors"
            elif _takes_rows(closure):
                update = "rerun"
            else:
                return _skipped(selection), {}
        if update == "factors":
            gradients = {
                name: weighted_sum(uses, weights, members.parameters[name].shape).to(members.parameters[name].dtype)
                for name, uses in found.items()
            }
        elif update == "graph":
            with _fresh_gradients(self.model):
                total = (weights.to(losses) * losses).sum() * scale
                gradients = _ordinary_backward(total, members)
            verify_projection(
                found,
                {name: gradients[name] for name in members.scored if name in gradients},
                weights,
                self._generator("projection"),
            )
        else:
            again = _checked_losses(closure(rows=selection.kept), None)
            if len(again) != len(selection.kept):
                raise ValueError(
                    f"closure(rows=kept) must return the losses of these {len(selection.kept)} rows, got {len(again)}."
                )
            with _fresh_gradients(self.model):
                total = (selection.weights.to(again) * again).sum() * scale
                gradients = _ordinary_backward(total, members)
        return replace(selection, update=update), gradients

    def _members(self) -> _Members:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        parameters: dict[str, nn.Parameter] = {}
        groups: dict[str, dict[str, Any]] = {}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    raise ValueError(
                        f"Group {number} holds a parameter of shape {tuple(parameter.shape)} that is not the model's; "
                        "expected parameters of the model given to SelectiveOptimizer. Optimize the others apart."
                    )
                if parameter.requires_grad:
                    parameters[name], groups[name] = parameter, group
        scored = {
            name: parameter
            for name, parameter in parameters.items()
            if self.scored is None or self.scored(name, parameter)
        }
        if parameters and not scored:
            raise ValueError(
                f"scored={self.scored!r} accepts none of the {len(parameters)} parameters that are updated; expected "
                "at least one."
            )
        trained = sum(parameter.requires_grad for parameter in self.model.parameters())
        return _Members(parameters=parameters, groups=groups, scored=scored, all_trained=trained == len(parameters))

    def _update(self, members: _Members, found_owners: list[Owner]) -> str:
        if not members.parameters:
            raise ValueError("None of the optimizer's parameters requires a gradient; expected at least one.")
        if self.update != "auto":
            return self.update
        # With a rule for every updated parameter the factors cost less than a second backward, however few are scored.
        return "graph" if uncovered(found_owners, members.parameters, self.model) else "factors"

    def _is_plain(self, value: Any, capture: Capture, members: _Members, before: Mapping[str, tuple[int, int]]) -> bool:
        """Whether the closure only wants the inner optimizer's step: it returned None, or ran its own backward."""
        if value is None:
            return True
        if not (isinstance(value, float) or (isinstance(value, Tensor) and value.ndim == 0)):
            return False
        own = capture.own_backward_gradients()
        if not own and _gradient_marks(members.parameters) == before:
            return False
        for name, gradient in own.items():
            parameter = members.parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if not self._warned_own_backward:
            self._warned_own_backward = True
            warnings.warn(
                "The closure ran its own backward and returned a scalar, so nothing is selected: SelectiveOptimizer is "
                "its inner optimizer here. Return the candidates' losses, shape (n,), without a backward.",
                stacklevel=4,
            )
        return True

    # ------------------------------------------------------------------ lasting state

    def _commit(self, outcome: _Outcome) -> None:
        self._selection = outcome.selection
        self._kept_target = outcome.target
        self._last_capture = (frozenset(outcome.members.scored), outcome.uses, outcome.multiplications)
        self._backwards += 1

    def _seed(self, purpose: str) -> int:
        """A seed that depends on the step count alone, so that no random state needs saving."""
        return random.Random(f"{self.seed}/{self._backwards}/{purpose}").getrandbits(32)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose))

    def extra_state(self) -> dict[str, Any]:
        """Step count, seed and, where it must outlive a step, the target gradient."""
        extra: dict[str, Any] = {
            "backwards": torch.tensor(self._backwards),
            "seed": torch.tensor(self.seed),
        }
        if self._kept_target is not None:
            extra["target"] = dict(self._kept_target)
        return extra

    def read_extra_state(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """See :meth:`extra_state`."""
        if extra is not None and not {"backwards", "seed"} <= extra.keys():
            raise ValueError(
                f"Expected {self.EXTRA_KEY!r} of the state dict to hold 'backwards' and 'seed', got {sorted(extra)}. "
                "Remove the key to load the inner optimizer's state alone."
            )
        target = (extra or {}).get("target")
        devices = {name: parameter.device for name, parameter in self.model.named_parameters()}
        return {
            "_backwards": int(extra["backwards"]) if extra else 0,
            "seed": int(extra["seed"]) if extra else self.seed,
            "_kept_target": None
            if target is None
            else {name: gradient.to(devices.get(name, gradient.device)) for name, gradient in target.items()},
            "_pending": None,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_target"}


def _takes_rows(closure: Callable[..., Any]) -> bool:
    try:
        inspect.signature(closure).bind(rows=None)
    except (TypeError, ValueError):
        return False
    return True


def _checked_losses(losses: Any, count: int | None) -> Tensor:
    """The closure's losses, shape ``(n,)``."""
    wanted = "one loss for each candidate, shape (n,), such as token_losses(model, batch)"
    if not isinstance(losses, Tensor):
        raise TypeError(f"The closure must return {wanted}; got {type(losses).__name__}.")
    if losses.ndim != 1:
        hint = ' (reduction="none" and a mean over positions keep the candidates apart)' if losses.ndim == 0 else ""
        raise ValueError(f"The closure must return {wanted}{hint}; got shape {tuple(losses.shape)}.")
    if losses.numel() == 0:
        raise ValueError(f"The closure must return {wanted}; got an empty batch.")
    if not losses.requires_grad:
        raise ValueError(f"The closure must return {wanted}, with their graph; got losses that are detached.")
    if count is not None and count != len(losses):
        raise ValueError(
            f"The closure returned {len(losses)} losses, but the model ran on {count} rows; expected {wanted}."
        )
    return losses


def _finite_factors(found: Mapping[str, list[Factors]]) -> Tensor:
    """Which candidates have finite factors in every use of every parameter."""
    finite = [use.finite() for uses in found.values() for use in uses]
    return torch.stack([mask.to(finite[0].device) for mask in finite]).all(dim=0)


def _weighted_loss(losses: Tensor, selection: Selection) -> Tensor:
    """The kept losses under weights that sum to one; skipped: the mean of the finite ones; all rejected: NaN."""
    if not selection.skipped:
        share = (selection.weights / selection.weights.sum()).to(losses)
        return (share * losses[selection.kept.to(losses.device)]).sum()
    accepted = torch.ones(len(losses), dtype=torch.bool)
    accepted[selection.rejected] = False
    return losses[accepted.to(losses.device)].mean() if bool(accepted.any()) else losses.new_full((), torch.nan)


def _nothing(losses: Tensor, accepted: Tensor) -> Selection:
    """The outcome where there is nothing to match."""
    n = len(losses)
    return Selection(
        losses=losses,
        kept=torch.empty(0, dtype=torch.int64),
        weights=torch.empty(0, dtype=torch.float64),
        fitted_scale=0.0,
        gram=torch.zeros(n, n),
        cross_gram=torch.zeros(n),
        target_energy=0.0,
        cosine=0.0,
        residual=1.0,
        predicted_decrease=0.0,
        effective_size=0.0,
        rejected=(~accepted).nonzero()[:, 0],
        skipped=True,
        converged=True,
        update="skipped",
    )


def _skipped(selection: Selection) -> Selection:
    """A selection that cannot be applied."""
    return replace(
        selection,
        weights=torch.zeros_like(selection.weights),
        cosine=0.0,
        residual=1.0,
        predicted_decrease=0.0,
        effective_size=0.0,
        skipped=True,
    )


@contextmanager
def _fresh_gradients(model: nn.Module) -> Iterator[None]:
    """Set every ``.grad`` aside while the block runs, and put it back whatever happens."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def _ordinary_backward(total: Tensor, members: _Members) -> dict[str, Tensor]:
    """``total.backward()``, with what it left in ``.grad`` of the updated parameters."""
    # Named only where others would get a gradient too: a plain backward is what hooks and DDP expect.
    inputs = None if members.all_trained else list(members.parameters.values())
    torch.autograd.backward(total, inputs=inputs)
    return {name: parameter.grad for name, parameter in members.parameters.items() if parameter.grad is not None}


def _gradient_marks(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, int]]:
    """Tells whether a ``.grad`` was replaced or changed in between."""
    return {
        name: (id(parameter.grad), parameter.grad._version)
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }
