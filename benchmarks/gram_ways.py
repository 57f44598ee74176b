"""Does the cost model choose the sooner way to a layer's share of the Gram matrix?

    python benchmarks/gram_ways.py

Every point of a grid over candidates, positions and widths runs both ways interleaved; regret is the time of the way
that was chosen over that of the better one, less one. The largest relative difference between the ways stands beside.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import Tensor

from ftw_optim import Factors, RankOne, Scalar
from ftw_optim.testing import FormedProducts, products_of

REPEATS = 5
WAYS = ("materialised", "tokens")


def run(factors: Factors, target: Tensor, structure: str, way: str | None) -> tuple[float, FormedProducts]:
    """Seconds, and the products."""
    rows, columns = target.shape
    made = Scalar(0.5) if structure == "scalar" else RankOne(torch.rand(rows) + 0.1, torch.rand(columns) + 0.1)
    start = time.perf_counter()
    found = products_of(factors, target, made, way=way)
    return time.perf_counter() - start, found


def main() -> None:
    """Print the grid and the median regret."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; ms multiplied out, ms tokens")
    regrets = []
    for n, t, (rows, columns), structure in itertools.product(
        (8, 32), (4, 16, 32, 64, 128), ((256, 256), (512, 1536), (16, 1024)), ("scalar", "rank 1")
    ):
        generator = torch.Generator().manual_seed(0)
        factors = Factors(
            left=torch.randn(n, t, rows, generator=generator), right=torch.randn(n, t, columns, generator=generator)
        )
        target = torch.randn(rows, columns, generator=generator)
        torch.manual_seed(0)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        grams = {}
        for _ in range(REPEATS):
            for way, spent in times.items():
                torch.manual_seed(0)
                seconds, found = run(factors, target, structure, way)
                spent.append(seconds)
                grams[way] = found.gram
        out, tokens = (statistics.median(spent) for spent in times.values())
        choice = run(factors, target, structure, None)[1].way
        regrets.append((tokens if choice == "tokens" else out) / min(out, tokens) - 1)
        error = float((grams["tokens"] - grams["materialised"]).abs().max() / grams["materialised"].abs().max())
        print(
            f"n {n:>3}  t {t:>4}  {rows:>4} x {columns:<5} {structure:<7}{1e3 * out:>9.2f}"
            f"{1e3 * tokens:>9.2f}  {'tokens' if choice == 'tokens' else 'out':<7}{regrets[-1]:>6.0%}   {error:.0e}"
        )
    middle, mean = statistics.median(regrets), statistics.mean(regrets)
    print(f"regret: median {middle:.0%}, mean {mean:.0%}, worst {max(regrets):.0%}")


if __name__ == "__main__":
    main()
