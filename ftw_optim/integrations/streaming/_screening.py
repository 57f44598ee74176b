"""Screening: records are encoded to samples; those that give none are counted by source and reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, final

from ftw_optim._step.losses import IGNORED
from ftw_optim.integrations.streaming._records import Record, Unreadable

Sample = dict[str, Any]
Encode = Callable[[Record], Mapping[str, Any] | None]
Counts = Mapping[str, Mapping[str, int]]


@final
class Screening:
    """Encodes records, and counts those that give no sample.

    Args:
        encode: returns for a record ``input_ids`` and ``labels`` of one length, and whatever else the collator needs;
            None to skip the record.
        id_field: the field with a record's name; None or missing: the source's name and the record's number.
        source_field: the field with a record's source; None or missing: the source's name.
    """

    def __init__(self, encode: Encode, *, id_field: str | None, source_field: str | None) -> None:
        self.encode, self.id_field, self.source_field = encode, id_field, source_field
        self.skipped: Counts = {}  # replaced, never changed: positions share it
        self.first: str | None = None

    def sample(self, found: Record | Unreadable, name: str, index: int) -> Sample | None:
        """The sample of record ``index`` of the source ``name``; None where it is skipped, which is counted.

        Raises:
            TypeError: ``encode`` returned no mapping with ``input_ids`` and ``labels``.
            ValueError: ``input_ids`` and ``labels`` differ in length.
        """
        place = f"record {index} of {name!r}"
        if isinstance(found, Unreadable):
            return self._skip(name, found.reason, found.detail)
        source = name if self.source_field is None else found.get(self.source_field)
        source = name if source is None else str(source)
        identity = None if self.id_field is None else found.get(self.id_field)
        try:
            encoded = self.encode(found)
        except Exception as error:  # a record that lacks a field, or has null or a number where text should be
            return self._skip(source, f"encode: {type(error).__name__}", f"{place}: {error!r}")
        if encoded is None:
            return self._skip(source, "refused by encode", f"{place}: encode returned None")
        if not isinstance(encoded, Mapping) or not {"input_ids", "labels"} <= encoded.keys():
            raise TypeError(
                "Expected encode(record) to return a mapping with input_ids and labels (-100 where a token does not "
                "count), or None to skip the record, got "
                f"{sorted(encoded) if isinstance(encoded, Mapping) else type(encoded).__name__} for {place}."
            )
        tokens, labels = _listed(encoded["input_ids"]), _listed(encoded["labels"])
        if not tokens:
            return self._skip(source, "empty", f"{place}: no tokens")
        if len(tokens) != len(labels):
            raise ValueError(
                f"Expected encode(record) to return a label for each token, got {len(labels)} labels for "
                f"{len(tokens)} tokens of {place}."
            )
        # The first label has no position before it that could predict it.
        if all(label == IGNORED for label in labels[1:]):
            return self._skip(source, "no label tokens", f"{place}: none of {len(labels)} labels counts")
        return {
            **encoded,
            "sample_id": f"{name}/{index}" if identity is None else str(identity),
            "source": source,
        }

    def _skip(self, source: str, reason: str, detail: str) -> Sample | None:
        of_source = self.skipped.get(source, {})
        self.skipped = {**self.skipped, source: {**of_source, reason: of_source.get(reason, 0) + 1}}
        if self.first is None:
            self.first = f"{reason}, {detail}"
            warnings.warn(
                f"Skipped a record ({self.first}). Further ones are counted by source and reason in .skipped.",
                stacklevel=2,
            )
        return None

    def table(self) -> str:
        """The counts as text, with one line for each source and reason."""
        rows = [
            (source, reason, count) for source, reasons in self.skipped.items() for reason, count in reasons.items()
        ]
        if not rows:
            return "no record was skipped"
        rows.sort(key=lambda row: (row[0], -row[2], row[1]))
        wide = max(len("source"), *(len(source) for source, _, _ in rows))
        lines = [f"{source:<{wide}}  {count:>9,}  {reason}" for source, reason, count in rows]
        return "\n".join([f"{'source':<{wide}}  {'skipped':>9}  reason", *lines])


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)
