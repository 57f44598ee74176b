"""The learned shares of sources as the data section of a trainer's configuration, and the records by their weight."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ftw_optim.report._data import Digest
from ftw_optim.report._samples import UNNAMED
from ftw_optim.selection_log._whole_file import whole_file

DECIMALS = 6


class Data(NamedTuple):
    """The data of one source: the name of a data set of a hub, or a file of JSON lines; and the source's share."""

    source: str
    file: Path | None
    share: float


def learned_shares(found: Digest) -> dict[str, float]:
    """Each source's share of the weight over the whole run; those without weight are left out.

    The shares are rounded to six decimals, and sum to one.

    Raises:
        ValueError: the log names no sources, or nothing was ever applied.
    """
    weights = {name: one.weight for name, one in found.totals.items() if one.weight > 0.0}
    if UNNAMED in weights:
        raise ValueError(
            "Expected a log that names the source of each candidate: pass sources= to SelectionLog.record."
        )
    if not weights:
        raise ValueError("Expected a log in which some candidate has a weight, to learn shares from; none has.")
    total = sum(weights.values())
    shares = {name: round(weight / total, DECIMALS) for name, weight in weights.items()}
    largest = max(shares, key=lambda name: shares[name])
    shares[largest] = round(shares[largest] + 1.0 - sum(shares.values()), DECIMALS)
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 0.0}


def mixture(found: Digest, files: Mapping[str, Path], form: str) -> str:
    """The learned shares as YAML, in one of :data:`FORMS`.

    Args:
        found: the numbers of a run.
        files: for each source that is one, its file of JSON lines, plain or gzip; others are data sets of a hub under
            the source's name.
        form: ``"trl"``: ``datasets`` with a ``fraction`` each (``DatasetMixtureConfig``); ``"axolotl"``: ``datasets``
            with a ``split`` of so many records that the shares come out and no record is repeated, for which files are
            counted; ``"llamafactory"``: ``dataset``, ``mix_strategy`` and ``interleave_probs``.

    Raises:
        ValueError: a file is that of no source, or the form cannot be had from what is known.
        FileNotFoundError: a file that must be counted is missing.
    """
    unknown = [name for name in files if name not in found.totals]
    if unknown:
        raise ValueError(f"Expected files of the sources {', '.join(found.totals)}, got one of {', '.join(unknown)}.")
    shares = learned_shares(found)
    none = [name for name in found.totals if name not in shares]
    lines = [
        f"# Shares of the weight that selection gave each source, over {found.steps:,} steps and "
        f"{found.candidates:,} candidates.",
        *[f"# Left out, as it had no weight: {_text(name)}" for name in none],
        *FORMS[form]([Data(name, files.get(name), share) for name, share in shares.items()]),
    ]
    return "\n".join(lines) + "\n"


def _trl(data: list[Data]) -> list[str]:
    lines = ["datasets:"]
    for one in data:
        where = {"path": one.source} if one.file is None else {"path": "json", "data_files": str(one.file)}
        lines += _entry(where | {"split": "train"}, {"fraction": f"{one.share:.{DECIMALS}f}"})
    return lines


def _axolotl(data: list[Data]) -> list[str]:
    if missing := [one.source for one in data if one.file is None]:
        raise ValueError(
            "Axolotl takes a part of each data set, so their sizes must be known: name a file of each source with "
            f"--data SOURCE=FILE; that of {', '.join(missing)} is missing."
        )
    sizes = [_lines_of(one.file) for one in data if one.file is not None]
    # As many records in all as there can be without repeating one.
    total = min(size / one.share for size, one in zip(sizes, data, strict=True))
    lines = ["# Add the type of your records to each.", "datasets:"]
    for one, size in zip(data, sizes, strict=True):
        count = min(size, round(one.share * total))
        lines += _entry({"path": str(one.file), "ds_type": "json", "split": f"train[:{count}]"}, {})
    return lines


def _llama_factory(data: list[Data]) -> list[str]:
    for one in data:
        if "," in one.source:
            raise ValueError(f"LLaMA-Factory takes names of data sets without commas, got {one.source!r}.")
    return [
        "# The names are those of your dataset_info.json.",
        f"dataset: {_text(','.join(one.source for one in data))}",
        "mix_strategy: interleave_under",
        f'interleave_probs: "{",".join(f"{one.share:.{DECIMALS}f}" for one in data)}"',
    ]


FORMS: Mapping[str, Callable[[list[Data]], list[str]]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llama_factory,
}
"""What a form makes of the sources' data: lines of YAML."""


def _entry(texts: Mapping[str, str], numbers: Mapping[str, str]) -> list[str]:
    """One item of a list of mappings."""
    pairs = [f"{name}: {_text(value)}" for name, value in texts.items()]
    pairs += [f"{name}: {value}" for name, value in numbers.items()]
    return [f"{'  - ' if number == 0 else '    '}{pair}" for number, pair in enumerate(pairs)]


def _text(value: str) -> str:
    """A text in YAML, of which JSON is a part, but for what its readers take for the end of a line."""
    return json.dumps(value, ensure_ascii=True)


def _lines_of(path: Path | None) -> int:
    assert path is not None
    if not path.is_file():
        raise FileNotFoundError(f"Expected JSON lines whose number tells how many to take, but there is no {path}.")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def write_records(found: Digest, out: Path) -> int:
    """Write a line of JSON for each record, that with the largest mean weight first; returns their number.

    ``id``, ``source``; ``mean_weight``, its mean share of the weight at the steps that offered it; ``offered`` and
    ``kept``, how often it was; ``score``, its mean utility in units of the mean size at its steps, with one offer of
    zero added.
    """
    count = 0
    with whole_file(out) as path, path.open("w", encoding="utf-8") as file:
        for one in found.samples.by_weight():
            line = {
                "id": one.id,
                "source": None if one.source == UNNAMED else one.source,
                "mean_weight": one.share,
                "offered": one.offered,
                "kept": one.kept,
                "score": one.score,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count
