"""The command line of ``finetune.py``: data that every machine has where none are given, and the arms that matter."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pays import command as pays
from pays.records import Record

from .corpus import TARGET_AREA, build_corpus
from .picture import write_picture

BASELINES = {"guide": "adamw-n-tokens", "target": "target+random-tokens"}
"""A mean over tokens is what Transformers' Trainer takes."""
ARMS = ["adamw-n-tokens", "adamw-n", "ftw-tokens", "tested-n", "target+random-tokens", "target-n-tokens"]
STEPS = 30
DAMAGE = "refusal=0.5"
"""Share of this installation's docstrings in the stream that have a refusal in their place."""
TARGET_RECORDS, TEST_RECORDS = 64, 256


def parse_arguments(
    arguments: Sequence[str] | None = None, *, description: str | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and those of its arguments that are for ``pays.py``."""
    parser = argparse.ArgumentParser(
        description=description, epilog="All other options are those of pays.py: see python benchmarks/pays.py --help."
    )
    parser.add_argument("--pool", help="records of the stream; default: docstrings of this Python installation")
    parser.add_argument("--target", help="examples of the target")
    parser.add_argument("--test", help="held-out examples of the target")
    parser.add_argument("--undamaged", action="store_true", help="this installation's docstrings as they are")
    parser.add_argument("--quick", action="store_true", help="a tiny random model on generated records")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="results (%(default)s)")
    options, others = parser.parse_known_args(arguments)
    if len({options.pool is None, options.target is None, options.test is None}) == 2:
        parser.error("--pool, --target and --test go together")
    return options, others


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> None:
    """Runs the comparison, or what is missing of it, prints the table, and writes the picture."""
    options, others = parse_arguments(arguments, description=description)
    given = ["--out", str(options.out), "--arms", *ARMS, "--seeds", "1", "--lr", "guide=2e-3", "target=2e-3"]
    given += ["--baseline", *map("=".join, BASELINES.items())]
    given += ["--steps", str(STEPS), "--threads", str(torch.get_num_threads())]
    if options.quick:
        given.append("--quick")
    elif options.pool is None:
        given += [*_embedded(options.out), "--own-source", TARGET_AREA]
        given += [] if options.undamaged else ["--damage", DAMAGE]
    else:
        given += ["--pool", options.pool, "--target", options.target, "--test", options.test]
    # The last of two equal options holds: that of the command line.
    figures = pays.main([*given, *others])
    if figures:
        write_picture(figures, options.out)


def _embedded(out: Path) -> list[str]:
    """The corpus as files, which are written once: another Python installation would have other docstrings."""
    folder = out / "records"
    names = ("pool", "target", "test")
    if not all((folder / f"{name}.jsonl").exists() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in zip(names, build_corpus(TARGET_RECORDS, TEST_RECORDS), strict=True):
            _write(folder / f"{name}.jsonl", records)
    return [part for name in names for part in (f"--{name}", str(folder / f"{name}.jsonl"))]


def _write(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
