"""Runs the tests against other releases of Python, PyTorch and the frameworks, each row in an environment of its own.

::

    python tests/matrix.py                                # what has no result yet
    python tests/matrix.py --only oldest --rooms gram     # this, again
    python tests/matrix.py --list

A row takes up to half an hour, several gigabytes to download where its PyTorch comes with CUDA, and as many on the
disk. The results are added to ``tests/matrix_results.md`` room by room, so that a run which was stopped goes on where
it was. An interpreter is looked for on the path and among those of pyenv. Where ``uv`` is installed it makes the
environments, which then share the files that they have in common.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "matrix_results.md"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "lightning", "datasets")
"""Those whose ranges are tested, in the order of the columns."""
TESTERS = (
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "hypothesis>=6.168",
    "scipy>=1.15",
    "torch-optimizer>=0.3",
    "pytorch-optimizer>=4.1",
    "schedulefree>=1.4",
)
"""What the tests of the rooms need beside."""
OLDEST = (
    "torch==2.8.0",
    "transformers==4.56.2",
    "trl==0.24.0",
    "peft==0.17.1",
    "accelerate==1.10.1",
    "lightning==2.5.6",
    "datasets==4.0.0",
)
NEWEST = (
    "torch==2.14.1",
    "transformers==5.24.0",
    "trl==1.16.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "lightning==2.6.6",
    "datasets==5.2.0",
)
ROOMS = (
    "integrations",
    "step",
    "layers",
    "preconditioners",
    "capture",
    "factors",
    "gram",
    "matching",
    "proposals",
    "report",
    "score",
    "selection_log",
    "ranks",
)
FEW = ("factors", "gram", "layers", "matching", "selection_log")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment and the tests that run in it.

    Attributes:
        python: release of the interpreter, such as ``"3.10"``.
        requirements: what is installed beside what the tests need.
        rooms: folders of the tests; of these, those that are not slow.
    """

    python: str
    requirements: Sequence[str]
    rooms: Sequence[str] = field(default=ROOMS)


ROWS = {
    "oldest": Row(python="3.11", requirements=OLDEST),
    "newest": Row(python="3.13", requirements=NEWEST),
    "python-3.10": Row(python="3.10", requirements=OLDEST, rooms=FEW),
    "python-3.12": Row(python="3.12", requirements=NEWEST, rooms=FEW),
}
INTRODUCTION = """# Releases that were tested

By `python tests/matrix.py`, room by room of the tests, those that are not slow. What was run otherwise stands below.
The pins of `constraints.txt` are tested apart, by the README's command, on Python 3.11."""
INSTALLED = ("row", "Python", *PACKAGES)
BY_HAND = "## By hand"
"""The heading of what people write below the tables, which is kept."""
FOUND = ("row", "room", "passed", "failed", "skipped", "seconds")


