"""The products of the rows of several ranks: exchanged to the owners of parameters, or from sketches by each rank.

A parameter is measured by the rank that owns it. All ranks multiply out their own rows' gradients of it and send them
there; the owner has the optimizer's state, as every rank has, and so the expected gradient, ``P``, and the parameter's
share of the Gram matrix of all rows. The sum over the owners is the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.buckets import buckets_of
from ftw_optim._factors.factors import Factors
from ftw_optim._gram.blocks import Block
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import SketchSums, estimated
from ftw_optim._preconditioners.lookup import Preconditioners
from ftw_optim._ranks.owners import Exchange, owners
from ftw_optim._ranks.ranks import Ranks
from ftw_optim._ranks.rows import Rows
from ftw_optim._ranks.shards import WholeParameters
from ftw_optim._ranks.tables import Table
from ftw_optim._step.kept_factors import KeptFactors, in_no_bucket
from ftw_optim._step.measuring import MatchingSums, dtype_of_sums, preconditioners_of, sums_of
from ftw_optim._step.setup import StepSetup
from ftw_optim._step.target import TargetNow


@final
class Attempts:
    """Pieces of work between exchanges, in which all ranks take part whatever comes: the first error waits."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def make(self, work: Callable[[], None]) -> None:
        """Do the work, if all before it went well."""
        if self._error is None:
            try:
                work()
            except BaseException as error:
                self._error = error

    def end(self) -> None:
        """Raise what has been raised."""
        if self._error is not None:
            raise self._error


