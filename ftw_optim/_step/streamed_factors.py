"""Factors that are dropped layer by layer, as soon as the Gram matrix has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.micro_batches import joined
from ftw_optim._gram.inner_products import Products, on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import SketchSums
from ftw_optim._matching.selection import Selection
from ftw_optim._step.candidates import CandidatePass
from ftw_optim._step.captured_rows import CapturedRows
from ftw_optim._step.measuring import MatchingSums, Measured, preconditioners_of, sums_of
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.target import TargetNow


@final
class Stream:
    """Everything that one pass has handed over so far, of which only the sums are kept."""

    def __init__(self, setup: StepSetup, target: TargetNow) -> None:
        self._setup, self._target = setup, target
        self._sums: MatchingSums | None = None
        self._added: set[str] = set()
        self.finite: list[Tensor] = []
        """Masks of the candidates whose loss is finite, one for each micro-batch."""
        self.clean: list[Tensor] = []
        """Masks of those whose factors are finite too, where the products alone cannot tell."""

    def begin(self, losses: Tensor) -> Callable[[str, list[Factors]], None]:
        """Begin a batch with these losses; returns the function that takes its factors."""
        finite = losses.detach().isfinite()
        self.finite.append(finite)
        self.clean.append(finite)
        if isinstance(self._sums, SketchSums):
            self._sums.more(len(losses))
        else:
            rows = len(losses) + (0 if self._setup.sketch is not None else self._target.count)
            everyone = torch.ones(rows, dtype=torch.bool)
            preconditioners = preconditioners_of(self._setup)
            self._sums = sums_of(self._setup, everyone, self._target, losses.device, preconditioners)
        return self._take

    def _take(self, name: str, uses: list[Factors]) -> None:
        if self._setup.scale > 1.0:
            for use in uses:
                self.clean[-1] = self.clean[-1] & use.finite().to(self.clean[-1].device)
        if name in self._setup.parameters.scored:
            assert self._sums is not None
            with self._setup.clock.phase("gram"):
                self._sums.add(name, uses if isinstance(self._sums, SketchSums) else self._beside_target(name, uses))
            self._added.add(name)

    def _beside_target(self, name: str, uses: list[Factors]) -> Sequence[Factors]:
        """The factors of one parameter, with those of the target rows that take part behind them."""
        rows = self._target.rows
        if rows is None:
            return uses
        return joined([uses, rows.found.get(name, ())], [len(self.finite[-1]), len(rows.losses)])

    def end(self) -> None:
        """Add what is left of the target rows that take part, once the candidates have been handed over."""
        rows = self._target.rows
        if rows is None:
            return
        if isinstance(self._sums, SketchSums):
            self._sums.more(len(rows.losses))
        for name, uses in rows.found.items():
            if name in self._setup.parameters.scored:
                if isinstance(self._sums, SketchSums):
                    self._sums.add(name, uses)
                elif self._sums is not None and name not in self._added:
                    self._sums.add(name, self._beside_target(name, []))
                self._added.add(name)
        finite = rows.losses.isfinite()
        self.finite.append(finite)
        self.clean.append(finite)

    def products(self) -> dict[Metric, Products]:
        """The products in each metric; none where no scored parameter was reached."""
        assert self._sums is not None
        return self._sums.products() if self._added else {}


@final
class StreamedFactors:
    """Candidates whose factors are dropped layer by layer, as soon as the Gram matrix has them.

    Args:
        setup: the inputs and options of the step.
        candidate_pass: runs the candidates, and runs those that are left once more if it has to.
        target: the target gradient.
        candidates: losses of all, from the first pass.
        stream: everything that pass has handed over.
    """

    in_groups = False

    def __init__(
        self,
        setup: StepSetup,
        candidate_pass: CandidatePass,
        target: TargetNow,
        candidates: CapturedRows,
        stream: Stream,
    ) -> None:
        self._setup, self._pass, self._target = setup, candidate_pass, target
        self._end(candidates, stream)
        self.measures_alone = setup.sketch is not None  # under the target as reference, in place of the mean
        self.found: Mapping[str, Sequence[Factors]] = {}
        self.buckets: Sequence[Bucket] = ()
        self.alone = self.found
        self.accepted = torch.ones(len(self.candidates.losses), dtype=torch.bool)
        self._rows = torch.arange(len(self.candidates.losses))
        self._losses: Tensor | None = None  # of all candidates, on the CPU
        self.mine = slice(0, len(self.candidates.losses) - target.count)

    @property
    def reached(self) -> Sequence[str]:
        """The captured parameters that some candidate reached."""
        return list(self.candidates.footprints)

    def own(self, selection: Selection) -> Selection:
        """See :class:`KeptFactors`."""
        return selection

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` candidates, bool (n,)."""
        self.accepted = accepted

    def measured(self) -> Measured:
        """The products of the accepted candidates, which are run again if others were in the pass before."""
        if not bool(self.accepted[self._rows].all()):
            self._pass_again(self.accepted.nonzero()[:, 0])
        stream = self._stream
        with self._setup.clock.phase("solve"):
            problem, (values, finite, clean, flags) = on_host(
                stream.products(),
                self.candidates.losses.detach(),
                torch.cat(stream.finite),
                torch.cat(stream.clean),
                self._target.finite,
            )
        if self._losses is None:
            self._losses = values
        n, rows = len(self.accepted), self._rows
        nobody = torch.zeros(n, dtype=torch.bool)
        return Measured(
            problem={metric: one.among(n, rows) for metric, one in problem.items()},
            losses=self._losses,
            finite=nobody.index_put((rows,), finite),
            clean=nobody.index_put((rows,), clean),
            target=flags,
        )

    def clean(self, measured: Measured) -> Tensor:
        """Mask of the candidates whose loss and factors are finite, as far as known after the drop: bool (n,)."""
        return measured.clean if self._setup.scale > 1.0 else measured.clean & measured.measurable

    def _end(self, candidates: CapturedRows, stream: Stream) -> None:
        """Take what a pass over the candidates has given, and add the target rows that take part."""
        rows = self._target.rows
        stream.end()
        self._stream = stream
        self.candidates = candidates
        if rows is not None:
            losses = torch.cat([candidates.losses, rows.losses])
            self.candidates = replace(
                candidates,
                losses=losses,
                footprints={**rows.footprints, **candidates.footprints},
                computed_in=candidates.computed_in | rows.computed_in,
            )

    def _pass_again(self, rows: Tensor) -> None:
        stream = Stream(self._setup, self._target)
        some = rows[rows < len(self.accepted) - self._target.count]
        if len(some):
            candidates = self._pass.candidates(some, stream.begin)
            assert isinstance(candidates, CapturedRows)
        else:  # target rows alone
            candidates = replace(self.candidates, losses=self.candidates.losses[:0])
            stream.begin(candidates.losses)
        self._rows = rows
        self._end(candidates, stream)
