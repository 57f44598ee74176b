"""Records of numbers, whole and damaged, for the tests of candidate streams."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
BAD = [{"n": 5}, {"n": 7}, {"n": 9}]
