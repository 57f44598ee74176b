"""Candidate streams: every record once, in proportion, resumed at any position, and what is skipped is counted."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from ftw_optim.integrations.streaming import CandidateStream, TargetCycle, pad
from ftw_optim.selection_log import read_log

REPOSITORY = Path(__file__).parents[2]


def encode(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a record ``{"n": number}``: two tokens, or what the number asks for."""
    n = record["n"]
    if n % 11 == 5:
        return {"input_ids": [], "labels": []}
    if n % 11 == 7:
        return {"input_ids": [1, 2], "labels": [1, -100]}  # the first label is predicted by nothing
    if n % 11 == 9:
        return None
    return {"input_ids": [1, n], "labels": [-100, n], "n": n}


def numbers(first: int, count: int) -> list[dict[str, int]]:
    return [{"n": first + i} for i in range(count)]


def usable(first: int, count: int) -> list[int]:
    return [n for n in range(first, first + count) if n % 11 not in (5, 7, 9)]


def write(path: Path, lines: list[str | bytes]) -> Path:
    data = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def ids(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["sample_id"] for sample in samples]


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
        stopping_strategy="all_exhausted_without_replacement",
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
    "interleaved": _interleaved,
    "shards shuffled": lambda folder: _from_list(800, 12, 4).shuffle(seed=2, buffer_size=1),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Skipped a record")
        yield


# ---------------------------------------------------------------------- every record, once, in proportion


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
    assert {name: sorted(values) for name, values in found.items()} == expected
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


# ---------------------------------------------------------------------- resumed


def rounds(stream: CandidateStream) -> Iterator[Any]:
    """One round after the other, as epochs come."""
    while True:
        yield from stream


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


# ---------------------------------------------------------------------- skipped


DAMAGED: list[str | bytes] = [
    b"\xef\xbb\xbf" + b'{"n": 0}',  # a byte order mark
    "{broken",
    "",
    '{"n": 1}',
    b'{"n": "\xff"}',
    '["a list"]',
    '{"n": null}',
    '{"other": 2}',
    "[" * 100_000,
    '{"n": 5}',
    '{"n": 7}',
    '{"n": 9}',
    '{"n": 2}',
    '{"n": 3, "cut": "in the mid',
]
COUNTS = {
    "not JSON": 3,
    "not UTF-8": 1,
    "not a JSON object": 1,
    "encode: TypeError": 1,
    "encode: KeyError": 1,
    "empty": 1,
    "no label tokens": 1,
    "refused by encode": 1,
}


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


BAD = [{"n": 5}, {"n": 7}, {"n": 9}]


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


# ---------------------------------------------------------------------- with a DataLoader, and as a batch


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


# ---------------------------------------------------------------------- targets


@given(count=st.integers(1, 9), batch_size=st.integers(1, 12), seed=st.integers(0, 3), at=st.integers(0, 20))
def test_targets_are_cycled_in_orders_of_their_own_and_resume(count: int, batch_size: int, seed: int, at: int) -> None:
    records = [{"n": 11 * i} for i in range(count)]

    def fresh() -> TargetCycle:
        return TargetCycle(records, encode, batch_size=batch_size, seed=seed)

    batches = list(islice(fresh(), at + 5))
    cycle = fresh()
    assert [cycle.batch(number) for number in reversed(range(at + 5))] == batches[::-1]  # of the number alone
    order = [sample["sample_id"] for batch in batches for sample in batch]
    everything = sorted(f"target/{i}" for i in range(count))
    for first in range(0, len(order) - count + 1, count):
        assert sorted(order[first : first + count]) == everything
    killed, resumed = fresh(), fresh()
    list(islice(killed, at))
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    assert list(islice(resumed, 5)) == batches[at:]


def test_passes_and_seeds_differ() -> None:
    records = [{"n": 11 * i} for i in range(20)]
    cycle = TargetCycle(records, encode, batch_size=20)
    other = TargetCycle(records, encode, batch_size=20, seed=1)
    assert len({tuple(ids(batch)) for batch in (cycle.batch(0), cycle.batch(1), other.batch(0))}) == 3


def test_targets_skip_what_cannot_be_used(tmp_path: Path) -> None:
    cycle = TargetCycle(write(tmp_path / "t.jsonl", DAMAGED), encode, batch_size=3)
    assert cycle.skipped == COUNTS
    assert sorted(sample["n"] for sample in next(cycle)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"(?s)Expected target samples, got none from 3 records.*no label tokens"):
        TargetCycle(BAD, encode, batch_size=1)
    with pytest.raises(ValueError, match="a cycle with samples = 3, got 4"):
        cycle.load_state_dict({"batches": 1, "samples": 4, "seed": 0, "batch_size": 3})
    with pytest.raises(ValueError, match="0 or more, got -1"):
        cycle.batch(-1)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        TargetCycle(numbers(0, 2), encode, batch_size=0)


# ---------------------------------------------------------------------- a run that is killed


STEPS = 40


def start(directory: Path, *, may_end: bool) -> subprocess.Popen[bytes]:
    directory.mkdir(exist_ok=True)
    (directory / "progress").unlink(missing_ok=True)
    if may_end:
        (directory / "may_end").touch()
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "killed_run.py"), str(directory), str(STEPS), "4"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Weights, selection log and data order, after two kills with SIGKILL at random steps."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole, may_end=True)
    steps = sorted(random.Random(1).sample(range(2, STEPS), 2))
    for step in steps:
        process = start(killed, may_end=False)
        progress = killed / "progress"
        while process.poll() is None and not (progress.exists() and int(progress.read_text() or 0) >= step):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finished(start(killed, may_end=True))
    finished(uninterrupted)
    assert (killed / "order.txt").read_text() == (whole / "order.txt").read_text()
    assert (killed / "skipped.json").read_text() == (whole / "skipped.json").read_text()
    expected = torch.load(whole / "weights.pt", weights_only=True)
    for name, weights in torch.load(killed / "weights.pt", weights_only=True).items():
        assert torch.equal(weights, expected[name]), name
    for format in ("jsonl", "parquet"):
        logs = [read_log(run / format) for run in (whole, killed)]
        assert len(logs[0].steps) == STEPS
        one, other = ([{k: v for k, v in row.items() if k != "ms"} for row in log.steps] for log in logs)
        assert other == one
        assert list(logs[1].candidates()) == list(logs[0].candidates())
        assert list(logs[1].texts()) == list(logs[0].texts())
    for path in (whole / "jsonl").iterdir():
        if path.stem == "times":  # which no two runs share
            continue
        assert (killed / "jsonl" / path.name).read_bytes() == path.read_bytes()
