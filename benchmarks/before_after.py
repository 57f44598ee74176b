"""Is a step as fast as it was? This checkout beside another one, interleaved in one run.

    python benchmarks/before_after.py path/to/another/checkout [--rounds 9] [--threads 1] [--checked]

Each checkout runs in a process of its own, with its own package and its own arms of ``step_cost.py``; the two make
their steps in turn. The ratio of every round is that of two neighbours in time, so that whatever else the machine does
falls out of the median. Plain AdamW steps stand beside: their ratio is 1 but for noise, and says how much there is.
The arms have no self-check; with ``--checked`` they have what is the default, made at their first steps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "2 layers of width 384, n 16, t 256": ("factors", {"layers": 2, "t": 256}),
    "last of 8 layers of width 256, n 16, t 128": (
        "graph",
        {"layers": 8, "width": 256, "t": 128, "k": 16, "m": 8, "r": 4, "scored": 1},
    ),
    "2 layers of width 384, n 8, t 256": ("rerun", {"layers": 2, "t": 256, "n": 8, "k": 2, "m": 2}),
    "LoRA 8 on 4 layers of width 128, n 16, t 64": ("factors", {"layers": 4, "width": 128, "t": 64, "lora": 8}),
    "4 layers of width 64, n 8, t 32": ("factors", {"layers": 4, "width": 64, "t": 32, "n": 8, "k": 2, "m": 2}),
}
"""The way that combines, and the fields of a ``Point``."""
TINY = {"1 layer of width 16, n 4, t 8": ("factors", {"layers": 1, "width": 16, "t": 8, "n": 4, "k": 1, "m": 1})}


def serve(checkout: str, threads: int, *, checked: bool) -> None:
    """Make the steps that the lines of standard input ask for; one line of output each, the seconds it took."""
    sys.path[:0] = [checkout, f"{checkout}/benchmarks"]
    import torch  # here: the parent process needs none

    import ftw_optim

    if not Path(ftw_optim.__file__).is_relative_to(checkout):
        raise RuntimeError(
            f"Expected the package of {checkout}, got {ftw_optim.__file__}. Is it a checkout of ftw_optim?"
        )
    torch.set_num_threads(threads)
    try:
        arms, points = importlib.import_module("step_cost.arms"), importlib.import_module("step_cost.points")
    except ImportError:  # a checkout from before there were folders
        arms, points = importlib.import_module("step_arms"), importlib.import_module("step_points")
    if checked:  # the arms of older checkouts take no such option
        made = arms.SelectiveOptimizer
        arms.SelectiveOptimizer = lambda *args, self_check, **options: made(*args, **options)
    steps: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        if "point" in asked:
            point = points.Point("", **asked["point"])
            steps = {
                "plain": arms.plain_arm(point, "cpu")[0],
                "ours": arms.selective_arm(point, asked["way"], "cpu")[0],
            }
            for step in steps.values():
                step(0)
                step(1)
        else:
            start = time.perf_counter()
            steps[asked["arm"]](asked["number"])
        print(time.perf_counter() - start, flush=True)


class Checkout:
    """A process that makes the steps of one checkout."""

    def __init__(self, path: Path, threads: int, *, checked: bool) -> None:
        command = [sys.executable, __file__, str(path), "--serve", "--threads", str(threads)]
        command += ["--checked"] if checked else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **asked: Any) -> float:
        """Seconds that the answer took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("The process of a checkout ended; what it says of it stands above.")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def compare(before: Path, after: Path, cases: dict[str, Any], *, rounds: int, threads: int, checked: bool) -> None:
    """Print a line for each case."""
    both = [Checkout(path, threads, checked=checked) for path in (before, after)]
    print(f"{'case':<48}{'way':<9}{'before ms':>10}{'after ms':>10}{'ratio':>8}  quartiles      plain")
    for label, (way, point) in cases.items():
        for one in both:
            one.ask(point=point, way=way)
        times: dict[str, list[list[float]]] = {"ours": [], "plain": []}
        for number in range(rounds):
            order = both if number % 2 else both[::-1]
            for arm, found in times.items():
                spent = {id(one): one.ask(arm=arm, number=2 + number) for one in order}
                found.append([spent[id(one)] for one in both])
        ratios = {arm: [later / earlier for earlier, later in found] for arm, found in times.items()}
        lower, middle, upper = statistics.quantiles(ratios["ours"], n=4, method="inclusive")
        earlier, later = (1e3 * statistics.median(column) for column in zip(*times["ours"], strict=True))
        print(
            f"{label:<48}{way:<9}{earlier:>10.1f}{later:>10.1f}{middle:>8.3f}  {lower:.3f} - {upper:.3f}"
            f"{statistics.median(ratios['plain']):>9.3f}",
            flush=True,
        )
    for one in both:
        one.close()


def main() -> None:
    """Compare, or serve the process that compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the one before")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checked", action="store_true", help="with the self-check as it is by default")
    parser.add_argument("--quick", action="store_true", help="one tiny case, to see that it runs")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(str(options.checkout.resolve()), options.threads, checked=options.checked)
        return
    cases = TINY if options.quick else CASES
    rounds, threads = options.rounds, options.threads
    compare(options.checkout.resolve(), HERE, cases, rounds=rounds, threads=threads, checked=options.checked)


if __name__ == "__main__":
    main()