def interpreter(release: str) -> str:
    """The path of an interpreter.

    Raises:
        FileNotFoundError: there is none that starts.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{release}"), *sorted(map(str, pyenv.glob(f"{release}.*/bin/python{release}")))]
    for path in found:
        if path is not None and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    raise FileNotFoundError(f"Expected python{release} on the path or among pyenv's, got {found}: install it.")


def environment(row: Row, folder: Path) -> Path:
    """The interpreter of a virtual environment with all that a row needs, made where there is none in the folder."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    base, wanted = interpreter(row.python), [*row.requirements, *TESTERS]
    if (uv := shutil.which("uv")) is not None:
        subprocess.run([uv, "venv", "-q", "--no-python-downloads", "--python", base, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--compile-bytecode", "--python", str(python), *wanted], check=True)
    else:
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def versions(python: Path) -> list[str]:
    """The installed releases: of the interpreter, and of :data:`PACKAGES`."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))"
    )
    told = subprocess.run([str(python), "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(told.stdout)
    return found


def tested(python: Path, room: str, workers: str) -> list[str]:
    """The numbers of tests of a room that passed, failed and were skipped, and the seconds it took.

    Raises:
        RuntimeError: pytest did not come to an end.
    """
    started = time.perf_counter()
    command = [str(python), "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-m", "not slow"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "-n", workers, f"tests/{room}"],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ran.returncode not in (0, 1):
        raise RuntimeError(f"Expected pytest to end with 0 or 1, got {ran.returncode}:\n{ran.stdout[-3000:]}")
    for line in ran.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(line, flush=True)
    counts = counted(ran.stdout)
    numbers = [counts["passed"], counts["failed"] + counts["error"], counts["skipped"]]
    return [*map(str, numbers), f"{time.perf_counter() - started:.0f}"]


def counted(printed: str) -> dict[str, int]:
    """The numbers of pytest's last line, such as ``2 failed, 10 passed, 1 skipped in 3.0s``."""
    last = printed.rstrip().rpartition("\n")[2]
    found = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {kind: found.get(kind, 0) for kind in ("passed", "failed", "skipped", "error")}


@dataclass
class Results:
    """What has been found, in a file.

    Attributes:
        path: the file.
        installed: the releases of each row.
        found: the numbers of each row's rooms.
        by_hand: what stands below the tables.
    """

    path: Path
    installed: dict[str, list[str]] = field(default_factory=dict)
    found: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    by_hand: str = ""

    @classmethod
    def of(cls, path: Path) -> Results:
        """The results in a file, which need not be there yet."""
        results = cls(path)
        tables, heading, below = (path.read_text(encoding="utf-8") if path.exists() else "").partition(BY_HAND)
        results.by_hand = heading + below.rstrip()
        for line in tables.splitlines():
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            if name in ROWS and len(cells) == len(INSTALLED) - 1:
                results.installed[name] = cells
            elif name in ROWS and len(cells) == len(FOUND) - 1:
                results.found[name, cells[0]] = cells[1:]
        return results

    def write(self) -> None:
        """Write the file, rows and rooms in their order."""
        rows = [[name, *self.installed[name]] for name in ROWS if name in self.installed]
        rooms = [
            [name, room, *self.found[name, room]]
            for name, row in ROWS.items()
            for room in row.rooms
            if (name, room) in self.found
        ]
        parts = [INTRODUCTION, _table(INSTALLED, rows), _table(FOUND, rooms), self.by_hand]
        text = "\n\n".join(part for part in parts if part)
        self.path.write_text(text + "\n", encoding="utf-8")

    def failed(self) -> list[str]:
        """The rows and rooms in which tests failed."""
        return [f"{row} {room}" for (row, room), numbers in self.found.items() if numbers[1] != "0"]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS), help="run this row, also where it has results")
    parser.add_argument("--rooms", nargs="+", metavar="ROOM", help="run these folders of the tests, with --only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results (default: %(default)s)")
    parser.add_argument("--environments", type=Path, help="folder to keep environments in (default: a temporary one)")
    parser.add_argument("--workers", default="2", help="processes of pytest (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the rows")
    options = parser.parse_args(arguments)
    if options.list:
        for name, row in ROWS.items():
            print(f"{name}: Python {row.python}, {', '.join(row.requirements)}; {', '.join(row.rooms)}")
        return 0
    if options.rooms and not options.only:
        parser.error("--rooms says which rooms of a row to run: name the row with --only")
    done = Results.of(options.out).found
    for name in [options.only] if options.only else list(ROWS):
        rooms = options.rooms or [room for room in ROWS[name].rooms if options.only or (name, room) not in done]
        with tempfile.TemporaryDirectory(prefix="ftw_optim_matrix_") as folder:
            python = environment(ROWS[name], (options.environments or Path(folder)) / name) if rooms else Path()
            for room in rooms:
                print(f"{name} {room} ...", flush=True)
                numbers = tested(python, room, options.workers)
                results = Results.of(options.out)  # another run may have written meanwhile
                results.installed[name] = versions(python)
                results.found[name, room] = numbers
                results.write()
                print(f"{name} {room}: {numbers[0]} passed, {numbers[1]} failed, {numbers[2]} skipped", flush=True)
    failed = Results.of(options.out).failed()
    if failed:
        print(f"tests failed in {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
