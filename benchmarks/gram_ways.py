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

from ftw_optim import Factors, RankOne, Scalar, _gram_ways
from ftw_optim._blocks import Block, Buffer
from ftw_optim._gram import GramSums

REPEATS = 5


def run(factors: Factors, target: Tensor, structure: str, tokens: bool) -> tuple[float, Tensor]:
    """Seconds, and the Gram matrix."""
    rows, columns = target.shape
    made = Scalar(0.5) if structure == "scalar" else RankOne(torch.rand(rows) + 0.1, torch.rand(columns) + 0.1)
    chosen = _gram_ways.tokens_are_cheaper
    _gram_ways.tokens_are_cheaper = lambda block, metrics: tokens
    try:
        start = time.perf_counter()
        sums = GramSums(
            torch.ones(factors.count, dtype=torch.bool),
            {"weight": target},
            lambda name, reference: made,
            shapes={"weight": target.shape},
            metrics=["preconditioned"],
            dtype=torch.float32,
            device=target.device,
        )
        sums.add("weight", [factors])
        return time.perf_counter() - start, sums.products()["preconditioned"].gram
    finally:
        _gram_ways.tokens_are_cheaper = chosen


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
        times: dict[bool, list[float]] = {True: [], False: []}
        grams = {}
        for _ in range(REPEATS):
            for tokens in (False, True):
                torch.manual_seed(0)
                seconds, grams[tokens] = run(factors, target, structure, tokens)
                times[tokens].append(seconds)
        medians = {tokens: statistics.median(found) for tokens, found in times.items()}
        block = Block(uses=[factors], shape=target.shape, scale=1.0, limit=2**28, buffer=Buffer())
        choice = _gram_ways.tokens_are_cheaper(block, 1)
        regrets.append(medians[choice] / min(medians.values()) - 1)
        error = float((grams[True] - grams[False]).abs().max() / grams[False].abs().max())
        print(
            f"n {n:>3}  t {t:>4}  {rows:>4} x {columns:<5} {structure:<7}{1e3 * medians[False]:>9.2f}"
            f"{1e3 * medians[True]:>9.2f}  {'tokens' if choice else 'out':<7}{regrets[-1]:>6.0%}   {error:.0e}"
        )
    middle, mean = statistics.median(regrets), statistics.mean(regrets)
    print(f"regret: median {middle:.0%}, mean {mean:.0%}, worst {max(regrets):.0%}")


if __name__ == "__main__":
    main()
