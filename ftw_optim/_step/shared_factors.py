"""Factors of the candidates of several ranks: each keeps those of its own, and their products are those of all.

The ranks whose candidates are one selection are all of them, or neighbours of a few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.finiteness import all_finite, finite_candidates
from ftw_optim._gram.inner_products import Products, on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._matching.selection import Selection
from ftw_optim._ranks.grouping import sums_of_neighbours
from ftw_optim._ranks.ranks import Ranks
from ftw_optim._ranks.rows import Rows
from ftw_optim._ranks.tables import tables_of
from ftw_optim._step.captured_rows import CapturedRows
from ftw_optim._step.kept_factors import KeptFactors
from ftw_optim._step.measuring import Measured
from ftw_optim._step.setup import StepSetup, full_precision
from ftw_optim._step.shared_sums import SharedSums
from ftw_optim._step.target import TargetNow


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Told:
    """What a rank tells the others of its pass.

    Attributes:
        digest: a hash of what must be the same everywhere.
        plain: whether its closure has no candidates; True for one that ran a backward of its own.
        losses: of its candidates, and of target rows that take part behind them, on the CPU.
        targets: the number of these rows.
        guide_losses: the losses of the rows that guide, where they were formed anew.
        reached: the parameters that its candidates reached, see :meth:`StepParameters.mask`.
        takes_rows: whether its closure runs some candidates again.
        touched: of each of them how many rows a candidate touches, see :func:`touched`.
    """

    digest: str
    plain: bool | None
    losses: Tensor
    targets: int
    guide_losses: Tensor | None
    reached: int
    takes_rows: bool
    touched: Mapping[str, int | None]


@final
class SharedFactors:
    """Factors of this rank's candidates, among those of the ranks of its selection.

    Args:
        setup: the inputs and options of the step.
        within: the ranks of the selection.
        own: this rank's rows.
        target: the target.
        told: what each rank of the run has told of its pass.
    """

    measures_alone = False

    def __init__(
        self, setup: StepSetup, within: Ranks, own: CapturedRows, target: TargetNow, told: Sequence[Told]
    ) -> None:
        self._setup, self._target, self.within = setup, target, within
        self._own = KeptFactors(setup, own, target)
        self.everyone = _rows(told, setup.ranks.own)
        start = setup.ranks.own - within.own
        self._places = slice(start, start + within.count)
        few = told[self._places]
        self.rows = _rows(few, within.own)
        tables = tables_of([one.touched for one in told], setup.parameters.scored)
        most = max(sums_of_neighbours(self.everyone.by_rank, within.count)) // within.count
        self._sums = SharedSums(setup, within, self.rows, self._own, target, tables, most)
        self._losses = torch.cat(
            [
                *(one.losses[: len(one.losses) - one.targets] for one in few),
                *(one.losses[-one.targets :] for one in few if one.targets),
            ]
        )
        self.reached = setup.parameters.named(one.reached for one in told)
        self._reached = setup.parameters.named(one.reached for one in few)
        self._counted = setup.parameters.named(one.reached for one in few[: within.own])
        self.accepted = torch.ones(len(self._losses), dtype=torch.bool)

    @property
    def in_groups(self) -> bool:
        """Whether other ranks make selections of their own, beside this one."""
        return self.within is not self._setup.ranks

    @property
    def candidates(self) -> CapturedRows:
        """This rank's rows."""
        return self._own.candidates

    @property
    def found(self) -> Mapping[str, Sequence[Factors]]:
        """See :class:`KeptFactors`; of this rank's rows."""
        return self._own.found

    @property
    def alone(self) -> dict[str, Sequence[Factors]]:
        """See :class:`KeptFactors`; of this rank's rows."""
        return self._own.alone

    @property
    def buckets(self) -> Sequence[Bucket]:
        """See :class:`KeptFactors`; of this rank's rows."""
        return self._own.buckets

    @property
    def mine(self) -> slice:
        """The candidates of this process among all."""
        return self.everyone.mine

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` rows, of all ranks of the selection."""
        self.accepted = accepted
        self._own.keep_only(self.rows.own_of(accepted))

    def clean(self, measured: Measured) -> Tensor:
        """Mask of the rows of the selection whose loss and factors are all finite."""
        return self._of_all(lambda: self._own.clean(measured))

    def own(self, selection: Selection) -> Selection:
        """The selection of the step as far as it concerns this rank's rows."""
        return selection.part(self.everyone.mine, self.everyone.my_targets)

    def measured(self) -> Measured:
        """The products of the accepted rows of the selection, which may turn out not to be finite."""
        setup, losses = self._setup, self.candidates.losses
        with full_precision(losses), torch.no_grad():
            products = self._products()
        unseen = {name: uses for name, uses in self._own.found.items() if name not in setup.parameters.scored}
        with setup.clock.phase("solve"):
            problem, (flags,) = on_host(products, self._target.finite)
            clean = self._of_all(lambda: finite_candidates(unseen, losses).cpu())
        return Measured(problem=problem, losses=self._losses, finite=self._losses.isfinite(), clean=clean, target=flags)

    def _products(self) -> Mapping[Metric, Products]:
        """The products over the scored parameters that the rows of this selection reach.

        None where no row of it counts: other selections may have some, and wait until all are measured.
        """
        known = self._setup.parameters.scored
        everywhere = [name for name in self.reached if name in known]
        if not everywhere:
            return {}
        if self._setup.sketch is not None:
            return self._sums.sketched(everywhere, self._counted)
        counts = bool(self.accepted.any())
        return self._sums.exact(everywhere, set(self._reached) if counts else set(), self.accepted)

    def _of_all(self, work: Callable[[], Tensor]) -> Tensor:
        """One entry for each row of the selection, from those that some work gives for this rank's."""
        own = torch.split(self._setup.ranks.joined(work), self.everyone.by_rank)
        found = torch.cat(own[self._places])
        order = self.rows.order()
        return found if order is None else found[order]


def _rows(told: Sequence[Told], own: int) -> Rows:
    counts = [len(one.losses) - one.targets for one in told]
    return Rows(counts=counts, targets=[one.targets for one in told], own=own)


def shared_target(ranks: Ranks, within: Ranks, target: TargetNow, told: Sequence[Told], *, total: int) -> TargetNow:
    """The target of all ranks: the mean over all of their target losses, however many each of them has.

    Args:
        ranks: the ranks.
        within: those of this rank's selection, whose target rows tell what it matches where they guide themselves.
        target: this rank's own.
        told: what each has told.
        total: the number of target rows that take part in this rank's selection.
    """
    given = [one.guide_losses for one in told]
    anew = [losses for losses in given if losses is not None]
    if len(anew) != len(given):
        return replace(target, total=total)
    losses = torch.cat(anew)
    share = len(anew[ranks.own]) / len(losses)
    gradients, finite = target.gradients, target.finite
    if target.guides_itself and not target.share:  # a remembered gradient is that of all ranks already
        start = ranks.own - within.own
        of_these = sum(len(some) for some in anew[start : start + within.count])
        gradients = _mean(within, gradients, len(anew[ranks.own]) / max(1, of_these))
    if not target.guides_itself:
        gradients = _mean(ranks, gradients, share)
        flags = [losses.isfinite().all(), all_finite(gradients.values()).cpu()]
        finite = torch.stack(flags).to(finite.device)
    return replace(
        target,
        gradients=gradients,
        finite=finite,
        coming=None if target.coming is None else _mean(ranks, target.coming, share),
        guide_losses=losses,
        total=total,
    )


def _mean(ranks: Ranks, gradients: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    summed = ranks.summed([share * gradient for gradient in gradients.values()])
    return dict(zip(gradients, summed, strict=True))
