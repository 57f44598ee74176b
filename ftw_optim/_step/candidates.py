"""The pass over the candidates: one batch of them, or one micro-batch after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ftw_optim._capture.capture import Capture
from ftw_optim._capture.plan import CapturePlan
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.micro_batches import Footprint, joined, largest
from ftw_optim._gram.profiling import profiled
from ftw_optim._step.closures import checked_losses

Taker = Callable[[Tensor], Callable[[str, list[Factors]], None]]
"""``losses -> take``, and ``take(name, factors)`` for each captured parameter."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Everything that the pass found.

    Attributes:
        losses: shape ``(n,)``, with their graph where it was kept.
        found: factors of each captured parameter that was reached, multiplied by the scale; none if they were taken.
        footprints: what the factors of each came to.
        computed_in: the dtypes that the captured layers computed in.
    """

    losses: Tensor
    found: Mapping[str, list[Factors]]
    footprints: Mapping[str, Footprint]
    computed_in: set[torch.dtype]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Plain:
    """The closure only wants the inner optimizer's step; this is what it returned."""

    value: Any


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """How the candidates are passed over.

    Attributes:
        model: that the closure calls.
        plan: what is captured.
        sample_ids: see :meth:`SelectiveOptimizer.backward`.
        scale: multiplies the losses.
        keep_graph: leave the graphs for a second backward.
        one_batch: micro-batches are refused.
        checks: what the self-check has seen; None: no self-check.
        generator: of the checks.
    """

    model: nn.Module
    plan: CapturePlan
    sample_ids: Tensor | Sequence[Tensor] | None
    scale: float
    keep_graph: bool
    one_batch: bool
    checks: SelfChecks | None
    generator: torch.Generator

    def over(
        self,
        closure: Callable[..., Any],
        is_plain: Callable[[Any], bool],
        captured: ExitStack,
        taker: Taker | None = None,
    ) -> Candidates | Plain:
        """Run the closure once.

        Args:
            closure: returns losses ``(n,)``, or an iterator of such tensors.
            is_plain: whether a returned value asks for the inner step alone.
            captured: holds the captures that are still needed where graphs are kept.
            taker: takes the factors layer by layer, as they come; then none are returned.

        Raises:
            ValueError: an iterator without any losses, or together with ``update="rerun"`` or ``sample_ids`` that are
                not one for each micro-batch.
        """
        batches: list[Candidates] = []
        iterator: Iterator[Any] | None = None
        while True:
            ids = self._ids(len(batches))
            capture = captured.enter_context(Capture(self.model, self.plan, sample_ids=ids))
            with torch.enable_grad():
                if iterator is None:
                    value = closure()
                    if is_plain(value):
                        return Plain(value=value)
                    iterator = self._checked(value) if isinstance(value, Iterator) else None
                    if iterator is None and self._several_ids:
                        raise ValueError("Expected one tensor of sample_ids for one batch of candidates, got a list.")
                if iterator is not None:
                    value = next(iterator, _END)
                    if value is _END:
                        break
                    if self._several_ids and ids is None:
                        raise self._other_ids(f"at least {len(batches) + 1}")
                losses = checked_losses(value, capture.count)
                with full_precision(losses), profiled("backward"):
                    found, footprints = self._differentiated(capture, losses, taker)
            capture.pause()
            batches.append(
                Candidates(
                    losses=losses if self.keep_graph else losses.detach(),
                    found=found,
                    footprints=footprints,
                    computed_in=capture.computed_in,
                )
            )
            if not self.keep_graph:
                captured.close()
            if iterator is None:
                capture.resume()
                return batches[0]
        if not batches:
            raise ValueError("Expected an iterator that yields losses (n,) of micro-batches, but it yielded nothing.")
        if self._ids(len(batches)) is not None:
            raise self._other_ids(str(len(batches)))
        return _together(batches)

    @property
    def _several_ids(self) -> bool:
        return self.sample_ids is not None and not isinstance(self.sample_ids, Tensor)

    def _ids(self, batch: int) -> Tensor | None:
        """Those of a micro-batch; None where there are none, or none left."""
        if self.sample_ids is None or isinstance(self.sample_ids, Tensor):
            return self.sample_ids
        return self.sample_ids[batch] if batch < len(self.sample_ids) else None

    def _other_ids(self, batches: str) -> ValueError:
        assert self.sample_ids is not None
        return ValueError(
            f"Expected a list of sample_ids, one for each micro-batch, got {len(self.sample_ids)} for {batches}."
        )

    def _differentiated(
        self, capture: Capture, losses: Tensor, taker: Taker | None
    ) -> tuple[Mapping[str, list[Factors]], Mapping[str, Footprint]]:
        if taker is None:
            found = capture.differentiate(
                losses, scale=self.scale, keep_graph=self.keep_graph, checks=self.checks, generator=self.generator
            )
            return found, {name: Footprint.of(uses) for name, uses in found.items()}
        footprints = {}
        take = taker(losses)

        def note(name: str, uses: list[Factors]) -> None:
            footprints[name] = Footprint.of(uses)
            take(name, uses)

        capture.stream(losses, note, scale=self.scale, checks=self.checks, generator=self.generator)
        return {}, footprints

    def _checked(self, iterator: Iterator[Any]) -> Iterator[Any]:
        if self.one_batch:
            raise ValueError(
                'update="rerun" takes the losses of one batch: several micro-batches need their factors or graphs '
                'alive together, or gram=Sketch(). Use these, update="factors" or "graph", or return one tensor.'
            )
        if self.sample_ids is not None and not self._several_ids:
            raise ValueError(
                "sample_ids tells the candidates of one batch apart; with an iterator of micro-batches give a list of "
                "one tensor for each, in which the numbers start at 0 anew."
            )
        return iterator


_END = object()


def _together(batches: Sequence[Candidates]) -> Candidates:
    counts = [len(batch.losses) for batch in batches]
    names = dict.fromkeys(name for batch in batches for name in batch.found)
    found = {name: joined([batch.found.get(name, []) for batch in batches], counts) for name in names}
    return Candidates(
        losses=torch.cat([batch.losses for batch in batches]),
        found=found,
        footprints={name: Footprint.of(uses) for name, uses in found.items()}
        or largest(batch.footprints for batch in batches),
        computed_in=set.union(*(batch.computed_in for batch in batches)),
    )


def full_precision(losses: Tensor) -> torch.autocast:
    """Out of an autocast region around the step: it is meant for the closure, not for our products."""
    return torch.autocast(losses.device.type, enabled=False)
