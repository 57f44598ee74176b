"""Factors of the candidates of several ranks: each keeps those of its own, and measures parameters for all.

A parameter is measured by the rank that owns it. All ranks multiply out their own candidates' gradients of it and send
them there; the owner has the optimizer's state, as every rank has, and so the expected gradient, ``P``, and the
parameter's share of the Gram matrix of all candidates. The sum over the owners is the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import Bucket, buckets_of
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.finiteness import all_finite, finite_candidates
from ftw_optim._gram.blocks import Block
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import Products, on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._matching.selection import Selection
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._ranks.owners import Exchange, owners
from ftw_optim._ranks.ranks import Ranks
from ftw_optim._ranks.rows import Rows
from ftw_optim._ranks.shards import WholeParameters
from ftw_optim._step.captured_rows import CapturedRows
from ftw_optim._step.kept_factors import KeptFactors, in_no_bucket
from ftw_optim._step.measuring import Measured, dtype_of_sums, preconditioners_of, sums_of
from ftw_optim._step.setup import StepSetup, full_precision
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
    """

    digest: str
    plain: bool | None
    losses: Tensor
    targets: int
    guide_losses: Tensor | None
    reached: int


@final
class SharedFactors:
    """Factors of this rank's candidates, among those of all ranks.

    Args:
        setup: the inputs and options of the step.
        own: this rank's rows.
        target: the target of all ranks.
        told: what each rank has told of its pass.
    """

    measures_alone = False

    def __init__(self, setup: StepSetup, own: CapturedRows, target: TargetNow, told: Sequence[Told]) -> None:
        self._setup, self._target, self._ranks = setup, target, setup.ranks
        self._own = KeptFactors(setup, own, target)
        self.rows = Rows(
            counts=[len(one.losses) - one.targets for one in told],
            targets=[one.targets for one in told],
            own=setup.ranks.own,
        )
        self._losses = torch.cat(
            [
                *(one.losses[: len(one.losses) - one.targets] for one in told),
                *(one.losses[-one.targets :] for one in told if one.targets),
            ]
        )
        self.reached = setup.parameters.named(one.reached for one in told)
        self.accepted = torch.ones(len(self._losses), dtype=torch.bool)

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
        return self.rows.mine

    def keep_only(self, accepted: Tensor) -> None:
        """Go on with the ``accepted`` rows, of all ranks."""
        self.accepted = accepted
        self._own.keep_only(self.rows.own_of(accepted))

    def clean(self, measured: Measured) -> Tensor:
        """Mask of the rows of all ranks whose loss and factors are all finite."""
        return self._from_all(lambda: self._own.clean(measured))

    def own(self, selection: Selection) -> Selection:
        """The selection as far as it concerns this rank's rows."""
        return selection.part(self.rows.mine, self.rows.my_targets)

    def measured(self) -> Measured:
        """The products of the accepted rows of all ranks, which may turn out not to be finite."""
        setup, losses = self._setup, self.candidates.losses
        scored = [name for name in self.reached if name in setup.parameters.scored]
        with full_precision(losses), torch.no_grad():
            products = self._sums(scored) if scored else {}
        unseen = {name: uses for name, uses in self._own.found.items() if name not in setup.parameters.scored}
        with setup.clock.phase("solve"):
            problem, (flags,) = on_host(products, self._target.finite)
            clean = self._from_all(lambda: finite_candidates(unseen, losses).cpu())
        return Measured(problem=problem, losses=self._losses, finite=self._losses.isfinite(), clean=clean, target=flags)

    def _sums(self, scored: Sequence[str]) -> Mapping[Metric, Products]:
        """The products of all rows, from the parameters that each rank owns.

        Whatever fails on the way is told once everything has been exchanged: until then the others wait for this rank.
        """
        setup, ranks, parameters = self._setup, self._ranks, self._setup.parameters.scored
        device = self.candidates.losses.device
        exchange = Exchange(
            ranks=ranks,
            sizes={name: parameters[name].numel() for name in scored},
            rows=[a + b for a, b in zip(self.rows.counts, self.rows.targets, strict=True)],
            dtype=dtype_of_sums(parameters),
            device=device,
        )
        owner = owners(exchange.sizes, ranks.count)
        whole = WholeParameters(setup.inner, parameters, ranks, owner, device)
        order = self.rows.order()
        failure: BaseException | None = None
        made: tuple[Preconditioners, GramSums] | None = None

        def fill(places: Mapping[str, Tensor]) -> None:
            nonlocal failure, made
            if failure is None:
                try:
                    if made is None:
                        preconditioners = preconditioners_of(setup, whole.optimizer)
                        sums = sums_of(
                            setup, self.accepted, self._target, device, preconditioners, scale=1.0, whole=whole.found
                        )
                        assert isinstance(sums, GramSums)
                        self._own.buckets, made = self._own.alike(preconditioners), (preconditioners, sums)
                    self._write(places)
                except BaseException as error:
                    failure = error

        for names in exchange.buckets():
            with setup.clock.phase("exchange"):
                whole.bring(names)
                found = exchange.exchanged(names, owner, fill)
            if failure is None and made is not None:
                try:
                    with setup.clock.phase("gram"):
                        self._measure(made[1], found, made[0], order, whole.found)
                except BaseException as error:
                    failure = error
            whole.let_go(names)

        def outcome() -> Mapping[Metric, Products]:
            if failure is not None:
                raise failure
            assert made is not None
            return made[1].products()

        return _summed(ranks, ranks.told(outcome, lambda _: None)[0])

    def _write(self, places: Mapping[str, Tensor]) -> None:
        """Multiply out this rank's gradients, each into its place ``(rows, entries)``."""
        setup, own = self._setup, self._own
        for bucket in own.buckets:
            part = bucket.among(places)
            if not part.names:
                continue
            rows = part.materialise(setup.buffer)[: part.count].view(part.count, len(part.names), -1)
            for number, name in enumerate(part.names):
                places[name].copy_(rows[:, number])
                if setup.scale != 1.0:
                    places[name].div_(setup.scale)
        for name, uses in own.alone.items():
            if name not in places:
                continue
            shape = setup.parameters.scored[name].shape
            block = Block.of(uses, shape, scale=setup.scale, limit=setup.memory_limit, buffer=setup.buffer)
            place = places[name].view(block.count, block.rows, block.columns)
            for start, stop in block.ranges():
                place[:, start:stop].copy_(block.out(start, stop))

    def _measure(
        self,
        sums: GramSums,
        found: Mapping[str, Tensor],
        preconditioners: Preconditioners,
        order: Tensor | None,
        whole: Mapping[str, Tensor],
    ) -> None:
        """Add the parameters that this rank owns, of which it has the gradients of all rows."""
        some = {name: whole[name] for name in found}
        uses = {
            name: [
                Factors.explicit(
                    (rows if order is None else rows[order.to(rows.device)]).reshape(-1, *some[name].shape), some[name]
                )
            ]
            for name, rows in found.items()
        }
        kinds: dict[str, Hashable] = dict(preconditioners.kinds(some, self._setup.parameters.groups))
        shapes = {name: parameter.shape for name, parameter in some.items()}
        buckets = buckets_of(uses, shapes, kinds, limit=self._setup.memory_limit)
        for bucket in buckets:
            sums.add_all(bucket)
        for name, own in in_no_bucket(uses, buckets).items():
            sums.add(name, own)

    def _from_all(self, work: Callable[[], Tensor]) -> Tensor:
        """One entry for each row of all ranks, from those that some work gives for this rank's."""
        found = self._ranks.joined(work)
        order = self.rows.order()
        return found if order is None else found[order]


def shared_target(ranks: Ranks, target: TargetNow, told: Sequence[Told]) -> TargetNow:
    """The target of all ranks: the mean over all of their target losses, however many each of them has.

    Args:
        ranks: the ranks.
        target: this rank's own.
        told: what each has told.
    """
    given = [one.guide_losses for one in told]
    anew = [losses for losses in given if losses is not None]
    total = sum(one.targets for one in told)
    if len(anew) != len(given):
        return replace(target, total=total)
    losses = torch.cat(anew)
    share = len(anew[ranks.own]) / len(losses)
    gradients = target.gradients
    if not target.guides_itself:
        gradients = _mean(ranks, gradients, share)
        flags = [losses.isfinite().all(), all_finite(gradients.values()).cpu()]
        finite = torch.stack(flags).to(target.finite.device)
    else:
        finite = target.finite
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


def _summed(ranks: Ranks, products: Mapping[Metric, Products]) -> dict[Metric, Products]:
    parts = [[one.gram, one.cross_gram, one.target_energy] for one in products.values()]
    summed = iter(ranks.summed([part for some in parts for part in some]))
    return {
        metric: replace(one, gram=next(summed), cross_gram=next(summed), target_energy=next(summed))
        for metric, one in products.items()
    }
