"""Slow and obvious answers."""

from __future__ import annotations

from collections.abc import Mapping

import scipy.optimize
import torch
from torch import Tensor

from ftw_optim import Factors, Preconditioner
from tests.support.models import Case


def candidate_gradients(case: Case, *, target: bool = False) -> list[dict[str, Tensor]]:
    """Gradient of every candidate's (or target example's) own loss by one backward each, zeros where none arrives."""
    parameters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    count = len(next(iter(case.target.values()))) if target else case.n
    found = []
    for row in range(count):
        losses = (case.target_losses if target else case.losses)(torch.tensor([row]))
        gradients = torch.autograd.grad(losses[0], list(parameters.values()), allow_unused=True)
        found.append(
            {
                name: torch.zeros_like(p) if gradient is None else gradient
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
            }
        )
    return found


def mean_gradient(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of some gradients."""
    return {name: torch.stack([gradient[name] for gradient in gradients]).mean(0) for name in gradients[0]}


def explicit_matching(
    gradients: list[dict[str, Tensor]],
    target: dict[str, Tensor],
    maps: Mapping[str, Preconditioner],
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix, cross-Gram and target energy from whole gradients, over the parameters that ``maps`` names."""
    times = {"preconditioned": 1, "update": 2, "euclidean": 0}[metric]  # that P is applied, all on the right

    def flat(gradient: dict[str, Tensor], times: int) -> Tensor:
        parts = []
        for name in maps:
            part = gradient[name]
            for _ in range(times):
                part = maps[name].apply(part)
            parts.append(part.flatten())
        return torch.cat(parts).double()

    lefts, rights = (torch.stack([flat(g, applied) for g in gradients]) for applied in (0, times))
    goal = flat(target, times)
    return lefts @ rights.T, lefts @ goal, flat(target, 0) @ goal


def objective(gram: Tensor, cross_gram: Tensor, weights: Tensor) -> float:
    """What the weights minimise, in float64."""
    gram, cross_gram = gram.double(), cross_gram.double()
    return float(weights @ gram @ weights / 2 - cross_gram @ weights)


def fit_from_vectors(vectors: Tensor, target: Tensor) -> Tensor:
    """Non-negative weights by scipy, from the vectors themselves; shape ``(k,)``, zero for a zero vector."""
    lengths = vectors.norm(dim=1)
    weights = torch.zeros_like(lengths)
    used = lengths > 0
    if used.any():
        # Columns of length one, and a target of length one: scipy's tolerance is not relative to either.
        columns = (vectors[used] / lengths[used, None]).T
        unit = float(target.norm()) or 1.0
        fitted, _ = scipy.optimize.nnls(columns.numpy(), (target / unit).numpy(), maxiter=100 * len(vectors))
        weights[used] = torch.from_numpy(fitted) * unit / lengths[used]
    return weights


def greedy_from_scratch(vectors: Tensor, target: Tensor, count: int) -> list[int]:
    """The greedy filter, everything computed anew from the vectors at each pick."""
    kept: list[int] = []
    while len(kept) < count:
        weights = fit_from_vectors(vectors[kept], target)
        left = target - weights @ vectors[kept]
        positive = vectors[kept][weights > 0]
        found: list[tuple[float, float, int]] = []
        for index, vector in enumerate(vectors):
            if index in kept or not vector.any():
                continue
            direction = vector / vector.norm()
            slack = float(direction @ left)
            apart = direction
            if len(positive):
                columns = (positive / positive.norm(dim=1, keepdim=True)).T
                apart = direction - columns @ torch.linalg.lstsq(columns, direction[:, None]).solution[:, 0]
            schur = float(apart @ apart)
            # Below these, slack and distance are rounding.
            if slack <= 1e-10 * float(target.norm()) or schur <= 1e-12:
                continue
            found.append((slack**2 / schur, slack, index))
        if not found:
            break
        # Of equal gains the largest slack, of equal slack the first.
        found = [entry for entry in found if entry[0] >= (1 - 1e-7) * max(gain for gain, _, _ in found)]
        found = [entry for entry in found if entry[1] >= (1 - 1e-7) * max(slack for _, slack, _ in found)]
        kept.append(found[0][2])
    return kept


def gradients(factors: Factors) -> Tensor:
    """Every candidate's gradient, position by position: shape (n, rows, columns)."""
    if factors.positions is None:
        owner = torch.arange(factors.count)[:, None].expand(factors.left.shape[:2])
    else:
        owner = factors.positions.candidates
    total = torch.zeros(factors.count, factors.rows, factors.columns, dtype=torch.float64)
    for row in range(factors.left.shape[0]):
        for position in range(factors.left.shape[1]):
            left = factors.left[row, position]
            if factors.indexed:
                left = torch.nn.functional.one_hot(left, factors.rows).double()
            one = torch.ones(1, dtype=torch.float64)
            right = one if factors.right is None else factors.right[row, position]
            if owner[row, position] >= 0:
                total[owner[row, position]] += torch.outer(left, right)
    return total


def adamw_map(gradients: list[dict[str, Tensor]], *, lr: float, name: str) -> Tensor:
    """The diagonal of ``P`` of an AdamW that saw these gradients of one parameter, for a coming step at their mean."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    moment = torch.zeros_like(gradients[0][name])
    for gradient in gradients:
        moment = beta2 * moment + (1 - beta2) * gradient[name] ** 2
    means = mean_gradient(gradients)
    mean = means[name]
    if mean.any():
        nonzero = mean[mean.abs() > 64 * torch.finfo(mean.dtype).eps * mean.abs().max()]
        size = mean.abs().clamp(min=0.03 * float(nonzero.square().mean().sqrt()))
    else:
        flat = torch.cat([one.flatten() for one in means.values()])
        size = flat.square().mean().sqrt().expand_as(mean)
    coming = len(gradients) + 1
    second = (beta2 * moment + (1 - beta2) * size**2) / (1 - beta2**coming)
    return lr * (1 - beta1) / (1 - beta1**coming) / (second.sqrt() + eps)


def redundancies(rows: Tensor, scores: Tensor) -> Tensor:
    """The largest cosine, 0 at least, of each row with any row of a higher score: shape (n,)."""
    found = torch.zeros(len(rows), dtype=rows.dtype)
    for one in range(len(rows)):
        for other in range(len(rows)):
            if scores[other] > scores[one]:
                cosine = rows[one] @ rows[other] / (rows[one].norm() * rows[other].norm())
                found[one] = max(found[one], cosine)
    return found
