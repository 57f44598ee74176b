"""The optimizer that users hold: its options, its two ways to make a step, and its state between steps."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftw_optim._capture.coverage import Coverage, table
from ftw_optim._capture.plan import plan
from ftw_optim._capture.sample_ids import GivenIds
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._capture.structure import KnownStructure, Structure
from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.micro_batches import Footprint
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import Sketch
from ftw_optim._gram.spec import DEFAULT_MEMORY_LIMIT, Observe
from ftw_optim._matching.filters import FilterStage, GreedyFilter
from ftw_optim._matching.selection import Selection
from ftw_optim._matching.weights import NonNegativeLeastSquares, WeightStage
from ftw_optim._preconditioners.registry import registered_rule
from ftw_optim._ranks.known import KnownRanks
from ftw_optim._ranks.ranks import Ranks
from ftw_optim._step.checkpoint import read_state, written_state
from ftw_optim._step.clock import Clock
from ftw_optim._step.closures import CandidateClosure
from ftw_optim._step.options import check_options, check_target
from ftw_optim._step.parameters import Scored, parameters_of
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.step import StepResult, selective_step
from ftw_optim._step.target import TargetGradient
from ftw_optim._step.watch import Watch
from ftw_optim._step.way import way_of
from ftw_optim._step.wrapper import OptimizerWrapper

OF_RANK = frozenset({"target", "rows", "held out", "check"})
"""Purposes for which each of several processes draws random numbers of its own."""


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
        filter: the filter stage, which chooses the kept candidates; None: :class:`GreedyFilter` with ``keep=0.25``.
        weight: the weight stage, which gives each kept candidate its weight; None: :class:`NonNegativeLeastSquares`.
        metric: ``"preconditioned"`` (``<g_i, P g_j>``), ``"update"`` (``<P g_i, P g_j>``) or ``"euclidean"``.
        train_on_target: whether the target rows take part in the step: they run as candidates do, are always kept, and
            are weighed together with the others, each by what the *other* target rows ask for; with
            ``TargetGradient(until=)`` only once they guide no more. False: they only guide. A closure of further rows'
            losses, shape ``(m,)``: these rows take part, and the target only guides.
        combine: where the combined gradient comes from: ``"factors"`` (the captured factors), ``"graph"`` (a weighted
            backward over the same graph), ``"rerun"`` (the kept candidates once more, ``closure(rows=kept)``) or
            ``"auto"``: factors where every updated parameter has a layer rule, else graph.
        scored: predicate ``(name, parameter)`` for the parameters that count in the Gram matrix, such as
            ``last_blocks(model, 1)``; None: all that are updated.
        gram: ``"exact"``, or a :class:`Sketch` that estimates the Gram matrix where the exact one costs too much.
        memory_limit: bytes of multiplied-out per-candidate gradients that may exist at a time, kept from step to step;
            None: 256 MiB. Those that take less than half of their factors exist beside it.
        self_check: when the captured gradients are compared with autograd's, which costs a backward pass: ``"first"``:
            at the first backward, and whenever a layer is read in a new way or the losses are computed in a new one; a
            number ``N``: also at every ``N``-th selection; True: at every selection; False: never.
        seed: seed of the target's random state, of sketches and checks, and of stages that draw.
        ranks: the processes whose candidates are one selection: a ``ProcessGroup``, or a ``DeviceMesh`` of one
            dimension; None: all of the run. Each gives its own candidates and its own target examples; the target is
            the mean over all of these. All of them get the same selection, and the same combined gradient.
        among: number of neighbouring ranks whose candidates are compared with each other. Each group of so many makes
            a choice of its own towards the same target, and their mean is applied. None: all ranks, or, with a warning,
            as many as have 2,048 candidates together.

    Raises:
        ValueError: an option is not one of those above, or a group parameter is not the model's.
        NotImplementedError: no preconditioner is known for the inner optimizer.

    Source: Wang et al. (2026), arXiv 2604.00001.
    """

    _observe: Observe | None = None
    """A function called with all that is added to the Gram matrix, while in :func:`ftw_optim.testing.recorded`."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        target: Callable[[], Tensor] | TargetGradient,
        *,
        filter: FilterStage | None = None,
        weight: WeightStage | None = None,
        metric: str = "preconditioned",
        train_on_target: bool | Callable[[], Tensor] = False,
        combine: str = "auto",
        scored: Scored | None = None,
        gram: str | Sketch = "exact",
        memory_limit: int | None = None,
        self_check: bool | int | str = 100,
        seed: int = 0,
        ranks: Any = None,
        among: int | None = None,
    ) -> None:
        filter = GreedyFilter(keep=0.25) if filter is None else filter
        weight = NonNegativeLeastSquares() if weight is None else weight
        check_options(optimizer, model, (filter, weight), metric, combine, gram, memory_limit, self_check, among)
        registered = registered_rule(optimizer)
        super().__init__(optimizer)
        self.model, self.filter, self.weight = model, filter, weight
        self.metric, self.combine, self.scored = metric, combine, scored
        self.train_on_target: bool | Callable[[], Tensor] | None = train_on_target
        self.gram, self.memory_limit, self.self_check, self.seed = gram, memory_limit, self_check, seed
        self.target = target
        self._selection: Selection | None = None
        self._kept_target: Mapping[str, Tensor] | None = None
        self._watch = Watch()
        self._backwards = 0
        self._pending: bool | None = None  # since the last step: None no backward, False all skipped, True one applied
        self._checks = SelfChecks()
        self._buffer = Buffer()
        self._structure = KnownStructure()
        self._ranks, self.among = KnownRanks(ranks), among
        self._last_capture: tuple[frozenset[str], Mapping[str, Footprint]] | None = None
        self._warned_own_backward = False
        parameters_of(self._structure.of(model), self.param_groups, self.scored)  # says now what a step would say
        if registered is not None and registered.note is not None:
            warnings.warn(f"{type(optimizer).__name__}: {registered.note}", stacklevel=2)

    @property
    def target(self) -> TargetGradient:
        """The target; set it to a closure or a :class:`TargetGradient`.

        What is kept of its gradient stays where only the settings change, and the closure is the same.
        """
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
        if self.train_on_target is not None:  # not where a copy waits for its rows, too
            check_target(new, self.train_on_target)
        before: TargetGradient | None = self.__dict__.get("_target")  # None: a copy or checkpoint may have brought one
        if before is not None and before.closure is not new.closure:
            self._kept_target, self._watch = None, Watch()
        self._target = new

    @property
    def selection(self) -> Selection | None:
        """The selection of the last backward or step; None before the first."""
        return self._selection

    @property
    def selections(self) -> int:
        """The number of selections so far, those of runs before a checkpoint included."""
        return self._backwards

    @property
    def coverage(self) -> Coverage:
        """The table of the rules that capture the parameters; after a backward also what was captured at which cost."""
        found = table(self._structure.of(self.model))
        if self._last_capture is None:
            return found
        scored, footprints = self._last_capture
        return found.after(scored, footprints)

    def step(self, closure: Callable[..., Any] | None = None, *, select: bool = True) -> Any:
        """Select among the closure's candidates and apply the inner optimizer's step to their combined gradient.

        Args:
            closure: returns the candidates' own losses, shape ``(n,)``, or an iterator of such tensors, one for each
                micro-batch (a generator function will do). It is run once, with gradients enabled; previous values of
                ``.grad`` are discarded. None, or a closure that returns None: the inner optimizer's step on whatever
                ``.grad`` holds, or nothing if every :meth:`backward` since the last step was skipped.
            select: False: run the closure, then do the same as without one. For frameworks that pass a closure of their
                own to the second half of a step, as Lightning does; without this option the target would be evaluated
                before the closure turns out to have no candidates.

        Returns:
            The weighted loss, detached, which is the mean of the kept losses under weights that sum to one; if skipped,
            the mean over accepted candidates; if all are rejected, NaN. Without a closure None; with ``select=False``,
            or a closure without candidates, whatever the closure returned.

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

    def _selective_step(self, function: Callable[..., Any]) -> Any:
        setup, closure = self._told_setup(function, scale=1.0, may_be_plain=True)
        result = selective_step(setup, closure, self._replace_gradients_and_step)
        if isinstance(result, StepResult):
            return result.loss
        if result.value is not None:
            self._pending = None
            self._warn_of_own_backward()
        self._plain_step()
        return result.value

    def _replace_gradients_and_step(self, result: StepResult) -> None:
        """Apply a result for :meth:`step`; on an exception all attributes and gradients are as before."""
        # Frozen parameters too: gradients from before they were frozen would still move them.
        held = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        before = dict(self.__dict__)
        try:
            for parameter, _ in held:
                parameter.grad = None
            for name, gradient in result.gradients.items():
                result.parameters.updated[name].grad = gradient
            self._pending = None
            self._commit(result)
            if not result.selection.skipped:
                self.optimizer.step()
        except BaseException:
            self.__dict__.update(before)
            for parameter, gradient in held:
                parameter.grad = gradient
            raise

    def backward(
        self,
        closure: Callable[..., Any],
        *,
        grad_scale: float | Tensor = 1.0,
        sample_ids: GivenIds | Sequence[GivenIds] | None = None,
        target_sample_ids: GivenIds | None = None,
    ) -> Tensor:
        """The first half of a step: select, and add the combined gradient to ``.grad`` as ``loss.backward()`` does.

        Then clip, unscale, accumulate, and call :meth:`step` without a closure.

        Args:
            closure: returns the candidates' own losses, shape ``(n,)``, or an iterator of such tensors; run once, with
                gradients enabled.
            grad_scale: multiplies the losses for the pass, and so ``.grad``: with a GradScaler
                ``scaler.scale(torch.ones(()))``, divided by the number of accumulated calls.
            sample_ids: whose the rows or positions are, where they are not one row for each candidate; int64, -1 for
                none. Where candidates are several rows each: the candidate of each row of the model's input, (r,).
                Where rows are packed from several candidates or a model drops positions: the candidate of each
                position, in the shape of the token grid. Or a mapping from names of layers, or of modules around them,
                to ids of the grid, or of the rows (r,) that a model has chosen for this layer; a function that returns
                them is called once the layer has run. Where the closure yields micro-batches: a list with one for each,
                with numbers that start at 0 in each.
            target_sample_ids: the same for the rows of the target closure; read where these take part in the step.

        Returns:
            The weighted loss, as :meth:`step` does.

        Raises:
            The same errors as :meth:`step`; on any exception ``.grad`` is as before.
        """
        if "optimizer" not in self.__dict__:
            raise RuntimeError(
                f"Expected backward to be called on the SelectiveOptimizer, got {type(self).__name__}, a stand-in that "
                "would keep half of its state to itself. In Lightning: self.optimizers(use_pl_optimizer=False)."
            )
        setup, candidates = self._told_setup(
            closure,
            scale=float(grad_scale),
            sample_ids=sample_ids,
            target_sample_ids=target_sample_ids,
            may_be_plain=False,
        )
        result = selective_step(setup, candidates, partial(self._add_gradients, scaled=setup.scale != 1.0))
        assert isinstance(result, StepResult)
        return result.loss

    @torch.no_grad()
    def _add_gradients(self, result: StepResult, *, scaled: bool) -> None:
        """Apply a result for :meth:`backward`: add its gradients to ``.grad``."""
        for name, parameter in result.parameters.updated.items():
            gradient = result.gradients.get(name)
            if gradient is None and result.selection.skipped and scaled and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # a GradScaler must find something to unscale
            elif gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._pending = bool(self._pending) or not result.selection.skipped
        self._commit(result)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the inner optimizer does, and forget earlier backward calls of this step."""
        super().zero_grad(set_to_none)
        self._pending = None

    def _told_setup(self, function: Callable[..., Any], **options: Any) -> tuple[StepSetup, CandidateClosure]:
        """The setup of one step; where it fails in one of several processes, the others are told."""
        structure = self._structure.of(self.model)
        ranks = self._ranks.now(sharded=bool(structure.sharding))
        return ranks.beginning(lambda: self._setup(function, structure, ranks, **options))

    def _setup(
        self,
        function: Callable[..., Any],
        structure: Structure,
        ranks: Ranks,
        *,
        scale: float,
        may_be_plain: bool,
        sample_ids: GivenIds | Sequence[GivenIds] | None = None,
        target_sample_ids: GivenIds | None = None,
    ) -> tuple[StepSetup, CandidateClosure]:
        """The inputs and options of one step, and its closure; a step that cannot be made is refused here."""
        if not scale > 0.0:
            raise ValueError(f"grad_scale must be positive, got {scale!r}.")
        if not isinstance(self.self_check, str) and self.self_check and self._backwards % self.self_check == 0:
            self._checks.forget()
        check_target(self.target, self.train_on_target)
        assert self.train_on_target is not None
        parameters = parameters_of(structure, self.param_groups, self.scored)
        closure = CandidateClosure(function, parameters.updated, may_be_plain=may_be_plain)
        way = way_of(self.combine, structure, parameters)
        if way.needs_rows and not closure.takes_rows:
            raise TypeError(
                f'combine="{way.name}" needs a closure that accepts rows: closure(rows=kept) -> losses (k,).'
            )
        setup = StepSetup(
            inner=self.optimizer,
            structure=structure,
            parameters=parameters,
            plan=plan(structure, parameters.updated if way.captures_all else parameters.scored),
            way=way,
            target=self.target,
            trains_on_target=self._rows_to_train_on(self.train_on_target),
            kept_target=self._kept_target,
            watch=self._watch,
            filter=self.filter,
            weight=self.weight,
            metric=Metric(self.metric),
            sketch=self.gram if isinstance(self.gram, Sketch) else None,
            memory_limit=DEFAULT_MEMORY_LIMIT if self.memory_limit is None else self.memory_limit,
            buffer=self._buffer,
            scale=scale,
            sample_ids=sample_ids,
            target_sample_ids=target_sample_ids,
            checks=self._checks if self.self_check else None,
            ranks=ranks,
            among=self.among,
            backwards=self._backwards,
            # A seed that depends on the step count alone, so that no random state needs saving.
            seed_of=partial(self._seed_of, rank=ranks.own),
            clock=Clock(),
            observe=self._observe,
        )
        return setup, closure

    def _rows_to_train_on(self, asked: bool | Callable[[], Tensor]) -> bool | Callable[[], Tensor]:
        """The target rows that take part in the coming step, which guide no more where that has an end."""
        if asked is not True or self.target.until is None:
            return asked
        return self.target.closure if self.target.guides_no_more(self._backwards) else False

    def _seed_of(self, purpose: str, *, rank: int) -> int:
        # Ranks that drew the same dropout masks for their own rows would not be one run.
        place = f"/{rank}" if rank and purpose in OF_RANK else ""
        return random.Random(f"{self.seed}/{self._backwards}/{purpose}{place}").getrandbits(32)

    def _warn_of_own_backward(self) -> None:
        if not self._warned_own_backward:
            self._warned_own_backward = True
            warnings.warn(
                "The closure ran its own backward and returned a scalar, so nothing is selected: SelectiveOptimizer is "
                "its inner optimizer here. Return the candidates' losses, shape (n,), without a backward.",
                stacklevel=5,
            )

    def _commit(self, result: StepResult) -> None:
        self._selection = result.selection
        self._kept_target = result.kept_target
        self._watch = result.watch
        self._last_capture = frozenset(result.parameters.scored), result.footprints
        self._backwards += 1

    def extra_state(self) -> dict[str, Any]:
        """The number of selections, the seed and, where they must outlive a step, target gradient and watch."""
        return written_state(self._backwards, self.seed, self._kept_target, self._watch)

    def read_extra_state(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """The attributes restored from :meth:`extra_state`."""
        backwards, seed, target, watch = read_state(extra, self.EXTRA_KEY, self.model, seed=self.seed)
        return {"_backwards": backwards, "seed": seed, "_kept_target": target, "_watch": watch, "_pending": None}

    def __getstate__(self) -> dict[str, Any]:
        state = {name: v for name, v in super().__getstate__().items() if name not in ("_target", "_observe")}
        return state | ({"train_on_target": None} if callable(self.train_on_target) else {})
