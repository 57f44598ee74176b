"""The command ``python -m ftw_optim.report RUN [--out page.html] [--title TITLE]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ftw_optim.report._page import page
from ftw_optim.selection_log import read_log


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ftw_optim.report", description="One HTML page about a selection log."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of the log, or one with the log in a folder")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    parser.add_argument("--title", help="default: Selection in RUN")
    options = parser.parse_args(arguments)
    try:
        run = read_log(options.run)
    except (FileNotFoundError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    title = options.title or f"Selection in {options.run.resolve().name}"
    html = page(run, title=title, progress=sys.stderr.isatty())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    out = options.out or options.run / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    print(f"{out} ({len(run.steps):,} steps)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
