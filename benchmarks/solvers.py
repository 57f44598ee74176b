"""The filter and weight stages against scipy's non-negative least squares and against exhaustive search.

    python benchmarks/solvers.py            # about a minute, one thread

Problems are Gram matrices of random gradients in float32, as a step gives them: with a common direction, as candidates
of one mixture have, and with fewer dimensions than candidates, where weights are used up on the way.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy
import scipy.optimize
import torch
from torch import Tensor

from ftw_optim import GreedyFilter, Matching, NonNegativeLeastSquares, TopKFilter, solve_nnls

PROBLEMS = 11


def problem(n: int, dimensions: int, seed: int) -> tuple[Matching, Tensor, Tensor]:
    """A matching problem, and the vectors and target that it is made of."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, dimensions, generator=generator, dtype=torch.float64)
    vectors = torch.randn(n, dimensions, generator=generator, dtype=torch.float64) + 0.5 * common
    target = vectors.mean(0) + 0.3 * torch.randn(dimensions, generator=generator, dtype=torch.float64)
    matching = Matching(
        gram=(vectors @ vectors.T).float(),
        cross_gram=(vectors @ target).float(),
        target_energy=float(target @ target),
        losses=torch.zeros(n),
        generator=generator,
        offered=n,
    )
    return matching, vectors, target


def milliseconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """The time of one call, in milliseconds, and what it returned."""
    start = time.perf_counter()
    result = run()
    return 1e3 * (time.perf_counter() - start), result


def left_over(vectors: Tensor, target: Tensor, weights: Tensor) -> float:
    """Squared distance to the target, over its squared length."""
    return float((target - weights @ vectors).square().sum() / target.square().sum())


def by_scipy(vectors: Tensor, target: Tensor) -> Tensor:
    """The best non-negative weights."""
    return torch.from_numpy(scipy.optimize.nnls(vectors.T.numpy(), target.numpy(), maxiter=100 * len(vectors))[0])


def stages() -> None:
    """Times of both stages, and what they leave of the target."""
    print("n    k   dims    filter ms  weight ms   left over: greedy   top k   scipy on the greedy k   scipy on all n")
    for n, k, dimensions in ((16, 4, 1000), (64, 16, 1000), (256, 64, 1000), (256, 64, 100)):
        rows = []
        for seed in range(PROBLEMS):
            matching, vectors, target = problem(n, dimensions, seed)
            filtering, kept = milliseconds(lambda: GreedyFilter(keep=k)(matching))  # noqa: B023
            weighing, fitted = milliseconds(lambda: NonNegativeLeastSquares()(matching.restrict(kept)))  # noqa: B023
            top = TopKFilter(keep=k)(matching)
            rows.append(
                (
                    filtering,
                    weighing,
                    left_over(vectors[kept], target, fitted.weights),
                    left_over(vectors[top], target, NonNegativeLeastSquares()(matching.restrict(top)).weights),
                    left_over(vectors[kept], target, by_scipy(vectors[kept], target)),
                    left_over(vectors, target, by_scipy(vectors, target)),
                )
            )
        values = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(
            f"{n:<4} {k:<3} {dimensions:<6}{values[0]:>10.2f}{values[1]:>11.2f}{values[2]:>19.4f}{values[3]:>8.4f}"
            f"{values[4]:>23.4f}{values[5]:>17.4f}"
        )


def against_exhaustive_search() -> None:
    """Print the share of the best subset's match that the greedy subset reaches."""
    n, k = 12, 4
    shares, firsts = [], 0
    for seed in range(PROBLEMS):
        matching, vectors, target = problem(n, 30, seed)
        kept = GreedyFilter(keep=k)(matching)
        greedy = 1 - left_over(vectors[kept], target, by_scipy(vectors[kept], target))
        best = max(
            1 - left_over(vectors[list(some)], target, by_scipy(vectors[list(some)], target))
            for some in itertools.combinations(range(n), k)
        )
        shares.append(greedy / best)
        firsts += greedy > best - 1e-9
    print(
        f"n {n}, k {k}: the greedy subset matches {statistics.median(shares):.1%} (worst {min(shares):.1%}) of what "
        f"the best of all {k}-subsets does, and is the best in {firsts} of {PROBLEMS} problems"
    )


def against_scipy() -> None:
    """Time and objective of the weight stage alone."""
    print("k     ours ms   scipy ms   largest difference of what is left over")
    for k in (4, 16, 64, 256):
        ours, theirs, gaps = [], [], []
        for seed in range(PROBLEMS):
            _, vectors, target = problem(k, 500, seed)
            gram, cross = vectors @ vectors.T, vectors @ target
            one, fitted = milliseconds(lambda: solve_nnls(gram, cross))  # noqa: B023
            lower = numpy.linalg.cholesky(gram.numpy())
            right = numpy.linalg.solve(lower, cross.numpy())
            two, weights = milliseconds(lambda: scipy.optimize.nnls(lower.T, right)[0])  # noqa: B023
            ours.append(one)
            theirs.append(two)
            reference = left_over(vectors, target, torch.from_numpy(weights))
            gaps.append(abs(left_over(vectors, target, fitted.weights) - reference))
        print(f"{k:<4}{statistics.median(ours):>9.2f}{statistics.median(theirs):>11.2f}   {max(gaps):.0e}")


def main() -> None:
    """Print all."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, scipy {scipy.__version__}, one thread; medians of {PROBLEMS} problems\n")
    stages()
    print()
    against_scipy()
    print()
    against_exhaustive_search()


if __name__ == "__main__":
    main()
