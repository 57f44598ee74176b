"""The pass over the candidates: one batch of them, or one micro-batch after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim._capture.armed_hooks import ArmedHooks
from ftw_optim._capture.capture import Capture
from ftw_optim._capture.sample_ids import GivenIds
from ftw_optim._factors.compaction import compacted
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.micro_batches import Footprint
from ftw_optim._gram.profiling import profiled
from ftw_optim._layers.randomness import own_randomness
from ftw_optim._step.captured_rows import CapturedRows, together
from ftw_optim._step.closures import CandidateClosure, Plain, checked_losses
from ftw_optim._step.kept_graphs import Batches, Total
from ftw_optim._step.seen_pass import SeenPass
from ftw_optim._step.setup import StepSetup, full_precision
from ftw_optim._step.target import target_losses

Taker = Callable[[Tensor], Callable[[str, list[Factors]], None]]
"""A function ``losses -> take``; ``take(name, factors)`` is then called for each captured parameter."""


@final
class CandidatePass:
    """The context in which the closure runs and its layers are captured; leaving it ends every capture.

    Where graphs are kept for a second backward, their captures last as long: checkpointed layers may run again.
    """

    def __init__(self, setup: StepSetup, closure: CandidateClosure) -> None:
        self._setup, self.closure = setup, closure
        self._generator = setup.generator("check")
        self._of_candidates, self._of_target = Batches(), Batches()
        self._seen = SeenPass.of(setup.structure)
        self.takes_rows = closure.takes_rows
        """Whether candidates can be run again by their rows, on all ranks."""

    def __enter__(self) -> CandidatePass:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for batches in (self._of_candidates, self._of_target):
            batches.graphs.clear()
            batches.captures.__exit__(kind, error, trace)

    @property
    def keeps_target_graph(self) -> bool:
        """Whether the graph of target rows is wanted once more, where candidates are run again after all."""
        return bool(self._of_target.graphs) and self.takes_rows

    def losses_again(self, kept: Tensor, weights: Tensor) -> Iterator[Total]:
        """The weighted losses of candidates that are run once more, a batch at a time, after all captures have ended.

        Of a model in shards other ranks may keep candidates in more batches: their passes are made along.

        Args:
            kept: indices of the candidates; none: nothing is run.
            weights: of each.

        Raises:
            ValueError: the closure did not return the losses of these.
        """
        self._of_candidates.end()
        value, done = self.closure(kept) if len(kept) else iter(()), 0
        for batch in value if isinstance(value, Iterator) else [value]:
            losses = checked_losses(batch)
            share = weights[done : done + len(losses)]
            done += len(losses)
            if done > len(kept):
                break
            with ArmedHooks(self._setup.structure.modules.values()) as armed:
                armed.take_over()
                yield Total((share.to(losses) * losses).sum())
        if done != len(kept):
            raise ValueError(f"closure(rows=kept) must return the losses of these {len(kept)} rows, got {done}.")
        while self._goes_on():
            with ArmedHooks(self._setup.structure.modules.values()) as armed:
                loss = self._seen.losses().sum()
                armed.take_over()
                yield Total(loss, counts=False)

    def target_rows(self, closure: Callable[[], Tensor], *, at_least: int) -> CapturedRows:
        """The losses and factors of target rows that take part in the step; to be called before the candidates' pass.

        The closure is called once in a step: candidates may run again, of target rows the graph is kept.

        Args:
            closure: returns the losses of the rows.
            at_least: number of rows that are needed.

        Raises:
            TypeError, ValueError: the closure returned something other than losses of as many rows.
        """
        setup = self._setup
        capture = Capture(setup.plan, of="target rows", sample_ids=setup.target_sample_ids, agreed=setup.agreed)
        self._of_target.captures.enter_context(capture)
        with collecting_later():
            with own_randomness(setup.structure.parameters.values(), setup.seed_of("rows")), torch.enable_grad():
                losses = target_losses(closure)
            if len(losses) < at_least:
                raise ValueError(FEW_TARGET_ROWS)
            return self._differentiated(capture, losses, None, self._of_target)

    def weighted_losses(self, weights: Tensor, *, of_target: bool = False) -> Iterator[Total]:
        """The weighted sum of the losses, a batch at a time, on the graph that was kept.

        Between one and the next a backward pass may run checkpointed layers of that batch again.

        Args:
            weights: of all candidates, and of target rows that take part behind them; or of these alone.
            of_target: whether it is of these alone.
        """
        done = 0
        for capture, losses, counts in (*(() if of_target else self._of_candidates.graphs), *self._of_target.graphs):
            share = weights[done : done + len(losses)].to(losses) if counts else torch.ones_like(losses)
            done += len(losses) if counts else 0
            capture.resume()
            yield Total((share * losses).sum(), counts)
            capture.pause()

    def candidates(self, rows: Tensor | None = None, taker: Taker | None = None) -> CapturedRows | Plain:
        """The losses and factors of the candidates, from one call of the closure.

        Args:
            rows: indices of the candidates to run; None: all.
            taker: takes the factors layer by layer, as they come; then none are returned.

        Raises:
            ValueError: the closure returned an iterator that yields nothing, or one where ``combine="rerun"`` needs a
                single batch; or ``sample_ids`` is not one tensor for each micro-batch.
        """
        with self._setup.clock.phase("candidates"):
            found = self._own(rows, taker)
            if not isinstance(found, Plain):
                self._pass_along()
            return found

    def _own(self, rows: Tensor | None, taker: Taker | None) -> CapturedRows | Plain:
        """See :meth:`candidates`; of this rank."""
        capture = self._begun(0)
        with collecting_later():
            with torch.enable_grad():
                value = self.closure(rows)
            if isinstance(value, Plain):
                return value
            if not self._setup.ranks.alone and isinstance(value, Tensor) and value.shape == (0,):
                self._of_candidates.captures.close()
                return self._none()
            if not isinstance(value, Iterator):
                if self._several_ids:
                    raise ValueError("Expected one tensor of sample_ids for one batch of candidates, got a list.")
                return self._differentiated(capture, value, taker, self._of_candidates)
        self._check_micro_batches()
        return self._in_turn(value, capture, taker)

    def _goes_on(self) -> bool:
        """Whether other ranks make a forward pass of a model in shards, after the last one of this rank."""
        if not (self._setup.in_shards and self._setup.goes_on()):
            return False
        if not self._seen.known:
            raise RuntimeError(
                "Expected a pass over candidates on this rank before, which could be made again along with another "
                "rank's, but there was none: give each rank a candidate at its first step, and shard the whole model "
                "(fully_shard(model)), not its layers alone."
            )
        return True

    def _pass_along(self) -> None:
        """Make the passes that other ranks still make, over rows that count for nothing."""
        while self._goes_on():
            capture = Capture(self._setup.plan, agreed=self._setup.agreed)
            self._of_candidates.captures.enter_context(capture)
            with collecting_later():
                with torch.enable_grad():
                    losses = self._seen.losses()
                self._differentiated(capture, losses, None, self._of_candidates, counts=False)

    def _none(self) -> CapturedRows:
        """No candidates, on a rank beside others."""
        device = next(iter(self._setup.parameters.updated.values())).device
        return CapturedRows(losses=torch.empty(0, device=device), found={}, footprints={}, computed_in=set())

    def _in_turn(self, iterator: Iterator[Any], capture: Capture, taker: Taker | None) -> CapturedRows:
        """The losses and factors of all micro-batches, joined to those of one batch."""
        batches: list[CapturedRows] = []
        while True:
            with collecting_later():
                with torch.enable_grad():
                    value = next(iterator, _END)
                if value is _END:
                    capture.pause()
                    break
                if self._several_ids and self._ids(len(batches)) is None:
                    raise self._other_ids(f"at least {len(batches) + 1}")
                batches.append(self._differentiated(capture, value, taker, self._of_candidates))
            capture = self._begun(len(batches))
        if not batches and not self._setup.ranks.alone:
            return self._none()
        if not batches:
            raise ValueError("Expected an iterator that yields losses (n,) of micro-batches, but it yielded nothing.")
        if self._ids(len(batches)) is not None:
            raise self._other_ids(str(len(batches)))
        return together(batches)

    def _begun(self, batch: int) -> Capture:
        capture = Capture(self._setup.plan, sample_ids=self._ids(batch), agreed=self._setup.agreed)
        return self._of_candidates.captures.enter_context(capture)

    def _differentiated(
        self, capture: Capture, value: Any, taker: Taker | None, batches: Batches, *, counts: bool = True
    ) -> CapturedRows:
        """Run the backward pass of one batch; its capture ends here unless its graph is kept."""
        losses, setup = checked_losses(value, capture.counts), self._setup
        if counts and batches is self._of_candidates:
            self._seen.was_of_candidates()
        setup.meet()
        keep_graph = setup.way.keeps_graph or (batches is self._of_target and setup.way.needs_rows)
        footprints: dict[str, Footprint] = {}
        found: Mapping[str, Sequence[Factors]] = {}
        with torch.enable_grad(), full_precision(losses), profiled("backward"):
            if taker is None:
                found = capture.differentiate(
                    losses, scale=setup.scale, keep_graph=keep_graph, checks=setup.checks, generator=self._generator
                )
                footprints = {name: Footprint.of(uses) for name, uses in found.items()}
                found = self._compacted(found)
            else:
                take = taker(losses)

                def note(name: str, uses: list[Factors]) -> None:
                    footprints[name] = Footprint.of(uses)
                    take(name, uses)

                capture.stream(losses, note, scale=setup.scale, checks=setup.checks, generator=self._generator)
        capture.pause()
        if keep_graph:
            batches.graphs.append((capture, losses, counts))
        else:
            batches.captures.close()
        return CapturedRows(losses=losses.detach(), found=found, footprints=footprints, computed_in=capture.computed_in)

    def _compacted(self, found: dict[str, list[Factors]]) -> dict[str, Sequence[Factors]]:
        """The factors as they wait for the combined gradient, if it is formed from them."""
        setup = self._setup
        scored = {} if setup.way.keeps_graph or setup.sketch is not None else setup.parameters.scored
        return {name: compacted(uses, scored[name].shape) if name in scored else uses for name, uses in found.items()}

    @property
    def _several_ids(self) -> bool:
        return self._setup.sample_ids is not None and not isinstance(self._setup.sample_ids, Tensor | Mapping)

    def _ids(self, batch: int) -> GivenIds | None:
        """The ``sample_ids`` of a micro-batch; None where there are none, or none are left."""
        ids = self._setup.sample_ids
        if ids is None or isinstance(ids, Tensor | Mapping):
            return ids
        return ids[batch] if batch < len(ids) else None

    def _other_ids(self, batches: str) -> ValueError:
        assert self._setup.sample_ids is not None
        return ValueError(
            f"Expected a list of sample_ids, one for each micro-batch, got {len(self._setup.sample_ids)} for {batches}."
        )

    def _check_micro_batches(self) -> None:
        if self._setup.way.drops_factors and self._setup.sketch is None:
            raise ValueError(
                f'combine="{self._setup.way.name}" takes the losses of one batch: several micro-batches need their '
                'factors or graphs alive together, or gram=Sketch(). Use these, combine="factors" or "graph", or '
                "return one tensor."
            )
        if isinstance(self._setup.sample_ids, Tensor | Mapping):
            raise ValueError(
                "sample_ids tells the candidates of one batch apart; with an iterator of micro-batches give a list of "
                "one tensor for each, in which the numbers start at 0 anew."
            )


@contextmanager
def collecting_later() -> Iterator[None]:
    """A block in which Python does not look for garbage.

    A pass holds a record of every call and node until its factors are formed. Nothing of it is garbage, and all of it
    is freed by reference counting; yet its mere number sets off a search of all objects there are (seen: a sixth of the
    step of a model with 420 adapted layers).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


FEW_TARGET_ROWS = (
    "train_on_target=True needs two target rows in a step or more: each is weighed by what the others ask for. Got "
    "one; return the losses of several, or leave it to guide alone."
)
_END = object()
