"""Rows of numbers of records' gradients, whose inner products are those of the gradients in the optimizer's metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from ftw_optim._capture.capture import Capture
from ftw_optim._capture.plan import plan
from ftw_optim._capture.self_check import SelfChecks
from ftw_optim._capture.structure import Structure
from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.factors import Factors
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import COPIES, Sketch, SketchSums
from ftw_optim._gram.spec import DEFAULT_MEMORY_LIMIT, GramSpec
from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._step.losses import token_losses
from ftw_optim._step.setup import full_precision


@final
class GradientRows:
    """Makes a row of every record: ``P^(1/2) g``, or a sketch of it.

    One forward and one backward pass serve a whole batch. The gradients are captured, checked against autograd's where
    a layer is read in a new way, and sketched as in a step with ``gram=Sketch(dim)``. The inner product of two rows is
    that of the gradients, or an unbiased estimate of it, with a standard error of about ``(2 / dim) ** 0.5`` times
    their norms, or less. All rows of one seed can be compared with each other.

    Args:
        model: a causal language model.
        maps: ``P`` of every trained parameter, by name.
        dim: numbers of a row; None: the gradients themselves.
        seed: draws the sketch and the checks.

    Raises:
        NotImplementedError: a parameter cannot be captured.
        ValueError: ``dim`` is not even, or less than 2.
    """

    def __init__(self, model: nn.Module, maps: Mapping[str, Preconditioner], *, dim: int | None, seed: int) -> None:
        self.model, self._seed = model, seed
        self._sketch = None if dim is None else Sketch(dim=dim)
        structure = Structure(model)
        self._plan, self._checks = plan(structure, maps), SelfChecks()
        self._roots = {name: one.power(Metric.PRECONDITIONED.power) for name, one in maps.items()}
        first = next(iter(self._plan.parameters.values()))
        self.dtype = torch.promote_types(torch.float32, first.dtype)
        self._spec = GramSpec(
            shapes={name: parameter.shape for name, parameter in self._plan.parameters.items()},
            target={},
            precondition=lambda name, reference: maps[name],
            metrics=[Metric.PRECONDITIONED],
            dtype=self.dtype,
            device=first.device,
            memory_limit=DEFAULT_MEMORY_LIMIT,
            buffer=Buffer(),
        )
        starts = [0]
        for parameter in self._plan.parameters.values():
            starts.append(starts[-1] + parameter.numel())
        self._at = dict(zip(self._plan.parameters, starts, strict=False))
        self.width = starts[-1] if dim is None else dim

    def of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The losses ``(n,)`` and the rows ``(n, width)`` of a batch, on the CPU; not finite where a gradient is not.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each (n, t).
        """
        with Capture(self._plan) as capture:
            losses = token_losses(self.model, batch)
            rows = _Whole(self, len(losses)) if self._sketch is None else _Sketched(self, self._sketch, len(losses))
            with full_precision(losses):
                generator = torch.Generator().manual_seed(self._seed)
                capture.stream(losses, rows.add, scale=1.0, checks=self._checks, generator=generator)
        finite = losses.detach().isfinite()
        found = torch.where(finite[:, None], rows.found(), torch.nan)
        return losses.detach().cpu(), found.cpu()


class _Sketched:
    """The sketches of one batch."""

    def __init__(self, of: GradientRows, sketch: Sketch, n: int) -> None:
        self._sums = SketchSums(of._spec, torch.ones(n, dtype=torch.bool), sketch=sketch, seed=of._seed)

    def add(self, name: str, uses: list[Factors]) -> None:
        self._sums.add(name, uses)

    def found(self) -> Tensor:
        copies = self._sums.sketches()[Metric.PRECONDITIONED][0]
        # Both estimates in one row: their mean is the inner product of rows that are divided so.
        rows: Tensor = copies.transpose(0, 1).flatten(1) / COPIES**0.5
        return rows


class _Whole:
    """The whole gradients of one batch, one parameter behind the other."""

    def __init__(self, of: GradientRows, n: int) -> None:
        self._of = of
        self._rows = torch.zeros(n, of.width, dtype=of.dtype, device=of._spec.device)

    @torch.no_grad()
    def add(self, name: str, uses: list[Factors]) -> None:
        block, start = self._of._spec.block(name, uses), self._of._at[name]
        gradients = block.out(0, block.rows).reshape(-1, *block.shape)
        moved = self._of._roots[name].apply(gradients).flatten(1)
        self._rows[:, start : start + moved.shape[1]] += moved

    def found(self) -> Tensor:
        return self._rows
