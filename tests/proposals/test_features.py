"""Features of records: vectorised as they are, they equal what a loop over tokens gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim.proposals import features as module
from ftw_optim.proposals.drawing import salt
from ftw_optim.proposals.features import Features, keys_of, likeness_of, sources_of

TARGET = [{"input_ids": [1, 2, 2, 3], "labels": [-100, 2, 2, 3]}, {"input_ids": [3, 9], "labels": [-100, 9]}]


@st.composite
def records(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Ragged records, some without tokens, some without labels, as lists and as tensors."""
    result = []
    for _ in range(draw(st.integers(1, 7))):
        ids = draw(st.lists(st.integers(0, 12), max_size=9))
        labels = [token if draw(st.booleans()) else -100 for token in ids]
        if draw(st.booleans()):
            result.append({"input_ids": torch.tensor(ids, dtype=torch.int64), "labels": torch.tensor(labels)})
        else:
            result.append({"input_ids": ids, "labels": labels, "source": draw(st.sampled_from(["a", "b"]))})
    return result


def _slow_mixed(value: int) -> int:
    """The finaliser of splitmix64, one number at a time."""
    value &= (1 << 64) - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return value ^ (value >> 31)


def _slow_columns(pairs: set[tuple[int, int]], dim: int, seed: int) -> Tensor:
    columns = torch.zeros(dim, dtype=torch.float64)
    for token, part in pairs:
        number = _slow_mixed((2 * token + part) ^ salt("columns", seed))
        columns[(number & 0xFFFFFFFF) % dim] += 1.0 if (number >> 62) & 1 else -1.0
    return columns / math.sqrt(max(len(pairs), 1))


def _slow_likeness(ids: list[int]) -> float:
    profile: dict[int, float] = {}
    for record in TARGET:
        tokens = set(record["input_ids"])
        for token in tokens:
            profile[token] = profile.get(token, 0.0) + len(tokens) ** -0.5
    length = math.sqrt(sum(value**2 for value in profile.values()))
    return sum(profile.get(token, 0.0) for token in set(ids)) / length / math.sqrt(max(len(set(ids)), 1))


@settings(max_examples=50)
@given(samples=records(), seed=st.integers(0, 3))
def test_features_equal_those_of_a_loop_over_tokens(samples: list[dict[str, Any]], seed: int) -> None:
    found = Features(TARGET, dim=16, seed=seed)(samples)
    for row, sample in zip(found.double(), samples, strict=True):
        ids, labels = list(map(int, sample["input_ids"])), list(map(int, sample["labels"]))
        counted = [label != -100 for label in labels]
        torch.testing.assert_close(float(row[3]), _slow_likeness(ids), atol=1e-6, rtol=0.0)
        torch.testing.assert_close(float(row[4]), math.log1p(len(ids)), atol=1e-6, rtol=0.0)
        torch.testing.assert_close(float(row[5]), sum(counted) / max(len(ids), 1), atol=1e-6, rtol=0.0)
        pairs = set(zip(ids, map(int, counted), strict=True))
        torch.testing.assert_close(row[6:], _slow_columns(pairs, 16, seed), atol=1e-6, rtol=0.0)


@settings(max_examples=50)
@given(samples=records(), wide=st.booleans())
def test_features_of_an_embedding_equal_means_record_by_record(samples: list[dict[str, Any]], wide: bool) -> None:
    width, dim = (6, 5) if wide else (2, 5)  # with two parts, wider than the columns or not
    embedding = torch.randn(13, width, generator=torch.Generator().manual_seed(0))
    features = Features(TARGET, dim=dim, seed=1, embedding=embedding)
    found = features(samples)

    def mean(tokens: set[int]) -> Tensor:
        return embedding[sorted(tokens)].mean(0) if tokens else torch.zeros(width)

    directions = [torch.nn.functional.normalize(mean(set(record["input_ids"])), dim=0) for record in TARGET]
    profile = torch.nn.functional.normalize(torch.stack(directions).mean(0), dim=0)
    for row, sample in zip(found, samples, strict=True):
        ids, labels = list(map(int, sample["input_ids"])), list(map(int, sample["labels"]))
        likeness = torch.nn.functional.normalize(mean(set(ids)), dim=0) @ profile
        torch.testing.assert_close(row[3], likeness, atol=1e-5, rtol=0.0)
        parts = [
            mean({token for token, label in zip(ids, labels, strict=True) if (label != -100) == counted})
            for counted in (False, True)
        ]
        both = torch.cat(parts)
        if wide:
            drawn = torch.randn(2 * width, dim, generator=torch.Generator().manual_seed(1)) / math.sqrt(dim)
            both = both @ drawn
        torch.testing.assert_close(row[6:], both, atol=1e-5, rtol=0.0)


