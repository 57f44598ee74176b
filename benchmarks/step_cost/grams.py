"""The Gram matrix of ``step_cost.py``: its error, and how else one would come by the same one."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from memory import LivePeak
from torch import Tensor, nn

from ftw_optim import Factors, GreedyFilter, SelectiveOptimizer, TargetGradient, preconditioner_of, token_losses
from ftw_optim.testing import RecordedShare, recorded

from .arms import TARGET_SEED, batch, build_model, losses_of, trained, wait
from .points import Point

OURS = "ours, a target of one and one kept"
STEPS, TARGET_TOKENS = 2, 8
TIMED = 3
LIMIT = 30.0
"""Seconds after which no third round is timed."""


class Problem:
    """A model after two ordinary steps, the candidates, and ours around the inner optimizer that made the steps.

    Attributes:
        model: the model.
        candidates: a batch.
        factors: ``P`` as the entries it multiplies by, by parameter.
    """

    def __init__(self, point: Point, device: str) -> None:
        self.point, self.device = point, device
        self.model = build_model(point, device)
        self.parameters = trained(self.model)
        inner = torch.optim.AdamW(self.parameters.values(), lr=1e-4)
        for number in range(STEPS):
            inner.zero_grad()
            losses_of(point, self.model, batch(point, point.n, number, device), device).mean().backward()
            inner.step()
        inner.zero_grad()
        self.candidates = batch(point, point.n, STEPS, device)
        self._optimizer = SelectiveOptimizer(
            inner,
            self.model,
            # Short, and one candidate kept: of the step nothing is left but the Gram matrix.
            TargetGradient(
                lambda: losses_of(point, self.model, batch(point, 1, TARGET_SEED, device, TARGET_TOKENS), device),
                refresh_every=point.r,
            ),
            filter=GreedyFilter(keep=1),
            combine="factors",
            self_check=False,
        )
        mean = torch.autograd.grad(self.losses().mean(), list(self.parameters.values()))
        # float32: as the library has the expected gradient, whatever the parameters are in.
        references = {
            name: g.to(torch.promote_types(g.dtype, torch.float32))
            for name, g in zip(self.parameters, mean, strict=True)
        }
        self.factors = {
            name: preconditioner_of(self._optimizer, parameter, references[name]).apply(
                torch.ones_like(references[name])
            )
            for name, parameter in self.parameters.items()
        }

    def losses(self) -> Tensor:
        """The losses of the candidates."""
        return losses_of(self.point, self.model, self.candidates, self.device)

    def ours(self) -> Tensor:
        """The Gram matrix, by a selection that changes nothing."""
        self._optimizer.backward(self.losses)
        self._optimizer.zero_grad()
        assert self._optimizer.selection is not None
        return self._optimizer.selection.gram

    def recorded(self) -> tuple[Tensor, list[RecordedShare]]:
        """The Gram matrix, and what it was formed from, parameter by parameter."""
        with recorded(self._optimizer) as shares:
            gram = self.ours()
        return gram, shares

    def exact(self) -> Tensor:
        """The Gram matrix in float64, by one backward pass for each candidate."""
        wide = copy.deepcopy(self.model).double()
        return self.by("loop", wide, {name: factor.double() for name, factor in self.factors.items()})

    def by(self, way: str, model: nn.Module, factors: Mapping[str, Tensor]) -> Tensor:
        """``<g_i, P g_j>`` of gradients that are formed in one of the usual ways, in the model's precision."""
        rows = {"loop": by_loop, "vmap": by_vmap, "opacus": by_opacus}[way](model, self.candidates)
        gram = 0.0
        for name, gradients in rows.items():
            gram = gram + (gradients * factors[name].flatten()) @ gradients.T
        assert isinstance(gram, Tensor)
        return gram


