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
        return Selection.nothing(comparison.losses, comparison.accepted, targets=comparison.targets)
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
            targets=comparison.targets,
            stale=setup.target.guides_no_more(setup.backwards),
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
    targets: int = 0,
    stale: bool = False,
) -> Selection:
    """Run the filter and the weight stage on the accepted candidates; target rows that take part are always kept.

    Args:
        products: the products of all candidates, in ``metric``, in the preconditioned one and in those the stages name.
        losses: shape ``(n,)``, on the CPU.
        accepted: mask of the candidates that are not rejected, bool (n,).
        metric: the metric of the first Matching that a stage sees.
        filter_stage: ``(matching, *more) -> kept``.
        weight_stage: ``(matching, *more) -> WeightSolution``, restricted to ``kept``.
        generator: random numbers for stages that draw.
        targets: number of the last rows that are no candidates but target rows that take part in the step.
        stale: whether the target gradient is formed no more.
        learning_rate_is_zero: whether the step cannot decrease anything, so that the predicted decrease is zero.

    Returns:
        The selection, with indices into all ``n`` candidates; ``combine`` is not set yet.

    Raises:
        TypeError: the filter stage did not return int64 indices of shape (k,).
        ValueError: the indices are not distinct or out of range, or the weights are not ``k`` finite numbers >= 0.
    """
    n = len(losses) - targets
    flags = accepted.tolist()[:n]
    rows = torch.tensor([row for row, flag in enumerate(flags) if flag], dtype=torch.int64)
    problems = {
        one: Matching(
            gram=given.gram,
            cross_gram=given.cross_gram,
            target_energy=float(given.target_energy),
            losses=losses,
            generator=generator,
            offered=n,
            cross_gram_error=given.cross_gram_error,
            stale=stale,
        )
        for one, given in products.items()
    }

    def among(candidates: Tensor, stage: Filter | Weight) -> list[Matching]:
        return [problems[one].restrict(candidates) for one in (metric, *metrics_of(stage))]

    kept = torch.empty(0, dtype=torch.int64)
    fitted: list[float] = []
    converged = True
    if len(rows):
        kept = rows.index_select(0, _checked_kept(filter_stage(*among(rows, filter_stage)), len(rows)))
    taking_part = torch.cat([kept, torch.arange(n, n + targets)]) if targets else kept
    if len(taking_part):
        solution = weight_stage(*among(taking_part, weight_stage))
        fitted, converged = _checked_weights(solution.weights, len(taking_part)), solution.converged
    total = math.fsum(fitted)
    skipped = total <= 0.0 and not targets
    if total > 0.0:
        shares = [weight / total for weight in fitted]
    else:  # of target rows that disagree each still is one of the target
        shares = [0.0] * len(kept) + [1 / targets] * targets if targets else [0.0] * len(kept)
    # Of the shares, which sum to one: the applied weights are these times the scale.
    squares = {one: _squares(problems[one], taking_part, shares) for one in {metric, Metric.PRECONDITIONED}}
    curvature, slope = squares[Metric.PRECONDITIONED]
    scale = 1.0
    normalize = getattr(weight_stage, "normalize", "sum")
    if normalize is None:
        scale = total or 1.0
    elif normalize == "norm" and curvature > 0.0 and total > 0.0:
        everyone = torch.cat([rows, taking_part[len(kept) :]])
        reference, _ = _squares(problems[Metric.PRECONDITIONED], everyone, [1.0 / len(everyone)] * len(everyone))
        scale = math.sqrt(reference / curvature)
    energy = problems[metric].target_energy
    square, inner = squares[metric]
    lengths = (square * energy) ** 0.5
    cosine = max(-1.0, min(1.0, inner / lengths)) if lengths > 0.0 else 0.0
    found = Selection(
        losses=losses,
        kept=kept,
        weights=torch.tensor([share * scale for share in shares[: len(kept)]], dtype=torch.float64),
        fitted_scale=total,
        gram=products[metric].gram,
        cross_gram=products[metric].cross_gram,
        target_energy=energy,
        cosine=cosine,
        residual=1.0 - max(0.0, cosine) ** 2,
        predicted_decrease=0.0 if learning_rate_is_zero else scale * (slope - scale * curvature / 2),
        effective_size=0.0 if skipped else 1.0 / sum(share * share for share in shares),
        rejected=torch.tensor([row for row, flag in enumerate(flags) if not flag], dtype=torch.int64),
        skipped=skipped,
        converged=converged,
        combine="skipped",
    )
    return found if not targets else _with_targets(found, n, [share * scale for share in shares[len(kept) :]])


def _with_targets(selection: Selection, n: int, weights: list[float]) -> Selection:
    """The selection of ``n`` candidates beside target rows, which came behind them, with the weights of these."""
    return replace(
        selection,
        losses=selection.losses[:n],
        gram=selection.gram[:n, :n],
        cross_gram=selection.cross_gram[:n],
        target_weights=torch.tensor(weights, dtype=torch.float64),
        target_losses=selection.losses[n:],
    )


def _squares(problem: Matching, rows: Tensor, weights: list[float]) -> tuple[float, float]:
    """The squared norm of the gradient combined from ``rows``, and its inner product with the target."""
    factors = torch.tensor(weights, dtype=torch.float64)
    gram = problem.gram.index_select(0, rows).index_select(1, rows).double()
    cross_gram = problem.cross_gram.index_select(0, rows).double()
    square, inner = (torch.stack([gram @ factors, cross_gram]) @ factors).tolist()
    # Rounding may turn a vanishing square negative.
    return max(0.0, square), inner


def _checked_kept(kept: Tensor, n: int) -> Tensor:
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.ndim != 1:
        raise TypeError(f"A filter stage must return the kept indices as int64 of shape (k,), got {kept!r}.")
    indices = kept.tolist()
    if indices and (min(indices) < 0 or max(indices) >= n or len(set(indices)) < len(indices)):
        raise ValueError(f"A filter stage must return different indices from 0 to {n - 1}, got {indices}.")
    return kept


def _checked_weights(weights: Tensor, k: int) -> list[float]:
    values = weights.tolist()
    if weights.shape != (k,) or not all(0.0 <= weight < math.inf for weight in values):
        raise ValueError(
            f"A weight stage must return {k} finite weights >= 0, one for each kept candidate, got {values}."
        )
    return list(map(float, values))
