"""The choice of a step: filter stage and weight stage, from the inner products to a selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ftw_optim._gram.inner_products import Products
from ftw_optim._gram.metric import Metric
from ftw_optim._matching.problem import Matching
from ftw_optim._matching.selection import Selection, SketchReport
from ftw_optim._matching.solution import WeightSolution
from ftw_optim._preconditioners.lookup import learning_rate_is_zero
from ftw_optim._step.comparison import Comparison
from ftw_optim._step.setup import StepSetup, metrics_of

Filter = Callable[..., Tensor]
Weight = Callable[..., WeightSolution]

NORMALIZATIONS = ("sum", "norm", None)


def choose(setup: StepSetup, comparison: Comparison) -> Selection:
    """Run the filter and weight stages of this step: its selection, which is not applied yet."""
    if not comparison.problem:
        return Selection.nothing(comparison.losses, comparison.accepted)
    with setup.clock.phase("solve"):
        selection = selection_from(
            comparison.problem,
            comparison.losses,
            comparison.accepted,
            metric=setup.metric,
            filter_stage=setup.filter,
            weight_stage=setup.weight,
            generator=setup.generator("stages"),
            learning_rate_is_zero=learning_rate_is_zero(setup.inner),
        )
    if setup.sketch is None:
        return selection
    error = float(comparison.problem[setup.metric].error)
    return replace(selection, sketch=SketchReport(dim=setup.sketch.dim, error=error))


def selection_from(
    products: Mapping[Metric, Products],
    losses: Tensor,
    accepted: Tensor,
    *,
    metric: Metric,
    filter_stage: Filter,
    weight_stage: Weight,
    generator: torch.Generator,
    learning_rate_is_zero: bool = False,
) -> Selection:
    """Run the filter and the weight stage on the accepted candidates.

    Args:
        products: the products of all candidates, in ``metric``, in the preconditioned one and in those the stages name.
        losses: shape ``(n,)``, on the CPU.
        accepted: mask of the candidates that are not rejected, bool (n,).
        metric: the metric of the first Matching that a stage sees.
        filter_stage: ``(matching, *more) -> kept``.
        weight_stage: ``(matching, *more) -> WeightSolution``, restricted to ``kept``.
        generator: random numbers for stages that draw.
        learning_rate_is_zero: whether the step cannot decrease anything, so that the predicted decrease is zero.

    Returns:
        The selection, with indices into all ``n`` candidates; ``combine`` is not set yet.

    Raises:
        TypeError: the filter stage did not return int64 indices of shape (k,).
        ValueError: the indices are not distinct or out of range, or the weights are not ``k`` finite numbers >= 0.
    """
    rows = accepted.nonzero()[:, 0]

    def matching(metric: Metric) -> Matching:
        one = products[metric]
        return Matching(
            gram=one.gram[rows][:, rows],
            cross_gram=one.cross_gram[rows],
            target_energy=float(one.target_energy),
            losses=losses[rows],
            generator=generator,
            offered=len(losses),
        )

    kept = torch.empty(0, dtype=torch.int64)
    fitted = torch.empty(0, dtype=torch.float64)
    converged = True
    if len(rows):
        kept = _checked_kept(filter_stage(matching(metric), *map(matching, metrics_of(filter_stage))), len(rows))
    if len(kept):
        solution = weight_stage(
            matching(metric).restrict(kept),
            *(matching(further).restrict(kept) for further in metrics_of(weight_stage)),
        )
        fitted = _checked_weights(solution.weights, len(kept))
        converged = solution.converged
    kept = rows[kept]
    total = float(fitted.sum())
    skipped = total <= 0.0
    weights = torch.zeros_like(fitted)
    if not skipped:
        weights = _normalised(
            fitted / total,
            total,
            products[Metric.PRECONDITIONED],
            kept,
            rows,
            getattr(weight_stage, "normalize", "sum"),
        )
    share = weights / weights.sum() if not skipped else weights
    energy, square, inner = _squares(products[metric], kept, weights)
    lengths = (square * energy) ** 0.5
    cosine = max(-1.0, min(1.0, inner / lengths)) if lengths > 0.0 else 0.0
    _, curvature, slope = _squares(products[Metric.PRECONDITIONED], kept, weights)
    return Selection(
        losses=losses,
        kept=kept,
        weights=weights,
        fitted_scale=total,
        gram=products[metric].gram,
        cross_gram=products[metric].cross_gram,
        target_energy=energy,
        cosine=cosine,
        residual=1.0 - max(0.0, cosine) ** 2,
        predicted_decrease=0.0 if learning_rate_is_zero else slope - curvature / 2,
        effective_size=0.0 if skipped else float(1.0 / share.square().sum()),
        rejected=(~accepted).nonzero()[:, 0],
        skipped=skipped,
        converged=converged,
        combine="skipped",
    )


def _squares(products: Products, kept: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """The squared norms of the target and of the combined gradient, and their inner product."""
    gram = products.gram.double()[kept][:, kept]
    inner = products.cross_gram.double()[kept] @ weights
    # Rounding may turn a vanishing square negative.
    return float(products.target_energy), max(0.0, float(weights @ gram @ weights)), float(inner)


def _normalised(
    weights: Tensor, total: float, products: Products, kept: Tensor, rows: Tensor, normalize: str | None
) -> Tensor:
    """The ``weights`` (k,), which sum to one, scaled as ``normalize`` asks."""
    if normalize is None:
        return weights * total
    if normalize == "norm":
        uniform = torch.full((len(rows),), 1.0 / len(rows), dtype=torch.float64)
        _, reference, _ = _squares(products, rows, uniform)
        _, square, _ = _squares(products, kept, weights)
        if square > 0.0:
            return weights * math.sqrt(reference / square)
    return weights


def _checked_kept(kept: Tensor, n: int) -> Tensor:
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.ndim != 1:
        raise TypeError(f"A filter stage must return the kept indices as int64 of shape (k,), got {kept!r}.")
    if len(kept) and (int(kept.min()) < 0 or int(kept.max()) >= n or len(torch.unique(kept)) < len(kept)):
        raise ValueError(f"A filter stage must return different indices from 0 to {n - 1}, got {kept.tolist()}.")
    return kept


def _checked_weights(weights: Tensor, k: int) -> Tensor:
    if weights.shape != (k,) or not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise ValueError(
            f"A weight stage must return {k} finite weights >= 0, one for each kept candidate, got {weights.tolist()}."
        )
    return weights.detach().double().cpu()
