"""Candidate streams: every record once, in proportion, resumed at any position."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from inspect import getsource
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from ftw_optim import token_losses
from ftw_optim.integrations.streaming import CandidateStream, pad
from tests.support.streams import encode, ids, numbers, usable, write

pytestmark = pytest.mark.filterwarnings("ignore:Skipped a record")
WITHOUT_REPLACEMENT = "all_exhausted_without_replacement"  # older releases of datasets know no such strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files: plain, compressed, in several parts."""
    folder = tmp_path_factory.mktemp("records")
    for name, first, count in [("a.jsonl", 0, 23), ("b.jsonl.gz", 100, 19), ("c1.jsonl", 200, 4), ("c2.jsonl", 204, 9)]:
        write(folder / name, [json.dumps(record) for record in numbers(first, count)])
    datasets.disable_progress_bars()
    return folder


def _json_stream(folder: Path) -> datasets.IterableDataset:
    files = [str(folder / name) for name in ("a.jsonl", "c1.jsonl", "c2.jsonl")]
    return datasets.load_dataset("json", data_files=files, split="train", streaming=True)


def _from_list(first: int, count: int, shards: int) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(numbers(first, count)).to_iterable_dataset(num_shards=shards)


def _interleaved(folder: Path) -> datasets.IterableDataset:
    return datasets.interleave_datasets(
        [_from_list(700, 9, 2), _from_list(720, 5, 1)],
        probabilities=[0.7, 0.3],
        seed=1,
        stopping_strategy=WITHOUT_REPLACEMENT,
    )


# One of each kind; streams are made anew, as they are in a process that resumes.
KINDS: dict[str, Callable[[Path], Any]] = {
    "file": lambda folder: folder / "a.jsonl",
    "gzip": lambda folder: str(folder / "b.jsonl.gz"),
    "files": lambda folder: [folder / "c1.jsonl", folder / "c2.jsonl"],
    "list": lambda folder: numbers(300, 13),
    "dataset": lambda folder: datasets.Dataset.from_list(numbers(400, 8)),
    "json stream": _json_stream,
    "stream": lambda folder: _from_list(500, 17, 3),
    "mapped": lambda folder: (
        _from_list(600, 14, 2).map(lambda record: {"n": record["n"] + 1}).filter(lambda record: record["n"] > 603)
    ),
    **({"interleaved": _interleaved} if WITHOUT_REPLACEMENT in getsource(datasets.interleave_datasets) else {}),
    "shards shuffled": lambda folder: _from_list(800, 12, 4).shuffle(seed=2, buffer_size=1),
}


def test_one_round_gives_every_usable_record_of_every_kind_once(folder: Path) -> None:
    sources = {name: make(folder) for name, make in KINDS.items()}
    stream = CandidateStream(sources, encode, batch_size=4, shuffle_buffer=5)
    samples = [sample for batch in stream for sample in batch]
    found: dict[str, list[int]] = {}
    for sample in samples:
        found.setdefault(sample["source"], []).append(sample["n"])
    expected = {
        "file": usable(0, 23),
        "gzip": usable(100, 19),
        "files": usable(200, 13),
        "list": usable(300, 13),
        "dataset": usable(400, 8),
        "json stream": sorted(usable(0, 23) + usable(200, 13)),
        "stream": usable(500, 17),
        "mapped": usable(604, 11),
        "interleaved": sorted(usable(700, 9) + usable(720, 5)),
        "shards shuffled": usable(800, 12),
    }
    assert {name: sorted(values) for name, values in found.items()} == {name: expected[name] for name in KINDS}
    assert len(set(ids(samples))) == len(samples)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 5, 2]), (True, [5, 5])])
def test_the_samples_that_fill_no_batch_end_a_round(drop_last: bool, sizes: list[int]) -> None:
    records = numbers(11, 5) + numbers(22, 5) + numbers(33, 2)
    stream = CandidateStream({"a": records}, encode, batch_size=5, drop_last=drop_last)
    assert [len(batch) for batch in stream] == sizes
    assert [len(batch) for batch in stream] == sizes  # the next round


