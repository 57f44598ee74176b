"""Would ``torch.compile`` pay for the arithmetic between the backward pass and the small problem?

    python benchmarks/compiled.py [--threads 1] [--rounds 30] [--device cpu]

The arithmetic of AdamW's parameters in a bucket, as one function: factors multiplied out, their mean, ``P`` from
the second moment at that mean, ``R g`` with ``P = R R``, and the products of all pairs. Beside it the element-wise
part alone, all that a compiler can fuse; the rest are library calls. As it is against compiled with dynamic shapes,
which the library would need as batches differ in length; interleaved, after the compilation, whose seconds stand
beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import hardware
from step_cost.arms import wait
from torch import Tensor

BETA, EPS, LR, CORRECTION = 0.99, 1e-8, 1e-3, 0.3

SHAPES = {
    "LoRA 8, width 64, 60 layers": (8, 60, 16, 8, 64),
    "64 x 64, 60 layers": (8, 60, 16, 64, 64),
    "256 x 64, 30 layers": (8, 30, 16, 256, 64),
    "LoRA 8, width 576, 60 layers": (12, 60, 96, 8, 576),
    "576 x 576, one layer": (12, 1, 96, 576, 576),
    "1536 x 576, one layer": (12, 1, 96, 1536, 576),
}
"""Candidates, layers, positions, rows and columns of a bucket."""


def scaled(gradients: Tensor, reference: Tensor, moment: Tensor) -> Tensor:
    """``R g`` of the gradients ``(n, B * rows * columns)``, with ``P`` at the ``reference`` (B, rows, columns)."""
    moment = torch.lerp(moment, reference * reference, 1 - BETA)
    factor = (LR / ((moment / CORRECTION).sqrt() + EPS)).flatten()
    return gradients * factor.sqrt()


def products(left: Tensor, right: Tensor, mean: Tensor, moment: Tensor) -> Tensor:
    """The Gram matrix of a bucket's candidates, from their factors ``(n, B, t, rows)`` and ``(n, B, t, columns)``."""
    gradients = torch.bmm(left.flatten(0, 1).mT, right.flatten(0, 1)).view(len(left), -1)
    reference = (mean @ gradients).view(moment.shape).nan_to_num(0.0, 0.0, 0.0)
    rows = scaled(gradients, reference, moment)
    return rows @ rows.T


def compare(function: Callable[..., Tensor], inputs: tuple[Any, ...], *, rounds: int, device: str) -> dict[str, float]:
    """Milliseconds as it is and compiled, seconds of the compilation, and the relative difference of both results."""

    def seconds(run: Callable[..., Tensor]) -> float:
        start = time.perf_counter()
        run(*inputs)
        wait(device)
        return time.perf_counter() - start

    compiled = torch.compile(function, dynamic=True)
    first = seconds(compiled)
    plain = function(*inputs)
    difference = float((compiled(*inputs) - plain).norm() / plain.norm())
    pairs = [(seconds(function), seconds(compiled)) for _ in range(rounds)]
    as_it_is, faster = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return {"as it is": as_it_is, "compiled": faster, "compilation": first, "difference": difference}


def main() -> None:
    """Print a line for each shape and each of the two functions."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(", ".join(f"{name} {value}" for name, value in hardware(options.device).items()))
    print(f"{'':<48}{'as it is':>10}{'compiled':>10}{'ratio':>7}   {'compilation':<13}difference")
    for name, (n, count, t, rows, columns) in SHAPES.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        with torch.device(options.device):
            left, right = torch.randn(n, count, t, rows), torch.randn(n, count, t, columns)
            mean, moment = torch.full((n,), 1 / n), torch.rand(count, rows, columns)
            gradients, reference = torch.randn(n, count * rows * columns), torch.randn(count, rows, columns)
        for part, function, inputs in (
            ("all", products, (left, right, mean, moment)),
            ("element-wise part", scaled, (gradients, reference, moment)),
        ):
            found = compare(function, inputs, rounds=options.rounds, device=options.device)
            print(
                f"{f'{name}: {part}':<48}{found['as it is']:>7.2f} ms{found['compiled']:>7.2f} ms"
                f"{found['compiled'] / found['as it is']:>7.2f}   {found['compilation']:>9.1f} s  "
                f"{found['difference']:>10.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
