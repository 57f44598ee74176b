"""The order of one step, and all lasting state."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim._capture.coverage import Coverage, coverage
from ftw_optim._capture.owners import Owner, owners
from ftw_optim._capture.plan import plan, uncovered
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._factors.micro_batches import Footprint
from ftw_optim._gram.blocks import Buffer
from ftw_optim._gram.sketch import Sketch
from ftw_optim._gram.ways import Observe
from ftw_optim._matching.filters import FilterStage, GreedyFilter
from ftw_optim._matching.problem import Selection
from ftw_optim._matching.weights import NonNegativeLeastSquares, WeightStage
from ftw_optim._preconditioners.registry import registered_rule
from ftw_optim._step.candidates import Pass, Plain
from ftw_optim._step.checkpoint import read_state, written_state
from ftw_optim._step.clock import Clock
from ftw_optim._step.closures import gradient_marks, is_scalar, released_first, takes_rows
from ftw_optim._step.decision import Decision
from ftw_optim._step.options import check_options, refuse_more_than_one_process
from ftw_optim._step.parameters import Members, Scored, members_of
from ftw_optim._step.target import TargetGradient
from ftw_optim._step.wrapper import OptimizerWrapper


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """What one backward found; nothing is applied yet."""

    loss: Tensor
    selection: Selection
    gradients: Mapping[str, Tensor]
    members: Members
    target: Mapping[str, Tensor] | None
    footprints: Mapping[str, Footprint]


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
        gram: ``"exact"``, or a :class:`Sketch` that estimates the Gram matrix where that is out of reach.
        memory_limit: bytes of multiplied-out per-candidate gradients that may exist at a time, kept from step to step;
            None: 256 MiB.
        self_check: compare the captured gradients with autograd's at the first backward, and whenever a layer is read
            in a new way.
        seed: of the target's random state, and of stages that draw.

    Raises:
        ValueError: an option is not one of those above, or a group parameter is not the model's.
        NotImplementedError: no preconditioner is known for the inner optimizer.

    Source: Wang et al. (2026), arXiv 2604.00001.
    """

    _observe: Observe | None = None
    """Told of what is added to the Gram matrix, while :func:`ftw_optim.testing.recorded` is entered."""

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
        gram: str | Sketch = "exact",
        memory_limit: int | None = None,
        self_check: bool = True,
        seed: int = 0,
    ) -> None:
        filter = GreedyFilter(keep=0.25) if filter is None else filter
        weight = NonNegativeLeastSquares() if weight is None else weight
        check_options(optimizer, model, (filter, weight), metric, update, gram, memory_limit)
        registered = registered_rule(optimizer)
        super().__init__(optimizer)
        self.model, self.filter, self.weight = model, filter, weight
        self.metric, self.update, self.scored = metric, update, scored
        self.gram, self.memory_limit, self.self_check, self.seed = gram, memory_limit, self_check, seed
        self.target = target
        self._selection: Selection | None = None
        self._kept_target: Mapping[str, Tensor] | None = None
        self._backwards = 0
        self._pending: bool | None = None  # since the last step: None no backward, False all skipped, True one applied
        self._checks = SelfChecks()
        self._buffer = Buffer()
        self._last_capture: tuple[frozenset[str], Mapping[str, int], Mapping[str, int], Mapping[str, int]] | None = None
        self._warned_own_backward = False
        members_of(self.model, self.param_groups, self.scored)  # says now what a step would say
        if registered is not None and registered.note is not None:
            warnings.warn(f"{type(optimizer).__name__}: {registered.note}", stacklevel=2)

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
        new = target if isinstance(target, TargetGradient) else TargetGradient(target)
        if "_target" in self.__dict__:  # not where a copy or checkpoint brought the gradient along
            self._kept_target = None
        self._target = new

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
        scored, uses, multiplications, sizes = self._last_capture
        return table.after(scored.__contains__, uses, multiplications, sizes)

    def step(self, closure: Callable[..., Any] | None = None, *, select: bool = True) -> Any:
        """Select among the closure's candidates and apply the inner optimizer's step to their combined gradient.

        Args:
            closure: returns the candidates' own losses, shape ``(n,)``, or an iterator of such tensors, one for each
                micro-batch (a generator function will do); run once, with gradients enabled. What ``.grad`` held
                before is discarded. None, or a closure that returns None: the inner optimizer's step on whatever
                ``.grad`` holds, or nothing if every :meth:`backward` since the last step was skipped.
            select: False: a closure is only run, and then it is as if there had been none. For frameworks that pass one
                of their own to the second half of a step, as Lightning does; without this, the target is evaluated
                before the closure turns out to have no candidates.

        Returns:
            The weighted loss, detached (weights summing to one; skipped: the mean of the finite losses; all rejected:
            NaN). Without a closure None; without selecting whatever it returned.

        Raises:
            TypeError: the closure returned no tensor.
            ValueError: the losses are reduced, detached, empty or not one for each candidate; the target is not finite.
            NotImplementedError: a parameter to capture has no layer rule, or an input has no candidate axis.
            RuntimeError: a captured parameter was used outside its layers, or the self-check failed.
        """
        if closure is None:
            self._plain_step()
            return None
        if not select:
            with torch.enable_grad():
                value = closure()
            self._plain_step()
            return value
        if torch.compiler.is_compiling():
            return torch._dynamo.disable(self._selective_step)(closure)  # type: ignore[no-untyped-call]
        return self._selective_step(closure)

    def _plain_step(self) -> None:
        skipped, self._pending = self._pending is False, None
        if not skipped:
            self.optimizer.step()

    def _selective_step(self, closure: Callable[..., Any]) -> Any:
        outcome = self._select(closure, scale=1.0, sample_ids=None, plain_allowed=True)
        if not isinstance(outcome, _Outcome):
            self._pending = self._pending if outcome is None else None  # it ran a backward of its own
            self._plain_step()
            return outcome
        self._pending = None
        # Frozen ones too: what they hold from before they were would still move them.
        held = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        before = dict(self.__dict__)
        try:
            for parameter, _ in held:
                parameter.grad = None
            for name, gradient in outcome.gradients.items():
                outcome.members.parameters[name].grad = gradient
            self._commit(outcome)
            if not outcome.selection.skipped:
                self.optimizer.step()
        except BaseException:
            self.__dict__.update(before)
            for parameter, gradient in held:
                parameter.grad = gradient
            raise
        return outcome.loss

    def backward(
        self,
        closure: Callable[..., Any],
        *,
        grad_scale: float | Tensor = 1.0,
        sample_ids: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The first half of a step: select, and add the combined gradient to ``.grad`` as ``loss.backward()`` does.

        Then clip, unscale, accumulate, and call :meth:`step` without a closure.

        Args:
            closure: returns the candidates' own losses, shape ``(n,)``, or an iterator of such tensors; run once, with
                gradients enabled.
            grad_scale: multiplies the losses for the pass, and so ``.grad``: ``scaler.get_scale()``, over the number of
                accumulated calls.
            sample_ids: int64, the shape of the token grid: the candidate of each position, -1 for none, where rows are
                packed from several candidates. Where the closure yields micro-batches, a list of one for each, with
                numbers that start at 0 in each.

        Returns:
            The weighted loss, as :meth:`step` does.

        Raises:
            As :meth:`step`; on any exception ``.grad`` is as before.
        """
        if "optimizer" not in self.__dict__:
            raise RuntimeError(
                f"Expected backward to be called on the SelectiveOptimizer, got {type(self).__name__}, a stand-in that "
                "would keep half of its state to itself. In Lightning: self.optimizers(use_pl_optimizer=False)."
            )
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the inner optimizer does; a backward before it no longer counts."""
        super().zero_grad(set_to_none)
        self._pending = None

    # ------------------------------------------------------------------ one selection

    def _select(
        self,
        closure: Callable[..., Any],
        *,
        scale: float,
        sample_ids: Tensor | Sequence[Tensor] | None,
        plain_allowed: bool,
    ) -> _Outcome | Any:
        """One selection, applied to nothing; or the value of a closure after which the inner step is due."""
        refuse_more_than_one_process()
        members = members_of(self.model, self.param_groups, self.scored)
        layers = owners(self.model)
        update = self._update(members, layers)
        if update == "rerun" and not takes_rows(closure):
            raise TypeError('update="rerun" needs a closure that accepts rows: closure(rows=kept) -> losses (k,).')
        what = plan(self.model, members.parameters if update == "factors" else members.scored, layers)
        clock = Clock()
        with clock.phase("target"):
            target = self.target.gradients(
                members.scored,
                self._kept_target,
                self.model,
                calls=self._backwards,
                scale=scale,
                seed=self._seed("target"),
            )
        marks = gradient_marks(members.parameters)
        candidates = Pass(
            model=self.model,
            plan=what,
            sample_ids=sample_ids,
            scale=scale,
            keep_graph=update == "graph",  # whose second backward may run checkpointed layers again
            one_batch=update == "rerun" and not isinstance(self.gram, Sketch),
            checks=self._checks if self.self_check else None,
            generator=self._generator("check"),
        )
        decision = Decision(
            optimizer=self.optimizer,
            model=self.model,
            members=members,
            filter=self.filter,
            weight=self.weight,
            metric=self.metric,
            gram=self.gram if isinstance(self.gram, Sketch) else None,
            memory_limit=self.memory_limit,
            buffer=self._buffer,
            scale=scale,
            generator=self._generator,
            clock=clock,
            observe=self._observe,
        )

        def is_plain(value: Any) -> bool:
            return plain_allowed and self._is_plain(value, members, marks)

        if update == "rerun" and sample_ids is None:  # which would not fit the rows of a second pass
            made = decision.streamed(candidates, target, closure, is_plain)
            if isinstance(made, Plain):
                return made.value
        else:
            with ExitStack() as captured:
                with clock.phase("candidates"):
                    passed = candidates.over(closure, is_plain, captured)
                if isinstance(passed, Plain):
                    return passed.value
                made = decision.made(update, passed, target, released_first(closure, captured))
        return _Outcome(
            loss=made.selection.weighted_loss().to(made.candidates.losses.device),
            selection=replace(made.selection, milliseconds=clock.milliseconds),
            gradients=made.gradients,
            members=members,
            # The average of target gradients survives one that overflowed.
            target=(self._kept_target if made.overflowed else target.gradients) if self.target.remembers else None,
            footprints=made.candidates.footprints,
        )

    def _update(self, members: Members, layers: list[Owner]) -> str:
        """The way of this step."""
        if self.update != "auto":
            return self.update
        # With a rule for every updated parameter the factors cost less than a second backward, however few are scored;
        # to run modules again for parameters that are not scored costs more.
        again = {name for owner in layers if owner.rule is None for name in owner.parameters.values()}
        costly = again & (members.parameters.keys() - members.scored.keys())
        return "graph" if costly or uncovered(layers, members.parameters, self.model) else "factors"

    def _is_plain(self, value: Any, members: Members, before: Mapping[str, tuple[int, int]]) -> bool:
        """Whether the closure only wants the inner optimizer's step: it returned None, or ran its own backward."""
        ran_backward = gradient_marks(members.parameters) != before
        if value is not None and not (is_scalar(value) and ran_backward):
            return False
        if value is not None and not self._warned_own_backward:
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
        scored = frozenset(outcome.members.scored)
        taken = outcome.footprints
        self._last_capture = (
            scored,
            {name: one.uses for name, one in taken.items()},
            {name: one.multiplications if name in scored else 0 for name, one in taken.items()},
            {name: one.bytes for name, one in taken.items()},
        )
        self._backwards += 1

    def _seed(self, purpose: str) -> int:
        """A seed that depends on the step count alone, so that no random state needs saving."""
        return random.Random(f"{self.seed}/{self._backwards}/{purpose}").getrandbits(32)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose))

    def extra_state(self) -> dict[str, Any]:
        """Step count, seed and, where it must outlive a step, the target gradient."""
        return written_state(self._backwards, self.seed, self._kept_target)

    def read_extra_state(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """See :meth:`extra_state`."""
        backwards, seed, target = read_state(extra, self.EXTRA_KEY, self.model, seed=self.seed)
        return {"_backwards": backwards, "seed": seed, "_kept_target": target, "_pending": None}

    def __getstate__(self) -> dict[str, Any]:
        left_behind = {"_target", "_observe"}
        return {name: value for name, value in super().__getstate__().items() if name not in left_behind}
