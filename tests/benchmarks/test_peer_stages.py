"""The peers' filter stages, against their formulas on explicit gradients."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import FilterStage, Matching, SelectiveOptimizer, UniformWeights, preconditioner_of

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pays.peers import GreatsFilter, LessFilter


class Explicit(NamedTuple):
    """Gradients, target and a diagonal preconditioner as vectors."""

    gradients: Tensor
    target: Tensor
    diagonal: Tensor

    @classmethod
    def drawn(cls, seed: int, *, n: int = 10, dimension: int = 6) -> Explicit:
        generator = torch.Generator().manual_seed(seed)
        gradients = torch.randn(n, dimension, generator=generator, dtype=torch.float64)
        # Lengths differ, or the cosine would order as the inner product does.
        gradients = gradients * torch.logspace(-1, 1, n, dtype=torch.float64)[:, None]
        target = torch.randn(dimension, generator=generator, dtype=torch.float64)
        return cls(gradients, target, torch.rand(dimension, generator=generator, dtype=torch.float64) * 10)

    def matching(self, power: int) -> Matching:
        """The problem in the metric ``P^power``."""
        scaled = self.gradients * self.diagonal**power
        return Matching(
            gram=scaled @ self.gradients.T,
            cross_gram=scaled @ self.target,
            target_energy=float((self.target * self.diagonal**power) @ self.target),
            losses=torch.zeros(len(self.gradients)),
            generator=torch.Generator(),
        )

    def given_to(self, stage: FilterStage) -> list[Matching]:
        """What an optimizer would give the stage: first its own metric, which neither peer uses, then theirs."""
        powers = {"euclidean": 0, "preconditioned": 1, "update": 2}
        return [self.matching(1), *(self.matching(powers[name]) for name in stage.metrics)]


def greats_directly(vectors: Explicit, keep: int, lr: float) -> list[int]:
    """Picks by the change of the target loss that a plain step on the picked ones and one more makes."""
    kept: list[int] = []
    for _ in range(keep):
        step = lr * vectors.gradients[kept].sum(dim=0)
        scores = {
            index: float(lr * (gradient @ vectors.target) - lr * (gradient @ step))
            for index, gradient in enumerate(vectors.gradients)
            if index not in kept
        }
        kept.append(max(scores, key=scores.__getitem__))
    return kept


@pytest.mark.parametrize("lr", [1e-6, 0.03, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_greats_picks_by_the_decrease_that_is_left(seed: int, lr: float) -> None:
    vectors = Explicit.drawn(seed)
    stage = GreatsFilter(keep=5, lr=lr)
    kept = stage(*vectors.given_to(stage))
    assert kept.dtype == torch.int64
    assert kept.tolist() == greats_directly(vectors, 5, lr)


def test_greats_takes_no_copy_of_what_it_has_but_a_better_one_twice() -> None:
    """At a rate where interaction counts; with almost none, copies come first."""
    gradients = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    vectors = Explicit(gradients, torch.tensor([1.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    apart, together = GreatsFilter(keep=2, lr=0.5), GreatsFilter(keep=2, lr=1e-3)
    assert apart(*vectors.given_to(apart)).tolist() == [0, 2]
    assert together(*vectors.given_to(together)).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_less_keeps_the_largest_cosines_of_updates_with_the_plain_target(seed: int) -> None:
    vectors = Explicit.drawn(seed)
    updates = vectors.gradients * vectors.diagonal
    cosines = nn.functional.cosine_similarity(updates, vectors.target[None], dim=1)
    stage = LessFilter(keep=4)
    kept = stage(*vectors.given_to(stage))
    assert kept.tolist() == cosines.argsort(descending=True)[:4].tolist()
    inner_products = vectors.matching(1).cross_gram.argsort(descending=True)[:4]
    assert kept.tolist() != inner_products.tolist(), "lengths must count, or this shows nothing"


def test_less_puts_a_candidate_without_a_gradient_between_those_that_help_and_those_that_do_not() -> None:
    gradients = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1e-3, 0.0]], dtype=torch.float64)
    vectors = Explicit(gradients, torch.tensor([1.0, 0.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    stage = LessFilter(keep=3)
    assert stage(*vectors.given_to(stage)).tolist() == [2, 1, 0]


@pytest.mark.parametrize("stage", [GreatsFilter(keep=20, lr=0.1), LessFilter(keep=20)], ids=["greats", "less"])
def test_fewer_candidates_than_asked_for_are_all_kept(stage: FilterStage) -> None:
    vectors = Explicit.drawn(0)
    assert sorted(stage(*vectors.given_to(stage)).tolist()) == list(range(10))


def test_the_optimizer_gives_each_peer_its_own_geometry() -> None:
    """In a real step, from gradients by autograd and the state of AdamW."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    inputs, targets = torch.randn(8, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    inputs *= torch.logspace(-1, 1, 8, dtype=torch.float64)[:, None]

    def losses(rows: Tensor) -> Tensor:
        return model(rows).square().mean(dim=1)

    for _ in range(3):  # a state in which the preconditioner differs between entries
        losses(inputs * torch.rand(8, 5, dtype=torch.float64)).mean().backward()
        inner.step()
        inner.zero_grad()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, model.weight, retain_graph=True)[0].flatten()

    target = gradient(losses(targets).mean())
    gradients = torch.stack([gradient(loss) for loss in losses(inputs)])
    reference = gradients.mean(dim=0).view_as(model.weight)  # what the step is expected to see
    ones = torch.ones_like(model.weight)
    diagonal = preconditioner_of(inner, model.weight, reference).apply(ones).flatten()
    vectors = Explicit(gradients, target, diagonal)
    cosines = nn.functional.cosine_similarity(gradients * diagonal, target[None], dim=1)
    expected = {
        GreatsFilter(keep=3, lr=0.1): greats_directly(vectors, 3, 0.1),
        LessFilter(keep=3): cosines.argsort(descending=True)[:3].tolist(),
    }
    before, state = model.weight.detach().clone(), copy.deepcopy(inner.state_dict())
    for stage, kept in expected.items():
        with torch.no_grad():
            model.weight.copy_(before)
        inner.load_state_dict(copy.deepcopy(state))
        optimizer = SelectiveOptimizer(
            inner, model, target=lambda: losses(targets), filter=stage, weight=UniformWeights(), metric="euclidean"
        )
        optimizer.step(lambda: losses(inputs))
        assert optimizer.selection.kept.tolist() == kept
