"""Accuracy of the preconditioner that is read from each inner optimizer's state, against its coming step.

Every supported optimizer makes twenty selective steps on a small network. At each step two numbers are compared, along
the combined gradient ``c`` and on copies: predicted ``<c, P c>`` and realised ``<c, step at zero gradient - step>``. A
second moment that is held fixed leaves out the step's own change of it; that change also rescales old momentum.

    python benchmarks/preconditioners.py [--steps 20] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ftw_optim import GreedyFilter, SelectiveOptimizer
from tests.support.models import mlp
from tests.support.optimizers import INNER, MAXIMIZING, MUONS, PROBED, movement


def ratios(name: str, steps: int) -> list[float]:
    """Realised over predicted movement at each step but the first, which some spend on their state alone."""
    case = mlp(torch.float64, 16)
    parameters = list(case.model.parameters())
    if name in MUONS:
        for parameter in parameters:
            parameter.requires_grad_(parameter.ndim == 2)
        parameters = [parameter for parameter in parameters if parameter.ndim == 2]
    optimizer = SelectiveOptimizer(INNER[name](parameters), case.model, case.target_losses, filter=GreedyFilter(keep=4))
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.backward(case.losses)
        if step and optimizer.selection is not None and not optimizer.selection.skipped:
            predicted, realised = movement(optimizer)
            found.append((-realised if name in MAXIMIZING else realised) / predicted)
        optimizer.step()
    return found


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what the optimizers say of themselves
    lines = [
        f"PyTorch {torch.__version__}, {platform.machine()}; realised over predicted movement along the combined",
        f"gradient, {options.steps - 1} selective steps of a 3-layer network in float64",
        "",
        f"{'optimizer':<34}{'median':>8}{'least':>9}{'most':>8}  {'sign':>6}",
    ]
    for name in INNER:
        found = ratios(name, options.steps)
        share = sum(ratio >= 0 for ratio in found) / len(found)
        label = f"{name}, probed" if name in PROBED else name
        lines.append(f"{label:<34}{statistics.median(found):>8.3f}{min(found):>9.3f}{max(found):>8.3f}  {share:>6.0%}")
        print("\n".join(lines) if len(lines) == 5 else lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "preconditioners.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
