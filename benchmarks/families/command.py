"""The command line of ``families.py``: a process for each family, the table, and what it comes to."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import transformers
from machine import hardware
from tqdm import tqdm

from .check import Verdict, verdict_of_way
from .models import TRAINED, Family, NotBuilt, case_of, families, parameter_count

WAYS = ("factors", "graph")
SECONDS = 60
MEMORY = 8 * 2**30
SHORT = {"float32": "float32", "bfloat16 with LoRA": "LoRA"}


@dataclass
class Row:
    """One family: its parameters, and the cells by kind of training and way."""

    family: Family
    parameters: int = 0
    cells: dict[tuple[str, str], Verdict] = field(default_factory=dict)


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families", nargs="+", metavar="NAME", help="names of the mappings, such as qwen3; default: all"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways of combining (default: both)")
    parser.add_argument("--out", type=Path, help="folder for families.txt")
    options = parser.parse_args(arguments)
    options.chosen = families(options.families)
    missing = {*(options.families or ())} - {family.name for family in options.chosen}
    if missing:
        parser.error(f"no such family in the mappings of Transformers: {', '.join(sorted(missing))}")
    return options


def _late(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done in {SECONDS} s")


def _cell(family: Family, trained: str, way: str) -> Verdict:
    """One cell, within its time."""
    signal.alarm(SECONDS)
    try:
        return verdict_of_way(partial(case_of, family, trained), way)
    except NotBuilt as reason:
        return Verdict("not run", str(reason).removeprefix("not run: "))
    except TimeoutError as error:
        return Verdict("late", str(error))
    except Exception as error:
        return Verdict("error", f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)


def _in_a_process(family: Family, ways: list[str], sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _late)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        sender.send(parameter_count(family))
    except NotBuilt as reason:
        sender.send(str(reason))
        return
    for trained in TRAINED:
        for way in ways:
            sender.send(((trained, way), _cell(family, trained, way)))


def examined(family: Family, ways: list[str]) -> Row:
    """All cells of a family, in a process of its own, which may crash or hang."""
    row = Row(family)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")  # not a fork of this process, which may have threads
    context.set_forkserver_preload(["transformers.modeling_utils", "peft", "ftw_optim.testing"])
    process = context.Process(target=_in_a_process, args=(family, ways, sender))
    process.start()
    sender.close()
    end = time.monotonic() + SECONDS * (1 + len(TRAINED) * len(ways))
    lost = Verdict("late", "the process was ended")
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            message = receiver.recv()
        except EOFError:
            lost = Verdict("crashed", "the process ended by itself")
            break
        if isinstance(message, int):
            row.parameters = message
        elif isinstance(message, str):
            lost = Verdict("not run", message)
        else:
            row.cells[message[0]] = message[1]
        if lost.word == "not run":
            break
    process.kill()
    process.join()
    for trained in TRAINED:
        for way in ways:
            row.cells.setdefault((trained, way), lost)
    return row


def brief(row: Row, ways: list[str]) -> str:
    """One line of the table."""
    cells = "".join(f"{row.cells[trained, way]!s:<27}" for trained in TRAINED for way in ways)
    return f"{row.family.name:<26}{row.family.architecture:<48}{row.parameters:>9,}  {cells}".rstrip()


def summary(rows: list[Row], ways: list[str]) -> str:
    """The counts of each column, and the reasons of all that is not exact."""
    lines = []
    for trained in TRAINED:
        for way in ways:
            counts = Counter(row.cells[trained, way].words for row in rows)
            named = ", ".join(f"{count} {word}" for word, count in counts.most_common())
            lines.append(f"{SHORT[trained]}, {way}: {named}")
    lines.append(f"{len(rows)} model classes")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for (trained, way), cell in row.cells.items():
            for one, what in ((cell, ""), (cell.last, ", last block")):
                if one is not None and one.text:
                    reason = f"{row.family.architecture}, {one.word}: {_one_line(one.text)}"
                    reasons.setdefault(reason, []).append(f"{SHORT[trained]} {way}{what}")
    lines += ["", "Reasons:"]
    for reason, cells in reasons.items():
        lines += textwrap.wrap(f"{reason} ({', '.join(cells)})", 150, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:400]} ..."


def table(rows: list[Row], ways: list[str], machine: str) -> str:
    """What is kept of a run."""
    return "\n".join([machine, "", head(ways), *(brief(row, ways) for row in rows), "", summary(rows, ways)])


def head(ways: list[str]) -> str:
    """The first line of the table."""
    cells = "".join(f"{f'{SHORT[trained]} {way}':<27}" for trained in TRAINED for way in ways)
    return f"{'family':<26}{'class':<48}{'params':>9}  {cells}".rstrip()


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> list[Row]:
    """Examine the families, print the table as it grows, keep it."""
    options = parse_arguments(arguments, description=description)
    machine = ", ".join(f"{key} {value}" for key, value in hardware("cpu").items())
    print(machine, "", head(options.ways), sep="\n", flush=True)
    rows: list[Row] = []
    with tqdm(options.chosen, unit="family", disable=not sys.stderr.isatty()) as bar:
        for family in bar:
            bar.set_description(family.name)
            rows.append(examined(family, options.ways))
            with bar.external_write_mode():
                print(brief(rows[-1], options.ways), flush=True)
    print("", summary(rows, options.ways), sep="\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "families.txt").write_text(table(rows, options.ways, machine) + "\n")
    return rows
