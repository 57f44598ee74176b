"""What a sketch costs and how far it is off, beside the exact Gram matrix of the same layer.

    python benchmarks/sketches.py

One layer of random factors, under a diagonal map (as Adam's), whose gradients are multiplied out either way, and under
a scalar one, which folds into the factors. *Says* is the error that ``selection.sketch`` would hold, *is* that against
the exact products, both over the norms of the two gradients, root mean square. *Other way* is the time where a sketch
under a scalar map is not made in the way the cost model chose.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftw_optim import Diagonal, Factors, Preconditioner, Scalar, Sketch, _sketch
from ftw_optim._blocks import Buffer
from ftw_optim._gram import GramSums
from ftw_optim._products import Products
from ftw_optim._sketch import SketchSums

REPEATS = 5
ROWS, COLUMNS = 512, 1536


def run(
    factors: Factors, target: Tensor, made: Preconditioner, sketch: Sketch | None, buffer: Buffer
) -> tuple[float, Products]:
    """Milliseconds, and the products."""
    what: dict[str, Any] = {
        "shapes": {"weight": target.shape},
        "metrics": ["preconditioned"],
        "dtype": torch.float32,
        "device": target.device,
        "scale": 1.0,
        "memory_limit": 2**28,
        "buffer": buffer,
    }
    everyone, of = torch.ones(factors.count, dtype=torch.bool), {"weight": target}
    start = time.perf_counter()
    sums: GramSums | SketchSums
    if sketch is None:
        sums = GramSums(everyone, of, lambda name, reference: made, **what)
    else:
        sums = SketchSums(everyone, of, lambda name, reference: made, sketch=sketch, seed=0, **what)
    sums.add("weight", [factors])
    products: Mapping[str, Products] = sums.products()
    return 1e3 * (time.perf_counter() - start), products["preconditioned"]


def off(found: Products, exact: Products) -> float:
    """Root mean square of the differences, over the norms."""
    norms = exact.gram.diagonal().sqrt()
    return float(((found.gram - exact.gram) / (norms[:, None] * norms)).square().mean().sqrt())


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, a layer of {ROWS} x {COLUMNS}")
    print("map        n    t    dim   exact ms  sketch ms  other way    says       is")
    chosen = _sketch._convolving_is_cheaper
    for kind, (n, t), dim in itertools.product(
        ("diagonal", "scalar"), ((16, 128), (64, 128), (256, 64), (16, 16)), (1024, 4096)
    ):
        generator = torch.Generator().manual_seed(0)
        factors = Factors(
            left=torch.randn(n, t, ROWS, generator=generator), right=torch.randn(n, t, COLUMNS, generator=generator)
        )
        target = torch.randn(ROWS, COLUMNS, generator=generator)
        made = Scalar(0.5) if kind == "scalar" else Diagonal(torch.rand(ROWS, COLUMNS, generator=generator) + 0.1)
        times: dict[str, list[float]] = {"exact": [], "chosen": [], "other": []}
        found, buffer = {}, Buffer()
        for _ in range(REPEATS):
            for way, spent in times.items():
                if way == "other":
                    _sketch._convolving_is_cheaper = lambda block, size: not chosen(block, size)
                try:
                    milliseconds, found[way] = run(
                        factors, target, made, None if way == "exact" else Sketch(dim=dim), buffer
                    )
                finally:
                    _sketch._convolving_is_cheaper = chosen
                spent.append(milliseconds)
        exact, sketched, other = (statistics.median(spent) for spent in times.values())
        print(
            f"{kind:<9}{n:>4}{t:>5}{dim:>7}{exact:>11.1f}{sketched:>11.1f}"
            f"{other if kind == 'scalar' else float('nan'):>11.1f}{float(found['chosen'].error):>9.4f}"
            f"{off(found['chosen'], found['exact']):>9.4f}"
        )


if __name__ == "__main__":
    main()
