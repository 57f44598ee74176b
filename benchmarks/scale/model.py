"""The time of a step on many devices, from the bytes that it sends and the arithmetic that it does.

A step adds to a plain one: multiplying out the scored gradients, their exchange, the Gram matrix, its sum, and the
solver. Everything is taken one after the other; nothing overlaps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ftw_optim import GreedyFilter, Matching, NonNegativeLeastSquares
from ftw_optim._ranks.grouping import ranks_of_one


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What a rank and its network do in a second.

    Attributes:
        training: floating point operations of forward and backward passes.
        products: those of products in float32.
        inside: bytes that a rank sends to others of its node.
        across: bytes that it sends to other nodes.
        latency: seconds that a collective takes however little it sends, for each doubling of the ranks.
        per_node: ranks of a node.
    """

    training: float = 400e12
    products: float = 50e12
    inside: float = 300e9
    across: float = 40e9
    latency: float = 20e-6
    per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and how it is trained.

    Attributes:
        name: for the table.
        parameters: numbers that take part in a forward pass.
        trained: share of the operations of a full backward pass that is needed.
        scored: scored numbers.
        updated: updated numbers.
        candidates: of a rank.
        tokens: of a candidate.
    """

    name: str
    parameters: float
    trained: float
    scored: float
    updated: float
    candidates: int = 4
    tokens: int = 2048


CASES = (
    Case(name="LoRA 16 on 8B", parameters=8e9, trained=0.5, scored=42e6, updated=42e6),
    Case(name="1B, last block scored", parameters=1.2e9, trained=1.0, scored=61e6, updated=1.2e9),
    Case(name="1B, all scored", parameters=1.2e9, trained=1.0, scored=1.2e9, updated=1.2e9),
    Case(name="8B, last block scored", parameters=8e9, trained=1.0, scored=218e6, updated=8e9),
)


def solve_seconds(n: int, *, repeats: int = 3) -> float:
    """The measured seconds of the filter and the weight stage among ``n`` candidates, here."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 64, generator=generator)
    target = torch.randn(64, generator=generator)
    matching = Matching(
        gram=rows @ rows.T,
        cross_gram=rows @ target,
        target_energy=float(target @ target),
        losses=torch.zeros(n),
        generator=generator,
    )
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        kept = GreedyFilter(keep=0.25)(matching)
        NonNegativeLeastSquares()(matching.restrict(kept))
        best = min(best, time.perf_counter() - start)
    return best


def group_of(case: Case, ranks: int) -> int:
    """The number of ranks that make one selection, as :class:`ftw_optim.SelectiveOptimizer` takes it by default."""
    return ranks_of_one([case.candidates] * ranks, None, warns=False)


def predicted(case: Case, ranks: int, speeds: Speeds, solve: float) -> dict[str, float]:
    """Milliseconds of a plain step's arithmetic, and of each part that a selective step adds."""
    group = group_of(case, ranks)
    near = speeds.inside if group <= speeds.per_node else speeds.across
    link = speeds.inside if ranks <= speeds.per_node else speeds.across
    share, among, n = 1 - 1 / ranks, 1 - 1 / group, group * case.candidates
    doublings = max(1, (ranks - 1).bit_length())
    tokens = case.candidates * case.tokens
    seconds = {
        "plain": 2 * case.parameters * tokens * (1 + 2 * case.trained) / speeds.training,
        "multiply out": 2 * case.scored * tokens / speeds.training,
        "exchange": 4 * case.candidates * case.scored * among / near,
        "gram": 2 * n * n * case.scored / group / speeds.products,
        "sum of it": 2 * among * 4 * n * n / near,
        "target": 2 * share * 4 * case.scored / link,
        "solve": solve,
        "latency": 8 * doublings * speeds.latency,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def table(counts: tuple[int, ...], speeds: Speeds) -> str:
    """The predictions for all cases, with what they assume."""
    lines = [
        f"Assumed of a rank: {speeds.training / 1e12:.0f} TFLOP/s in training, {speeds.products / 1e12:.0f} in float32 "
        f"products; {speeds.inside / 1e9:.0f} GB/s to {speeds.per_node - 1} others,",
        f"{speeds.across / 1e9:.0f} GB/s beyond; {1e6 * speeds.latency:.0f} us a collective and doubling of ranks; "
        "nothing overlaps. The solver was measured here, in groups of ranks with at most 2048 candidates.",
        "",
        f"{'milliseconds':24}{'ranks':>6}{'group':>6}{'plain':>9}{'out':>8}{'exch.':>8}{'gram':>8}{'sum':>8}{'target':>8}"
        f"{'solve':>8}{'wait':>8}{'added':>9}",
    ]
    for case in CASES:
        for ranks in counts:
            group = group_of(case, ranks)
            found = predicted(case, ranks, speeds, solve_seconds(group * case.candidates))
            parts = [found[name] for name in list(found)[1:]]
            cells = "".join(f"{part:>8.1f}" for part in parts)
            added = sum(parts) / found["plain"]
            lines.append(f"{case.name:24}{ranks:>6}{group:>6}{found['plain']:>9.1f}{cells}{added:>9.1%}")
    return "\n".join(lines)
