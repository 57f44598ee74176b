"""Cost and error of a sketch, against the exact Gram matrix of the same layer.

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

import torch
from torch import Tensor

from ftw_optim import Diagonal, Factors, Preconditioner, Scalar, Sketch
from ftw_optim.testing import Buffer, FormedProducts, products_of

REPEATS = 5
ROWS, COLUMNS = 512, 1536
OTHER = {"materialised": "convolved", "convolved": "materialised"}


def run(
    factors: Factors, target: Tensor, made: Preconditioner, gram: str | Sketch, buffer: Buffer, way: str | None = None
) -> tuple[float, FormedProducts]:
    """Milliseconds, and the products."""
    start = time.perf_counter()
    found = products_of(factors, target, made, gram=gram, way=way, memory_limit=2**28, buffer=buffer)
    return 1e3 * (time.perf_counter() - start), found


def off(found: FormedProducts, exact: FormedProducts) -> float:
    """Root mean square of the differences, over the norms."""
    norms = exact.gram.diagonal().sqrt()
    return float(((found.gram - exact.gram) / (norms[:, None] * norms)).square().mean().sqrt())


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, a layer of {ROWS} x {COLUMNS}")
    print("map        n    t    dim   exact ms  sketch ms  other way    says       is")
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
        found: dict[str, FormedProducts] = {}
        buffer, sketch = Buffer(), Sketch(dim=dim)  # memory that is kept from call to call, as from step to step
        for _ in range(REPEATS):
            for which, spent in times.items():
                gram = "exact" if which == "exact" else sketch
                way = OTHER[found["chosen"].way] if which == "other" else None
                milliseconds, found[which] = run(factors, target, made, gram, buffer, way)
                spent.append(milliseconds)
        exact, sketched, other = (statistics.median(spent) for spent in times.values())
        print(
            f"{kind:<9}{n:>4}{t:>5}{dim:>7}{exact:>11.1f}{sketched:>11.1f}"
            f"{other if kind == 'scalar' else float('nan'):>11.1f}{found['chosen'].error:>9.4f}"
            f"{off(found['chosen'], found['exact']):>9.4f}"
        )


if __name__ == "__main__":
    main()
