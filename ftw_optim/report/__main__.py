"""The command ``python -m ftw_optim.report RUN``: a page about a run, and what others take from it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ftw_optim.report._data import Digest, digest
from ftw_optim.report._demo import DEMO, record_demo
from ftw_optim.report._mixture import FORMS, mixture, write_records
from ftw_optim.report._page import page_of
from ftw_optim.selection_log import read_log


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ftw_optim.report",
        description="One HTML page about a selection log, and what other trainers can take from it.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, nargs="?", help="directory of the log, or one with the log in a folder"
    )
    parser.add_argument("--demo", action="store_true", help=f"make a small run in {DEMO} first, and a page about it")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    parser.add_argument("--title", help="default: Selection in RUN")
    parser.add_argument(
        "--mixture", type=Path, metavar="FILE", help="write each source's learned share of the weight as YAML"
    )
    parser.add_argument("--mixture-format", choices=FORMS, default="trl", help="who reads it (%(default)s)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=_source_and_file,
        metavar="SOURCE=FILE",
        help="JSON lines of a source, for the mixture; a source without is a data set of a hub",
    )
    parser.add_argument("--records", type=Path, metavar="FILE", help="write all records by their mean weight")
    options = parser.parse_args(arguments)
    if options.demo == (options.run is not None):
        parser.error("expected the directory of a log, RUN, or --demo, and not both")
    if options.demo:
        options.run = DEMO
        record_demo(DEMO)
    try:
        run = read_log(options.run)
        found = digest(run, progress=_progress if sys.stderr.isatty() else lambda share: None)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        told = _written(found, options)
    except (FileNotFoundError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    title = options.title or f"Selection in {options.run.resolve().name}"
    out = options.out or options.run / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(found, title=title), encoding="utf-8")
    print(f"{out} ({len(run.steps):,} steps)", *told, sep="\n")
    return 0


def _written(found: Digest, options: argparse.Namespace) -> list[str]:
    """Write the files that are asked for beside the page; what is told of them, a line each."""
    told = []
    if options.mixture is not None:
        text = mixture(found, dict(options.data), options.mixture_format)
        options.mixture.parent.mkdir(parents=True, exist_ok=True)
        options.mixture.write_text(text, encoding="utf-8")
        told.append(f"{options.mixture} (shares for {options.mixture_format})")
    if options.records is not None:
        options.records.parent.mkdir(parents=True, exist_ok=True)
        told.append(f"{options.records} ({write_records(found, options.records):,} records)")
    return told


def _source_and_file(text: str) -> tuple[str, Path]:
    source, equals, file = text.rpartition("=")
    if not equals or not source or not file:
        raise argparse.ArgumentTypeError(f"expected SOURCE=FILE, got {text!r}")
    return source, Path(file)


def _progress(share: float) -> None:
    print(f"\rreading the log: {100 * share:3.0f} %", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