def by_loop(model: nn.Module, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Candidates' gradients ``(n, d)`` by parameter, one backward pass each."""
    parameters = trained(model)
    rows = []
    for index in range(len(candidates["labels"])):
        one = {key: value[index : index + 1] for key, value in candidates.items()}
        gradients = torch.autograd.grad(token_losses(model, one)[0], list(parameters.values()))
        rows.append([gradient.flatten() for gradient in gradients])
    return {name: torch.stack(parts) for name, parts in zip(parameters, zip(*rows, strict=True), strict=True)}


def by_vmap(model: nn.Module, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Candidates' gradients ``(n, d)`` by parameter, by ``torch.func``."""
    values = {name: parameter.detach() for name, parameter in trained(model).items()}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        return token_losses(_Called(model, values), {"input_ids": ids[None], "labels": ids[None]})[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # what it takes is measured
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, candidates["input_ids"])
    return {name: gradient.flatten(1) for name, gradient in gradients.items()}


def by_opacus(model: nn.Module, candidates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Candidates' gradients ``(n, d)`` by parameter, by Opacus."""
    from opacus import GradSampleModule  # here: nothing else needs it

    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # of embeddings
            token_losses(wrapped, candidates).sum().backward()
        return {name: parameter.grad_sample.flatten(1) for name, parameter in trained(model).items()}
    finally:
        wrapped.zero_grad()
        wrapped.remove_hooks()


class _Called(nn.Module):
    """A model with other values in place of its parameters."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._of = [model]  # in a list: not a submodule
        self._values = values

    def forward(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self._of[0], self._values, kwargs=inputs)


def compare_ways(
    point: Point, device: str, progress: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """The seconds (interleaved), error and bytes of each way to the Gram matrix; or why it did not run."""
    progress("Gram matrix in float64")
    problem = Problem(point, device)
    exact = problem.exact()
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: problem.ours,
        **{way: partial(problem.by, way, problem.model, problem.factors) for way in ("loop", "vmap", "opacus")},
    }
    found: dict[str, dict[str, Any]] = {}
    for way, run in ways.items():
        progress(f"Gram matrix by {way}")
        try:
            with LivePeak() as live:
                gram = run()
            found[way] = {"error": relative_error(gram, exact), "live_bytes": live.peak, "seconds": []}
        except Exception as error:
            found[way] = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"}
    begun = time.perf_counter()
    for number in range(TIMED):
        if number >= 2 and time.perf_counter() - begun > LIMIT:
            break
        progress(f"timed round {number + 1} of the ways to the Gram matrix")
        for way in (way for way in ways if "seconds" in found[way]):
            wait(device)
            start = time.perf_counter()
            ways[way]()
            wait(device)
            found[way]["seconds"].append(time.perf_counter() - start)
    for one in found.values():
        if "seconds" in one:
            one["beside_ours"] = statistics.median(one["seconds"]) / statistics.median(found[OURS]["seconds"])
    return found


def relative_error(gram: Tensor, exact: Tensor) -> float:
    """Largest ``|K_ij - exact_ij| / sqrt(exact_ii exact_jj)``: beside the lengths of both gradients."""
    exact = exact.double().cpu()
    lengths = exact.diagonal().sqrt()
    return float(((gram.double().cpu() - exact).abs() / (lengths[:, None] * lengths)).max())


def gram_errors(point: Point, device: str) -> dict[str, float]:
    """Relative errors of the Gram matrix; see :func:`errors_of`."""
    problem = Problem(point, device)
    gram, shares = problem.recorded()
    return errors_of(gram, shares, problem.exact())


def errors_of(gram: Tensor, shares: Sequence[RecordedShare], exact: Tensor) -> dict[str, float]:
    """Relative errors of a Gram matrix.

    ``"computation"``: beside float64 products of gradients multiplied out in float64 from the very factors and ``P``
    that the library computed with. ``"whole"``: beside float64 gradients of the same parameter values, one candidate at
    a time; so the rounding of the model's own forward and backward pass is in it.

    Args:
        gram: the matrix.
        shares: what it was formed from.
        exact: what it would be, but for rounding.
    """
    computed = sum(map(_exact_share, shares))
    assert isinstance(computed, Tensor)
    return {"computation": relative_error(gram, computed), "whole": relative_error(gram, exact)}


def _exact_share(share: RecordedShare) -> Tensor:
    """One parameter's share of the Gram matrix, in float64 from its factors as they are."""
    gradients = sum(map(_gradients, share.factors))
    assert isinstance(gradients, Tensor)
    moved = share.preconditioner.apply(gradients.reshape(-1, *share.shape))
    return gradients.flatten(1) @ moved.flatten(1).T


def _gradients(use: Factors) -> Tensor:
    """The gradients of all candidates, ``(n, rows, columns)`` in float64."""
    right = None if use.right is None else use.right.double()
    if use.indexed:
        assert right is not None
        made = right.new_zeros(use.count, use.rows, use.columns)
        for gradient, index, rows in zip(made, use.left, right, strict=True):
            gradient.index_add_(0, index, rows)
        return made
    left = use.left.double()
    return left.sum(1)[..., None] if right is None else torch.einsum("ntr,ntc->nrc", left, right)