@settings(max_examples=50)
@given(samples=records())
def test_a_row_depends_on_its_record_alone(samples: list[dict[str, Any]]) -> None:
    features = Features(TARGET, dim=8, use_source=True)
    together = features(samples)
    alone = torch.cat([features([sample]) for sample in samples])
    assert torch.equal(together, alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 2)
        assert torch.equal(features(samples), together)


def test_keys_tell_records_apart_by_tokens_their_order_and_labels() -> None:
    samples: list[dict[str, Any]] = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
        {"input_ids": [2, 1, 3], "labels": [1, 2, 3]},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"input_ids": [1, 2, 3, 0], "labels": [1, 2, 3, 0]},
        {"input_ids": [], "labels": []},
        {"input_ids": [0], "labels": [0]},
    ]
    keys = keys_of(Features(None, dim=0)(samples))
    assert len(keys.unique()) == len(samples)
    again = [{"input_ids": [1, 2, 3], "labels": [5, 6, 7], "source": "x"}, {"input_ids": [1, 2, 3]}]
    assert (keys_of(Features(None, dim=0)(again)) == keys[0]).all()  # what the labels say is in the tokens


def test_sources_are_told_apart_and_enter_only_if_asked_for() -> None:
    samples = [{"input_ids": [1], "labels": [1], "source": source} for source in "abca"] + [{"input_ids": [1]}]
    plain, told = Features(None, dim=4)(samples), Features(None, dim=4, use_source=True)(samples)
    sources = sources_of(plain)
    assert sources[0] == sources[3]
    assert len(sources.unique()) == 4
    assert torch.equal(told[:, :10], plain)
    torch.testing.assert_close(told[:, 10:].square().sum(1), torch.ones(5))
    assert len(told[:, 10:].unique(dim=0)) == 4


def test_a_record_is_most_like_a_target_of_its_own_tokens() -> None:
    ids = [5, 6, 7, 400_000]
    features = Features([{"input_ids": ids}], dim=0)
    samples = [{"input_ids": ids[::-1] + ids}, {"input_ids": [*ids, 8, 9]}, {"input_ids": [8, 9]}]
    found = likeness_of(features(samples))
    torch.testing.assert_close(found, torch.tensor([1.0, math.sqrt(4 / 6), 0.0]).double(), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["lists", "tensors"])
def test_a_copy_of_the_embedding_is_kept(kind: Any) -> None:
    embedding = torch.nn.Parameter(torch.randn(9, 3, generator=torch.Generator().manual_seed(2)))
    features = Features([{"input_ids": kind([1, 2])}], dim=4, embedding=embedding)
    before = features([{"input_ids": kind([2, 3, 4])}])
    with torch.no_grad():
        embedding.zero_()
    assert torch.equal(features([{"input_ids": kind([2, 3, 4])}]), before)
    assert not before.requires_grad


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        ({"labels": [1]}, ValueError, "Expected samples with input_ids, got one with labels, sample 1"),
        ([1, 2], ValueError, "Expected samples with input_ids, got one with list, sample 1"),
        ({"input_ids": [1, 2], "labels": [1]}, ValueError, "got 1 labels for 2 tokens in sample 1"),
        ({"input_ids": [[1, 2]]}, TypeError, "Expected input_ids as integers in one row"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64)}, TypeError, "got Tensor in sample 1"),
        ({"input_ids": [0.5]}, TypeError, "Expected input_ids as integers in one row"),
        ({"input_ids": [1 << 50]}, ValueError, "Expected token ids, got numbers from 0 to"),
    ],
)
def test_what_is_no_sample_is_named(sample: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Features(TARGET, dim=4)([{"input_ids": [0]}, sample])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="Expected target samples, got none"):
        Features([], dim=4)
    with pytest.raises(ValueError, match=r"matrix of shape \(vocabulary, width\), got torch.float32 of shape \(3,\)"):
        Features(TARGET, dim=4, embedding=torch.ones(3))
    with pytest.raises(ValueError, match="floating-point matrix"):
        Features(TARGET, dim=4, embedding=torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="Expected token ids from 0 to 4, the rows of the embedding, got ids from 1 to 9"
    ):
        Features(TARGET, dim=4, embedding=torch.ones(5, 3))
    features = Features(None, dim=4, embedding=torch.ones(5, 3))
    for token in (-1, 5):
        with pytest.raises(ValueError, match="Expected token ids from 0 to 4"):
            features([{"input_ids": [1, token]}])
    with pytest.raises(ValueError, match=r"Expected features of shape \(1, 10\).*got \(2, 10\)"):
        features.given([{"input_ids": [1]}], torch.zeros(2, 10))