def test_sources_come_in_the_proportions_asked_for() -> None:
    sources = {"a": numbers(0, 3), "b": numbers(0, 5), "c": numbers(0, 50)}
    stream = CandidateStream(
        sources, encode, batch_size=None, passes=None, probabilities={"a": 1.0, "b": 2.0, "c": 5.0}, seed=4
    )
    counts = Counter(sample["source"] for sample in islice(stream, 4000))
    for name, share in {"a": 1 / 8, "b": 2 / 8, "c": 5 / 8}.items():
        # Five standard deviations of a binomial count.
        assert abs(counts[name] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_blocks_are_shuffled_within_themselves_and_anew_in_each_pass() -> None:
    records = [{"n": 11 * i} for i in range(12)]
    stream = CandidateStream({"a": records}, encode, batch_size=12, passes=3, shuffle_buffer=6)
    passes = [[int(name.split("/")[1]) for name in ids(batch)] for batch in stream]
    assert all(sorted(order[:6]) == list(range(6)) and sorted(order[6:]) == list(range(6, 12)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    (plain,) = CandidateStream({"a": records}, encode, batch_size=12)
    assert ids(plain) == [f"a/{i}" for i in range(12)]
    (next_round,) = CandidateStream({"a": records}, encode, batch_size=12, shuffle_buffer=6, seed=1)
    assert [int(name.split("/")[1]) for name in ids(next_round)] != passes[0]


def test_records_may_name_themselves_and_their_source() -> None:
    records = [{"n": 0, "id": 17, "from": "web"}, {"n": 1, "id": None, "from": None}, {"n": 5, "from": "web"}]
    stream = CandidateStream({"pool": records}, encode, batch_size=3, id_field="id", source_field="from")
    (batch,) = stream
    assert [(sample["sample_id"], sample["source"]) for sample in batch] == [("17", "web"), ("pool/1", "pool")]
    assert stream.skipped == {"web": {"empty": 1}}


def rounds(stream: CandidateStream) -> Iterator[Any]:
    """One round after the other, as epochs come."""
    while True:
        yield from stream


@pytest.mark.slow
@settings(max_examples=60)
@given(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3, unique=True),
    batch_size=st.sampled_from([None, 1, 3, 8]),
    shuffle_buffer=st.sampled_from([0, 1, 4, 100]),
    passes=st.sampled_from([1, 2, None]),
    position=st.integers(0, 30),
)
def test_a_stream_resumes_at_any_position(
    folder: Path, kinds: list[str], batch_size: int | None, shuffle_buffer: int, passes: int | None, position: int
) -> None:
    def fresh() -> CandidateStream:
        return CandidateStream(
            {name: KINDS[name](folder) for name in kinds},
            encode,
            batch_size=batch_size,
            shuffle_buffer=shuffle_buffer,
            passes=passes,
            seed=6,
        )

    whole = fresh()
    expected = list(islice(rounds(whole), position + 12))
    first = fresh()
    before = list(islice(rounds(first), position))
    state = json.loads(json.dumps(first.state_dict()))
    list(islice(rounds(first), 3))  # drawn by the killed run after its checkpoint
    second = fresh()
    second.load_state_dict(state)
    after = list(islice(rounds(second), 12))
    assert before + after == expected
    assert second.skipped == whole.skipped
    first.load_state_dict(state)  # in the same process
    assert list(islice(rounds(first), 12)) == after


@given(ahead=st.integers(0, 4), position=st.integers(0, 9))
@settings(max_examples=30)
def test_items_that_were_read_ahead_are_given_out_again(ahead: int, position: int) -> None:
    def fresh() -> CandidateStream:
        return CandidateStream({"a": numbers(0, 40)}, encode, batch_size=2, shuffle_buffer=7, passes=None, lookahead=4)

    expected = list(islice(fresh(), 20))
    reading = fresh()
    list(islice(reading, position + ahead))
    resumed = fresh()
    resumed.load_state_dict(reading.state_dict(position))
    assert list(islice(resumed, 20 - position)) == expected[position:]
    if position + ahead > 4:
        with pytest.raises(ValueError, match=r"one of the last 4 of .* items, got 0\. Raise lookahead="):
            reading.state_dict(0)


def test_an_interrupt_while_a_batch_is_drawn_loses_nothing() -> None:
    calls = 0

    def interrupted(record: Mapping[str, Any]) -> dict[str, Any] | None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return encode(record)

    arguments: dict[str, Any] = {"batch_size": 5, "shuffle_buffer": 6}
    stream = CandidateStream({"a": numbers(0, 30)}, interrupted, **arguments)
    found = [next(iter(stream))]
    with pytest.raises(KeyboardInterrupt):
        next(iter(stream))
    assert found + list(stream) == list(CandidateStream({"a": numbers(0, 30)}, encode, **arguments))


def test_the_state_of_another_stream_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [json.dumps(record) for record in numbers(0, 9)])
    arguments: dict[str, Any] = {"batch_size": 2, "seed": 1}
    stream = CandidateStream({"a": path}, encode, **arguments)
    next(iter(stream))
    state = stream.state_dict()
    for changed, name in [
        ({"seed": 2}, "seed"),
        ({"shuffle_buffer": 4}, "shuffle_buffer"),
        ({"passes": None}, "passes"),
        ({"probabilities": {"a": 2.0}}, "probabilities"),
    ]:
        with pytest.raises(ValueError, match=f"Expected the state of a stream with {name} ="):
            CandidateStream({"a": path}, encode, **{**arguments, **changed}).load_state_dict(state)
    with pytest.raises(ValueError, match="Expected the state of a stream with sources ="):
        CandidateStream({"b": path}, encode, **arguments).load_state_dict(state)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="Expected the state of a stream with sources ="):
        CandidateStream({"a": path}, encode, **arguments).load_state_dict(state)
    longer = CandidateStream(
        {"a": datasets.Dataset.from_list(numbers(0, 9)).to_iterable_dataset()}, encode, **arguments
    )
    next(iter(longer))
    shorter = CandidateStream(
        {"a": datasets.Dataset.from_list(numbers(0, 1)).to_iterable_dataset()}, encode, **arguments
    )
    shorter.load_state_dict(longer.state_dict())
    with pytest.raises(ValueError, match="hold what it held at the checkpoint"):
        list(shorter)


