"""Damaged records: skipped, counted, and told by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from ftw_optim.integrations.streaming import CandidateStream
from tests.support.streams import BAD, COUNTS, DAMAGED, encode, numbers, write

pytestmark = pytest.mark.filterwarnings("ignore:Skipped a record")


@pytest.mark.parametrize("name", ["damaged.jsonl", "damaged.jsonl.gz"])
def test_damaged_records_are_skipped_and_counted_by_reason(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    stream = CandidateStream({"bad": write(tmp_path / name, DAMAGED)}, encode, batch_size=10)
    with pytest.warns(UserWarning, match=r"Skipped a record \(not JSON, .*damaged\.jsonl.*, line 2") as caught:
        (batch,) = stream
    assert len(caught) == 1
    assert [sample["n"] for sample in batch] == [0, 1, 2]
    assert stream.skipped == {"bad": COUNTS}
    for reason, count in COUNTS.items():
        assert f"bad             {count}  {reason}" in stream.skipped_table()
    assert "The source 'bad' was read once" in caplog.text
    assert "bad             3  not JSON" in caplog.text


def _endless_damage() -> Iterator[dict[str, int]]:
    while True:
        yield {"n": 5}


@pytest.mark.parametrize(
    ("sources", "options", "where"),
    [
        ({"bad": BAD}, {}, "all sources"),
        ({"bad": BAD, "worse": BAD}, {"passes": 3}, "all sources"),
        ({"bad": BAD}, {"passes": None}, "the source 'bad'"),
        ({"good": numbers(0, 4), "bad": BAD}, {"passes": None}, "the source 'bad'"),
        ({"bad": BAD * 3}, {"shuffle_buffer": 2, "passes": None}, "the source 'bad'"),
        ({"bad": "endless"}, {"give_up_after": 50}, "50 records in a row of the source 'bad'"),
        ({"bad": "endless"}, {"give_up_after": 50, "passes": None, "shuffle_buffer": 8}, "50 records in a row"),
    ],
    ids=str,
)
def test_a_stream_of_nothing_but_damage_is_an_error_that_counts(
    sources: dict[str, Any], options: dict[str, Any], where: str
) -> None:
    if sources["bad"] == "endless":
        sources = {"bad": datasets.IterableDataset.from_generator(_endless_damage)}
    stream = CandidateStream(sources, encode, batch_size=2, **options)
    with pytest.raises(ValueError, match=f"(?s)Expected candidates, got none from {where}.*The first: empty.*skipped"):
        list(islice(stream, 100))


def test_a_source_of_damage_among_others_is_no_error_where_it_ends() -> None:
    stream = CandidateStream({"good": numbers(0, 4), "bad": BAD}, encode, batch_size=2)
    assert sorted(sample["n"] for batch in stream for sample in batch) == [0, 1, 2, 3]
    assert stream.skipped == {"bad": {"empty": 1, "no label tokens": 1, "refused by encode": 1}}


def test_what_encode_must_return_is_said() -> None:
    for wrong, message in [
        ({"input_ids": [1]}, r"a mapping with input_ids and labels .* got \['input_ids'\] for record 0 of 'a'"),
        ([1, 2], "got list for record 0"),
    ]:
        with pytest.raises(TypeError, match=message):
            next(iter(CandidateStream({"a": numbers(0, 2)}, lambda record, w=wrong: w, batch_size=1)))
    with pytest.raises(ValueError, match="got 1 labels for 2 tokens of record 0"):
        next(
            iter(
                CandidateStream({"a": numbers(0, 2)}, lambda record: {"input_ids": [1, 2], "labels": [1]}, batch_size=1)
            )
        )


def test_sources_that_cannot_be_resumed_are_refused(tmp_path: Path) -> None:
    stream = datasets.Dataset.from_list(numbers(0, 9)).to_iterable_dataset(num_shards=2)
    shuffled = stream.shuffle(seed=1, buffer_size=4)
    for source in (shuffled, shuffled.map(lambda record: record), datasets.concatenate_datasets([stream, shuffled])):
        with pytest.raises(ValueError, match="'a' without a shuffle buffer"):
            CandidateStream({"a": source}, encode, batch_size=2)
    with pytest.raises(ValueError, match="an IterableDataset of its own for each source"):
        CandidateStream({"a": stream, "b": stream}, encode, batch_size=2)
    with pytest.raises(TypeError, match="a sequence of records, got generator"):
        CandidateStream({"a": (record for record in numbers(0, 2))}, encode, batch_size=2)  # type: ignore[dict-item]
    with pytest.raises(FileNotFoundError, match=r"there is no file none\.jsonl"):
        CandidateStream({"a": "none.jsonl"}, encode, batch_size=2)
    with pytest.raises(ValueError, match="got an empty list"):
        CandidateStream({"a": []}, encode, batch_size=2)
    with pytest.raises(TypeError, match="sources by name"):
        CandidateStream(numbers(0, 2), encode, batch_size=2)  # type: ignore[arg-type]
    for options, message in [
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"passes": 0}, "passes must be positive"),
        ({"probabilities": {"b": 1.0}}, "a positive probability for each of the sources a"),
        ({"probabilities": {"a": 0.0}}, "a positive probability"),
    ]:
        with pytest.raises(ValueError, match=message):
            CandidateStream({"a": numbers(0, 2)}, encode, **{"batch_size": 2, **options})
    whole = write(tmp_path / "cut.jsonl.gz", [json.dumps(record) for record in numbers(0, 500)])
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(OSError, match=r"Expected a whole gzip file, but .*cut\.jsonl\.gz ends in the middle"):
        list(CandidateStream({"a": whole}, encode, batch_size=2))