@final
class SharedSums:
    """The products of the rows of some ranks, of which each has the factors of its own.

    All ranks go through the same parameters together, those of other selections too: each holds a part of a model in
    shards, and an owner in every group of ranks is sent the whole.

    Args:
        setup: the inputs and options of the step.
        within: the ranks whose candidates are one selection.
        rows: the rows of these ranks.
        own: this rank's factors.
        target: the target.
        tables: the parameters of which only touched rows are sent.
        most: rows of an average rank, in that group of ranks which has the most.
    """

    def __init__(
        self,
        setup: StepSetup,
        within: Ranks,
        rows: Rows,
        own: KeptFactors,
        target: TargetNow,
        tables: Mapping[str, Table],
        most: int,
    ) -> None:
        self._setup, self._within, self._rows, self._own, self._target = setup, within, rows, own, target
        self._tables, self._most = tables, most
        self._device = own.candidates.losses.device

    def sketched(self, scored: Sequence[str], counted: Iterable[str]) -> dict[Metric, Products]:
        """Estimates from sketches, which each rank makes of its own rows: their maps are at the target's gradient.

        Args:
            scored: parameters that some row of the step reached.
            counted: the parameters whose share of the target an earlier rank's sketches have.
        """
        setup, own = self._setup, self._own
        whole = self._whole(dict.fromkeys(scored, 0), among=1)
        sums: SketchSums | None = None
        attempts = Attempts()

        def add(names: Collection[str]) -> None:
            nonlocal sums
            if sums is None:
                preconditioners = preconditioners_of(setup, whole.optimizer)
                own.buckets = own.alike(preconditioners)
                made = self._sums(own.accepted, preconditioners, whole, scale=None, counted=counted)
                assert isinstance(made, SketchSums)
                sums = made
            for name, uses in own.alone.items():
                if name in names:
                    sums.add(name, uses)

        sizes = {name: setup.parameters.scored[name].numel() for name in scored}
        for names in self._exchange(sizes).buckets(1) if whole.any_sharded else [list(scored)]:
            with setup.clock.phase("exchange"):
                whole.bring(names)
            with setup.clock.phase("gram"):
                attempts.make(partial(add, frozenset(names)))
            whole.let_go(names)

        def sketches() -> dict[Metric, tuple[Tensor, Tensor]]:
            attempts.end()
            assert sums is not None
            return sums.sketches()

        found, _ = setup.ranks.told(sketches, lambda _: None)
        with setup.clock.phase("exchange"):
            rows = torch.stack([rows for rows, _ in found.values()])
            everyone = self._within.gathered(rows.movedim(2, 0).contiguous(), self._rows.by_rank)
            targets = self._within.summed([target for _, target in found.values()])
        order = self._rows.order()
        everyone = everyone if order is None else everyone[order.to(everyone.device)]
        with setup.clock.phase("gram"):
            return {
                metric: estimated(everyone[:, number].movedim(0, 1), target)
                for number, (metric, target) in enumerate(zip(found, targets, strict=True))
            }

    def exact(self, everywhere: Sequence[str], scored: Collection[str], accepted: Tensor) -> Mapping[Metric, Products]:
        """The products from the parameters that each rank owns.

        Whatever fails on the way is told once everything has been exchanged: until then the others wait for this rank.

        Args:
            everywhere: parameters that some row of the step reached.
            scored: those that a row of these ranks reached; none where no row of theirs counts.
            accepted: the rows that count, bool ``(n + m,)``.
        """
        setup, tables = self._setup, self._tables
        sizes = {name: setup.parameters.scored[name].numel() for name in everywhere}
        owner = owners(sizes, self._within.count)
        exchange = self._exchange({**sizes, **{name: table.size for name, table in tables.items() if name in sizes}})
        places_of = {name: table.places for name, table in tables.items()}
        of_indices = replace(exchange, sizes=places_of, dtype=torch.int64)
        whole = self._whole(owner, among=self._within.count)
        made: tuple[Preconditioners, GramSums] | None = None
        attempts = Attempts()

        def write(places: Mapping[str, Tensor]) -> None:
            nonlocal made
            if made is None:
                preconditioners = preconditioners_of(setup, whole.optimizer)
                sums = self._sums(accepted, preconditioners, whole, scale=1.0)
                assert isinstance(sums, GramSums)
                self._own.buckets, made = self._own.alike(preconditioners), (preconditioners, sums)
            self._write(places)

        def write_indices(places: Mapping[str, Tensor]) -> None:
            for name, uses in self._own.alone.items():
                if name in places:
                    tables[name].write(uses, places[name], indices=True)

        def measure(found: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> None:
            assert made is not None
            with setup.clock.phase("gram"):
                self._measure(*made, found, indices, whole.found)

        for names in exchange.buckets(self._most):
            with setup.clock.phase("exchange"):
                whole.bring(names)
                some = [name for name in names if name in scored]
                indexed = [name for name in some if name in tables]
                found, indices = {}, {}
                if some:
                    found = exchange.exchanged(some, owner, lambda places: attempts.make(partial(write, places)))
                if indexed:
                    indices = of_indices.exchanged(
                        indexed, owner, lambda places: attempts.make(partial(write_indices, places))
                    )
            if some:
                attempts.make(partial(measure, found, indices))
            whole.let_go(names)

        def outcome() -> Mapping[Metric, Products]:
            attempts.end()
            return {} if made is None else made[1].products()

        return _summed(self._within, setup.ranks.told(outcome, lambda _: None)[0])

    def _whole(self, owner: Mapping[str, int], *, among: int) -> WholeParameters:
        setup = self._setup
        parameters = setup.parameters.scored
        return WholeParameters(setup.inner, parameters, setup.ranks, owner, self._device, among=among)

    def _exchange(self, sizes: Mapping[str, int]) -> Exchange:
        return Exchange(
            ranks=self._within,
            sizes=sizes,
            rows=self._rows.by_rank,
            dtype=dtype_of_sums(self._setup.parameters.scored),
            device=self._device,
        )

    def _sums(
        self,
        accepted: Tensor,
        preconditioners: Preconditioners,
        whole: WholeParameters,
        *,
        scale: float | None,
        counted: Iterable[str] = (),
    ) -> MatchingSums:
        return sums_of(
            self._setup,
            accepted,
            self._target,
            self._device,
            preconditioners,
            scale=scale,
            whole=whole.found,
            counted=counted,
        )

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
            if name in self._tables:
                self._tables[name].write(uses, places[name], indices=False)
                if setup.scale != 1.0:
                    places[name].div_(setup.scale)
                continue
            shape = setup.parameters.scored[name].shape
            block = Block.of(uses, shape, scale=setup.scale, limit=setup.memory_limit, buffer=setup.buffer)
            place = places[name].view(block.count, block.rows, block.columns)
            for start, stop in block.ranges():
                place[:, start:stop].copy_(block.out(start, stop))

    def _measure(
        self,
        preconditioners: Preconditioners,
        sums: GramSums,
        found: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        whole: Mapping[str, Tensor],
    ) -> None:
        """Add the parameters that this rank owns, of which it has the gradients of all rows."""
        some = {name: whole[name] for name in found}
        order = self._rows.order()

        def in_order(rows: Tensor) -> Tensor:
            return rows if order is None else rows[order.to(rows.device)]

        uses = {
            name: [
                self._tables[name].read(in_order(rows), in_order(indices[name]))
                if name in indices
                else Factors.explicit(in_order(rows).reshape(-1, *some[name].shape), some[name])
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


def _summed(ranks: Ranks, products: Mapping[Metric, Products]) -> dict[Metric, Products]:
    parts = [[one.gram, one.cross_gram, one.target_energy] for one in products.values()]
    summed = iter(ranks.summed([part for some in parts for part in some]))
    return {
        metric: replace(one, gram=next(summed), cross_gram=next(summed), target_energy=next(summed))
        for metric, one in products.items()
    }
