"""Matching problems for hypothesis: any rank, any scale, duplicates, zero gradients, opposed candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from ftw_optim import Matching

TROUBLES = ("none", "none", "zero", "duplicate", "longer", "opposed", "near")


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A matching problem as explicit vectors, in coordinates in which the metric is the identity.

    Attributes:
        vectors: shape ``(n, d)`` float64, one candidate's gradient per row.
        target: shape ``(d,)`` float64, target gradient.
    """

    vectors: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def lengths(self) -> Tensor:
        """Shape ``(n,)``: how long each candidate's gradient is."""
        return self.vectors.norm(dim=1)

    def matching(self, dtype: torch.dtype = torch.float64) -> Matching:
        """The products of the vectors, multiplied and summed in ``dtype``."""
        vectors, target = self.vectors.to(dtype), self.target.to(dtype)
        # Entry by entry: equal vectors get equal entries, to the last bit, which no matrix product promises.
        # In small parts, over which torch starts no threads.
        parts = vectors.split(64)
        return Matching(
            gram=torch.stack([torch.cat([(part * vector).sum(-1) for part in parts]) for vector in vectors]),
            cross_gram=(vectors * target).sum(-1),
            target_energy=float((target * target).sum()),
            losses=torch.ones(len(vectors), dtype=dtype),
            generator=torch.Generator().manual_seed(0),
        )

    def take(self, indices: Tensor) -> Problem:
        """The problem of the candidates at ``indices``, in that order."""
        return replace(self, vectors=self.vectors[indices])

    def alike(self) -> Tensor:
        """Shape ``(n,)``: the first candidate that points the same way, to tell ties from mistakes."""
        unit = self.vectors / self.lengths.clamp(min=1e-300)[:, None]
        same = (unit[:, None] - unit[None, :]).norm(dim=2) < 1e-9
        return same.to(torch.int64).argmax(1)


def random_problem(n: int, dimension: int, *, seed: int, rank: int | None = None, decades: float = 0.0) -> Problem:
    """Random directions in a space of ``dimension``, or in ``rank`` of them, that lean towards the target.

    Args:
        n: how many candidates.
        dimension: of the vectors.
        seed: of the generator.
        rank: of all candidates together; the target is not confined to it.
        decades: lengths are between ``10 ** -decades`` and ``10 ** decades``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = normal(dimension)
    vectors = normal(n, dimension) + 0.3 * target
    if rank is not None:
        vectors = normal(n, rank) @ (normal(rank, dimension) + 0.3 * target)
    exponents = (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * decades
    return Problem(vectors=vectors * 10.0 ** exponents[:, None], target=target)


@st.composite
def problems(draw: st.DrawFn, *, max_candidates: int = 10, apart: float = 1e-2) -> Problem:
    """Problems with everything in them that breaks a solver, each candidate with one of the named troubles.

    Args:
        draw: given by hypothesis.
        max_candidates: how many candidates at most.
        apart: near duplicates are that far apart, relative to their length. Beside opposed candidates,
            weights may have to be as large as its inverse, and rounding in the objective as its square.
    """
    n = draw(st.integers(1, max_candidates), label="n")
    dimension = draw(st.integers(1, max_candidates + 3), label="dimension")
    rank = draw(st.one_of(st.none(), st.integers(1, dimension)), label="rank")
    wide = draw(st.sampled_from([0.0, 10.0]), label="decades")
    seed = draw(st.integers(0, 2**31), label="seed")
    problem = random_problem(n, dimension, seed=seed, rank=rank, decades=wide)
    vectors = problem.vectors
    trouble_of = draw(st.lists(st.sampled_from(TROUBLES), min_size=n, max_size=n), label="troubles")
    others = draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n), label="others")
    for index, (trouble, other) in enumerate(zip(trouble_of, others, strict=True)):
        if trouble == "zero":
            vectors[index] = 0.0
        elif trouble == "duplicate":
            vectors[index] = vectors[other]
        elif trouble == "longer":
            vectors[index] = 3.7 * vectors[other]
        elif trouble == "opposed":
            vectors[index] = -vectors[other]
        elif trouble == "near":
            vectors[index] = vectors[other] + apart * vectors[other].norm() * problem.target / problem.target.norm()
    target_scale = draw(st.sampled_from([1.0, 1e-10, 1e10]), label="target scale")
    return Problem(vectors=vectors, target=problem.target * target_scale)
