"""Candidates from interleaved streams, and targets in cycles: resumed without losing a sample or serving one twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, final

from torch.utils.data import IterableDataset, get_worker_info

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations._trainers.dealing import check_rank, part_of
from ftw_optim.integrations.streaming._cursor import Cursor
from ftw_optim.integrations.streaming._given import GivenItems
from ftw_optim.integrations.streaming._interleaving import Interleaving
from ftw_optim.integrations.streaming._proposing import Proposing, packed, unpacked
from ftw_optim.integrations.streaming._records import Source, StatefulStream, reader_of
from ftw_optim.integrations.streaming._screening import Encode, Sample, Screening
from ftw_optim.integrations.streaming._shares import LearnedShares, shares_of
from ftw_optim.integrations.streaming._target_cycle import TargetCycle, pad
from ftw_optim.proposals import Proposal

__all__ = ["CandidateStream", "LearnedShares", "TargetCycle", "pad"]


@final
class CandidateStream(IterableDataset[Any]):
    """Encoded samples from several sources, drawn in given proportions, in batches.

    The stream has one position: a second iterator goes on where the first one stopped, and after the end of a round
    with a new round through all sources, in another order. The same arguments give the same samples in the same order.

    A source is one or several paths of local JSON lines (plain or ``.gz``), a sequence of records, or a
    ``datasets.IterableDataset``. Files are read line by line, so that a broken line costs one record, where the
    ``datasets`` reader gives up the whole file. A shuffle buffer of ``datasets`` is refused: it loses its samples when
    a run is resumed.

    A record is skipped, and counted in :attr:`skipped`, if it cannot be read, if ``encode`` fails or returns None, if
    it has no tokens, or if no token but the first (which no position predicts) has a label. The first skipped record is
    reported in a warning; the counts are logged (``logging.getLogger("ftw_optim")``) when a source has been read once.

    With a ``DataLoader``, pass ``batch_size=None`` to the loader and leave its ``num_workers`` at 0. For a trainer that
    forms batches itself, pass ``batch_size=None`` here. Where a loader or trainer reads ahead, ask for the state after
    the items that were consumed: ``stream.state_dict(items)``, with a ``lookahead`` of at least what is read ahead.

    With a ``proposal``, an item's samples are chosen among ``read_ahead`` ones, which are read and encoded for it. Hand
    what came of them to :meth:`observe` after each step, so that the proposal learns. It is then a part of the stream:
    its state is in :meth:`state_dict`, and it proposes for no one else. Near the end of a round it chooses among fewer.
    With ``passed_over="keep"`` a round gives every sample once, and each item but the first reads only as many records
    as the one before gave out; without an end of the rounds, what no one wants stays and narrows the choice.

    With ``shares="learned"`` the sources' probabilities follow their share of the weight, see :class:`LearnedShares`;
    hand what came of the samples to :meth:`observe` here, too. The shares are a part of the stream's state.

    Args:
        sources: the sources, by name.
        encode: returns for a record a mapping with ``input_ids`` and ``labels`` (-100 where a token does not count) of
            one length, and whatever else the collator needs; None to skip the record.
        batch_size: number of samples in an item, which is a list; None: an item is one sample.
        seed: seed of the interleaving and of the order within sources.
        probabilities: a positive number for each source, scaled to sum to one; None: all the same. When a source is
            exhausted, the others are scaled up.
        passes: number of passes through each source in a round; None: without end.
        shuffle_buffer: number of records of a source in a block, which is shuffled; 0: the order of the source.
        id_field: the field with the name of the sample, kept as ``sample_id``; else the source's name and the record's
            number in it.
        source_field: the field with the record's source, kept as ``source``; else the source's name.
        drop_last: leave out the last samples of a round if they do not fill a batch.
        lookahead: number of last items for which :meth:`state_dict` can still be asked.
        give_up_after: number of records of one source, skipped in a row, at which an error is raised.
        proposal: what chooses, of :mod:`ftw_optim.proposals`; None: samples are given out as they are read.
        read_ahead: number of samples among which it chooses, at least ``batch_size`` times ``ranks``; an item that is
            one sample is chosen among as many.
        passed_over: ``"drop"``: samples that were not chosen are dropped. ``"keep"``: they wait and are offered again;
            they are in the checkpoint, so they must consist of lists, tensors, numbers and text.
        shares: ``"learned"`` or a :class:`LearnedShares`: probabilities follow the weight that selections give the
            sources; None: they stay what they are.
        rank: the number of this process, of ``ranks``. All items of a step together are an item of ``ranks`` times as
            many samples in one process, and every process reads and encodes all of them. The states of all ranks are
            the same after a step, and a run of another number of ranks goes on from any of them. Samples at the end of
            a round that are fewer than ``ranks`` are left out.
        ranks: number of processes that read the same sources.

    Raises:
        TypeError, ValueError, FileNotFoundError: an argument is not as described above.
        ValueError: while iterating: no sample came from all records of a round, from a whole pass through a source that
            is read without end, or from ``give_up_after`` records in a row.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        encode: Encode,
        *,
        batch_size: int | None,
        seed: int = 0,
        probabilities: Mapping[str, float] | None = None,
        passes: int | None = 1,
        shuffle_buffer: int = 0,
        id_field: str | None = None,
        source_field: str | None = None,
        drop_last: bool = False,
        lookahead: int = 0,
        give_up_after: int = 100_000,
        proposal: Proposal | None = None,
        read_ahead: int | None = None,
        passed_over: Literal["drop", "keep"] = "drop",
        shares: LearnedShares | str | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not isinstance(sources, Mapping) or not sources:
            raise TypeError(f"Expected sources by name, {{name: source}}, got {type(sources).__name__}.")
        for name, number in (("batch_size", batch_size), ("passes", passes), ("give_up_after", give_up_after)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be positive, got {number}.")
        probabilities = dict.fromkeys(sources, 1.0) if probabilities is None else dict(probabilities)
        if probabilities.keys() != sources.keys() or not all(0 < p < float("inf") for p in probabilities.values()):
            raise ValueError(
                f"Expected a positive probability for each of the sources {', '.join(sources)}, got {probabilities}."
            )
        streams = [id(source) for source in sources.values() if isinstance(source, StatefulStream)]
        if len(set(streams)) < len(streams):
            raise ValueError("Expected an IterableDataset of its own for each source: two would share one position.")
        check_rank(rank, ranks)
        self.rank, self.ranks = rank, ranks
        self.batch_size, self.seed, self.passes, self.drop_last = batch_size, seed, passes, drop_last
        self.probabilities, self.lookahead, self.give_up_after = probabilities, lookahead, give_up_after
        self._screening = Screening(encode, id_field=id_field, source_field=source_field)
        cursors = {
            name: Cursor(name, reader_of(name, source), seed=seed, block_size=max(1, shuffle_buffer))
            for name, source in sources.items()
        }
        self._samples = Interleaving(
            cursors,
            self._screening,
            seed=seed,
            probabilities=probabilities,
            passes=passes,
            give_up_after=give_up_after,
        )
        self._settings: dict[str, Any] = {
            "sources": {name: cursor.reader.fingerprint() for name, cursor in cursors.items()},
            "seed": seed,
            "probabilities": probabilities,
            "passes": passes,
            "shuffle_buffer": shuffle_buffer,
        }
        self._proposing: Proposing | None = None
        if proposal is not None:
            size = ranks * (batch_size or 1)
            self._proposing = Proposing(proposal, read_ahead=read_ahead, passed_over=passed_over, size=size)
            self._settings |= {"read_ahead": read_ahead, "passed_over": passed_over}
        elif read_ahead is not None:
            raise ValueError(f"Expected a proposal that chooses among the {read_ahead} samples read ahead, got none.")
        self._shares = shares_of(shares, probabilities, source_field=source_field)
        if self._shares is not None:
            self._settings["shares"] = self._shares.settings()
        self._items, self._ended = 0, False
        self._given = GivenItems(rank, ranks, remembered=lookahead)
        # Positions after the last items, each with the one before its item.
        self._past: deque[tuple[dict[str, Any], dict[str, Any]]] = deque(maxlen=lookahead + 1)
        self._past.append((self._snapshot(), {}))

    @property
    def proposal(self) -> Proposal | None:
        """What chooses, if there is a proposal."""
        return None if self._proposing is None else self._proposing.proposal

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """The number of skipped records, by source and reason."""
        return {source: dict(reasons) for source, reasons in self._screening.skipped.items()}

    @property
    def read(self) -> dict[str, int]:
        """The number of samples that were read for the proposal, by source; empty without a proposal."""
        return {} if self._proposing is None else dict(self._proposing.read)

    @property
    def passed_over(self) -> dict[str, int]:
        """The number of samples that were read and not given out, by source; they were dropped, or wait."""
        return {} if self._proposing is None else self._proposing.passed_over()

    @property
    def shares(self) -> dict[str, float]:
        """The probability of each source in the next item; they sum to one."""
        if self._shares is not None:
            return self._shares.probabilities()
        total = sum(self.probabilities.values())
        return {name: one / total for name, one in self.probabilities.items()}

    def observe(self, samples: Sequence[Mapping[str, Any]], selection: Selection) -> None:
        """Let proposal and shares learn from a step; call this instead of the proposal's own method.

        In a run of several processes every one of them learns from the candidates of all.

        Args:
            samples: the step's candidates, in the order of the closure, such as an item of this stream; of several
                processes this one's, of one item or of some that follow each other.
            selection: the selection among them, ``optimizer.selection``.

        Raises:
            ValueError: there is nothing that learns, or there are not as many samples as candidates.
        """
        if self._proposing is None and self._shares is None:
            raise ValueError(
                "Expected a stream with a proposal or shares, which can learn: pass proposal= and read_ahead=, or "
                'shares="learned".'
            )
        of_all = self._given.of_all_ranks(samples)
        if self._shares is not None:
            self._shares.observe(of_all, selection)
        if self._proposing is not None:
            self._proposing.observe(of_all, selection)

    def skipped_table(self) -> str:
        """The counts of :attr:`skipped` as text, with one line for each source and reason."""
        return self._screening.table()

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise NotImplementedError(
                "Expected num_workers=0: every worker of a DataLoader would read the whole stream, and its position "
                "would stay in the worker. Encoding runs in the training process."
            )
        if self._ended:
            self._samples.next_round()
            self._ended = False
        while (item := self._item()) is not None:
            yield item

    def _item(self) -> list[Sample] | Sample | None:
        before = self._snapshot()
        samples: list[Sample] = []
        size = self.ranks * (self.batch_size or 1)
        if self._shares is not None:
            self._samples.probabilities = self._shares.probabilities()
        try:
            if self._proposing is not None:
                samples = self._proposing.choose(self._samples.sample, all_or_none=self.drop_last)
            else:
                while len(samples) < size and (sample := self._samples.sample()) is not None:
                    samples.append(sample)
            if not self._samples.given:
                raise ValueError(self._samples.nothing("all sources"))
        except BaseException:  # an interrupt, too: what was drawn for this item is drawn again
            self._restore(before)
            raise
        if len(samples) < (size if self.drop_last else self.ranks):
            self._ended = True
            return None
        if self._proposing is not None or self._shares is not None:
            self._given.note(samples)
        if self._shares is not None:
            self._shares.given_out()
        samples = part_of(samples, self.rank, self.ranks)
        self._items += 1
        self._past.append((self._snapshot(), before))
        return samples if self.batch_size is not None else samples[0]

    def _snapshot(self) -> dict[str, Any]:
        position = {"items": self._items, "ended": self._ended, **self._samples.snapshot()}
        if self._shares is not None:
            position["shares"] = self._shares.snapshot()
        return position if self._proposing is None else {**position, "proposing": self._proposing.snapshot()}

    def _restore(self, position: Mapping[str, Any]) -> None:
        if self._proposing is not None:
            self._proposing.restore(position["proposing"])
        if self._shares is not None:
            self._shares.restore(position["shares"])
        self._items, self._ended = position["items"], position["ended"]
        self._samples.restore(position)

    def state_dict(self, items: int | None = None) -> dict[str, Any]:
        """The position, as JSON values.

        Args:
            items: number of items, from the beginning of the run, after which to take the position; None: all that were
                given out.

        Raises:
            ValueError: the item is not among the last ``lookahead`` ones.
        """
        wanted = self._items if items is None else items
        if items is None:
            position = self._snapshot()
        elif (found := next((past for past, _ in self._past if past["items"] == wanted), None)) is not None:
            position = found
        else:
            raise ValueError(
                f"Expected one of the last {self.lookahead} of {self._items} items, got {wanted}. Raise lookahead= to "
                "what is read ahead."
            )
        if self._shares is not None:
            # Items that were read ahead are drawn again, each by what the shares were then.
            again = [before["shares"][0] for past, before in self._past if past["items"] > wanted]
            position = {**position, "shares": again + self._shares.snapshot()}
        if self._proposing is not None:
            # Items that were read ahead are proposed again, each by what the proposal was then.
            again = [before["proposing"]["states"][0] for past, before in self._past if past["items"] > wanted]
            states = again + self._proposing.snapshot()["states"]
            position = {**position, "proposing": packed({**position["proposing"], "states": states})}
        return {**self._settings, "position": position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the items that had been given out when :meth:`state_dict` was called.

        Raises:
            ValueError: the state is of a stream with other sources, seed, probabilities, passes, shuffle buffer,
                shares or number of samples read ahead, or of one with another proposal.
        """
        more = state_dict.keys() - self._settings.keys() - {"position"}  # of a stream with a proposal
        for name in [*self._settings, *sorted(more)]:
            value = self._settings.get(name)
            if name not in state_dict or state_dict[name] != value:
                raise ValueError(
                    f"Expected the state of a stream with {name} = {value!r}, got {state_dict.get(name)!r}: the "
                    "samples would not be those of the run that is resumed. (Files are compared by name and size.)"
                )
        position = state_dict["position"]
        if self._proposing is not None:
            position = {**position, "proposing": unpacked(position["proposing"])}
        self._restore(position)
        self._past.clear()
        self._past.append((self._snapshot(), {}))
