"""Candidates from interleaved streams, and targets in cycles: resumed without losing a sample or serving one twice."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, final

from torch.utils.data import IterableDataset, get_worker_info

from ftw_optim.integrations.streaming._cursor import Cursor
from ftw_optim.integrations.streaming._records import Source, StatefulStream, reader_of
from ftw_optim.integrations.streaming._screening import Encode, Sample, Screening
from ftw_optim.integrations.streaming._target_cycle import TargetCycle, pad

__all__ = ["CandidateStream", "TargetCycle", "pad"]

_LOG = logging.getLogger("ftw_optim")


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
        self.batch_size, self.seed, self.passes, self.drop_last = batch_size, seed, passes, drop_last
        self.probabilities, self.lookahead, self.give_up_after = probabilities, lookahead, give_up_after
        self._screening = Screening(encode, id_field=id_field, source_field=source_field)
        self._cursors = {
            name: Cursor(name, reader_of(name, source), seed=seed, block_size=max(1, shuffle_buffer))
            for name, source in sources.items()
        }
        self._settings = {
            "sources": {name: cursor.reader.fingerprint() for name, cursor in self._cursors.items()},
            "seed": seed,
            "probabilities": probabilities,
            "passes": passes,
            "shuffle_buffer": shuffle_buffer,
        }
        self._items = self._draws = self._rounds = self._given = 0
        self._ended = False
        self._past: deque[dict[str, Any]] = deque([self._snapshot()], maxlen=lookahead + 1)

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """The number of skipped records, by source and reason."""
        return {source: dict(reasons) for source, reasons in self._screening.skipped.items()}

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
            self._rounds, self._given, self._ended = self._rounds + 1, 0, False
        while (item := self._item()) is not None:
            yield item

    def _item(self) -> list[Sample] | Sample | None:
        before = self._snapshot()
        samples: list[Sample] = []
        try:
            while len(samples) < (self.batch_size or 1) and (sample := self._sample()) is not None:
                samples.append(sample)
            if not self._given:
                raise ValueError(self._nothing("all sources"))
        except BaseException:  # an interrupt, too: what was drawn for this item is drawn again
            self._restore(before)
            raise
        if not samples or (self.drop_last and len(samples) < (self.batch_size or 1)):
            self._ended = True
            return None
        self._items += 1
        self._past.append(self._snapshot())
        return samples if self.batch_size is not None else samples[0]

    def _sample(self) -> Sample | None:
        """The next sample; None at the end of the round."""
        while alive := [cursor for cursor in self._cursors.values() if not self._exhausted(cursor)]:
            drawn = random.Random(f"{self.seed}/{self._draws}").random()
            self._draws += 1
            shares = list(accumulate(self.probabilities[cursor.name] for cursor in alive))
            cursor = next((c for c, share in zip(alive, shares, strict=True) if drawn * shares[-1] < share), alive[-1])
            if (sample := self._sample_of(cursor)) is not None:
                self._given += 1
                return sample
        return None

    def _exhausted(self, cursor: Cursor) -> bool:
        return self.passes is not None and cursor.passes >= (self._rounds + 1) * self.passes

    def _sample_of(self, cursor: Cursor) -> Sample | None:
        """The source's next sample; None where its last pass has ended."""
        in_a_row = 0
        while not self._exhausted(cursor):
            given = cursor.given
            found = cursor.take()
            if found is None:
                if cursor.passes == 1 and self._screening.skipped:
                    _LOG.warning(
                        "The source %r was read once; skipped so far, of all sources:\n%s",
                        cursor.name,
                        self._screening.table(),
                    )
                if self.passes is None and not given:
                    raise ValueError(self._nothing(f"the source {cursor.name!r}"))
                continue
            index, record = found
            sample = self._screening.sample(record, cursor.name, index)
            if sample is not None:
                cursor.given += 1
                return sample
            in_a_row += 1
            if in_a_row >= self.give_up_after:
                raise ValueError(self._nothing(f"{in_a_row:,} records in a row of the source {cursor.name!r}"))
        return None

    def _nothing(self, where: str) -> str:
        first = f" The first: {self._screening.first}." if self._screening.first else " There was no record."
        return f"Expected candidates, got none from {where}.{first} Skipped so far:\n{self._screening.table()}"

    def _snapshot(self) -> dict[str, Any]:
        return {
            "items": self._items,
            "draws": self._draws,
            "rounds": self._rounds,
            "given": self._given,
            "ended": self._ended,
            "cursors": {name: cursor.snapshot() for name, cursor in self._cursors.items()},
            "skipped": self._screening.skipped,
            "first_skipped": self._screening.first,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._items, self._draws, self._rounds = state["items"], state["draws"], state["rounds"]
        self._given, self._ended = state["given"], state["ended"]
        self._screening.skipped, self._screening.first = state["skipped"], state["first_skipped"]
        for name, cursor in self._cursors.items():
            cursor.restore(state["cursors"][name])

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
        elif (found := next((past for past in self._past if past["items"] == wanted), None)) is not None:
            position = found
        else:
            raise ValueError(
                f"Expected one of the last {self.lookahead} of {self._items} items, got {wanted}. Raise lookahead= to "
                "what is read ahead."
            )
        return {**self._settings, "position": position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the items that had been given out when :meth:`state_dict` was called.

        Raises:
            ValueError: the state is of a stream with other sources, seed, probabilities, passes or shuffle buffer.
        """
        for name, value in self._settings.items():
            if name not in state_dict or state_dict[name] != value:
                raise ValueError(
                    f"Expected the state of a stream with {name} = {value!r}, got {state_dict.get(name)!r}: the "
                    "samples would not be those of the run that is resumed. (Files are compared by name and size.)"
                )
        self._restore(state_dict["position"])
        self._past = deque([self._snapshot()], maxlen=self.lookahead + 1)