def test_a_data_loader_passes_batches_on_and_workers_are_refused() -> None:
    def loader(workers: int) -> DataLoader[Any]:
        stream = CandidateStream({"a": numbers(0, 9)}, encode, batch_size=3)
        return DataLoader(stream, batch_size=None, collate_fn=pad, num_workers=workers)

    plain = [pad(batch) for batch in CandidateStream({"a": numbers(0, 9)}, encode, batch_size=3)]
    for batch, expected in zip(loader(0), plain, strict=True):
        assert batch.keys() == expected.keys()
        assert all((batch[key] == expected[key]).all() for key in batch)
    with pytest.raises(NotImplementedError, match="Expected num_workers=0"):
        next(iter(loader(1)))


@pytest.mark.slow
def test_a_loader_that_reads_ahead_resumes_behind_what_was_consumed() -> None:
    """accelerate fetches one batch more than it has given out."""

    def prepared() -> tuple[CandidateStream, Any]:
        stream = CandidateStream({"a": numbers(0, 60)}, encode, batch_size=3, shuffle_buffer=8, lookahead=2)
        loader = DataLoader(stream, batch_size=None, collate_fn=pad)
        return stream, Accelerator(cpu=True).prepare(loader)

    def rows(batches: Any) -> list[Any]:
        return [batch["input_ids"].tolist() for batch in batches]

    expected = rows(prepared()[1])
    stream, loader = prepared()
    consumed = rows(islice(loader, 4))
    assert stream.state_dict()["position"]["items"] > 4
    resumed, loader = prepared()
    resumed.load_state_dict(stream.state_dict(4))
    assert consumed + rows(loader) == expected


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 10)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.table(input_ids),)


@pytest.mark.slow
def test_a_padded_batch_has_the_losses_of_its_samples_alone() -> None:
    torch.manual_seed(0)
    model = Bigram()
    samples = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([-100, 5])},
        {"input_ids": [6, 7, 8, 9], "labels": [-100, -100, -100, 9], "text": "not for the model"},
    ]
    batch = pad(samples, pad_token_id=9)
    alone = torch.cat([token_losses(model, pad([sample])) for sample in samples])
    torch.testing.assert_close(token_losses(model, batch), alone)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"][1].tolist() == [4, 5, 9, 9]
