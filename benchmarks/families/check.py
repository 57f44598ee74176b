"""One cell of the table: what a step gives of each candidate's gradient, against autograd on one row at a time."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

import ftw_optim
from ftw_optim import KeepAll, Matching, SelectiveOptimizer, WeightSolution, WeightStage, last_blocks
from ftw_optim.testing import RecordedShare, recorded

from .models import Batch, Case, NotBuilt, or_not_built

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of the norm of the largest candidate's gradient of the same parameter."""

COUPLED = {"float32": 1e-3, "bfloat16": 1e-1}
"""Where a row alone differs more than this from the same row in the batch, it is not by rounding."""

FLOOR = 1e-3
"""Of the largest parameter's gradient; some gradients are zero but for rounding, such as that of a key's bias."""

Gradients = dict[str, Tensor]
"""Of each parameter, shape (n, ...) in float64."""


WORDS = ("exact", "in batch", "WRONG")
"""Where a step was made; the worse of two steps is a cell's."""


@final
@dataclass(frozen=True)
class Verdict:
    """What became of a cell.

    Attributes:
        word: ``exact``; ``in batch``, where a row alone has another gradient and the library gives that of the row in
            its batch; ``refused`` by the library; ``error``, which it did not expect; ``not run``, where the model does
            not run without it; ``late``, ``crashed``, or ``WRONG``.
        text: the reason, or where the error is.
        error: the largest relative error, against rows alone (``in batch``: against autograd in the batch).
        last: the verdict with the last block scored, where all parameters were refused.
    """

    word: str
    text: str = ""
    error: float | None = None
    last: Verdict | None = None

    def __str__(self) -> str:
        number = "" if self.error is None else f" {self.error:.0e}"
        return f"{self.word}{number}" + ("" if self.last is None else f"; last {self.last}")

    @property
    def words(self) -> str:
        """Without numbers."""
        return self.word if self.last is None else f"{self.word}, last block {self.last.word}"


@final
@dataclass(frozen=True)
class Uneven(WeightStage):
    """Weights that differ from candidate to candidate, so that gradients which changed places show."""

    def __call__(self, matching: Matching, *more: Matching) -> WeightSolution:
        """See :class:`WeightStage`; nothing is fitted."""
        weights = torch.arange(1.0, len(matching) + 1, dtype=torch.float64)
        return WeightSolution(weights=weights, slack=torch.zeros_like(weights), iterations=0, converged=True)


def verdict(case: Case, combine: str, **options: Any) -> Verdict:
    """Two steps on batches of different padding, each checked before its update.

    Each candidate's gradient of each scored parameter is compared, the Gram matrix, and the combined gradient.
    """
    trained = {name: parameter for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    kind = "bfloat16" if any(p.dtype == torch.bfloat16 for p in case.model.parameters()) else "float32"
    batch = case.batches[0]
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(trained.values(), lr=1e-3),
        case.model,
        lambda: case.given(case.model, {key: value[:2] for key, value in batch.items()}),
        filter=KeepAll(),
        weight=Uneven(),
        metric="euclidean",
        combine=combine,
        **options,
    )
    scored = [
        name for name, parameter in trained.items() if optimizer.scored is None or optimizer.scored(name, parameter)
    ]
    found = []
    for batch in case.batches:
        refuse_what_draws(case, batch)
        alone = alone_in_batch(case, batch, trained)
        optimizer.zero_grad()
        try:
            with recorded(optimizer) as shares:
                optimizer.backward(lambda: case.given(case.model, batch))  # noqa: B023, called at once
        except Exception as error:
            return _refusal(error)
        given = Given.of(optimizer, shares, trained, scored)
        found.append(_judged(case, batch, trained, given, alone, kind))
        given.put_back(trained)
        optimizer.step()
    return max(found, key=lambda one: (WORDS.index(one.word), one.error))


def _judged(
    case: Case, batch: Batch, trained: Mapping[str, nn.Parameter], given: Given, alone: Gradients, kind: str
) -> Verdict:
    sizes = _sizes(alone)
    error, where = given.error(alone, sizes)
    if error <= TOLERANCE[kind]:
        return Verdict("exact", "", error)
    together = in_batch(case, batch, trained)
    apart = _distance(together, alone, sizes)[0]
    error_together = given.error(together, sizes)[0]
    if error_together > TOLERANCE[kind]:
        text = f"{where}; {error_together:.0e} from autograd in the batch, which is {apart:.0e} from rows alone"
        return Verdict("WRONG", text, error)
    if apart <= COUPLED[kind]:
        return Verdict("exact", "", error)
    return Verdict("in batch", f"a row alone is off by {apart:.0e} from the same row in the batch", error_together)


def verdict_of_way(make: Callable[[], Case], way: str) -> Verdict:
    """As :func:`verdict`; where ``"graph"`` is refused with all parameters scored, also with the last block scored."""
    found = verdict(make(), way)
    if way != "graph" or found.word != "refused":
        return found
    case = make()
    try:
        scored = last_blocks(case.model, 1)
    except ValueError:  # no such stack
        return found
    return replace(found, last=verdict(case, way, scored=scored))


def refuse_what_draws(case: Case, batch: Batch) -> None:
    """That two passes give the same losses.

    Raises:
        NotBuilt: they do not, or the model does not run.
    """
    with or_not_built("not run"), torch.no_grad():
        first, second = (case.losses(case.model, batch) for _ in range(2))
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise NotBuilt("not run: each pass draws random numbers")


def alone_in_batch(case: Case, batch: Batch, trained: Mapping[str, nn.Parameter]) -> Gradients:
    """Each candidate's gradient by autograd, of a batch of its row alone.

    Raises:
        NotBuilt: the model does not run on its own, or has no finite gradients.
    """
    rows = range(len(next(iter(batch.values()))))
    single = ({key: value[row : row + 1] for key, value in batch.items()} for row in rows)
    return _stacked(trained, (case.losses(case.model, one)[0] for one in single))


def in_batch(case: Case, batch: Batch, trained: Mapping[str, nn.Parameter]) -> Gradients:
    """Each candidate's gradient by autograd, of its loss among those of the whole batch.

    Raises:
        NotBuilt: as for a row alone.
    """
    rows = range(len(next(iter(batch.values()))))
    return _stacked(trained, (case.losses(case.model, batch)[row] for row in rows))


def _stacked(trained: Mapping[str, nn.Parameter], losses: Iterable[Tensor]) -> Gradients:
    """Of each loss by a backward of its own, since what runs backward passes inside answers no ``autograd.grad``."""
    found: dict[str, list[Tensor]] = {name: [] for name in trained}
    with or_not_built("not run"):
        for loss in losses:
            for parameter in trained.values():
                parameter.grad = None
            loss.backward()
            for name, parameter in trained.items():
                found[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    stacked = {name: torch.stack(gradients).double() for name, gradients in found.items()}
    if not all(gradients.isfinite().all() for gradients in stacked.values()):
        raise NotBuilt("not run: its gradients are not finite")
    return stacked


def _norms(gradients: Tensor) -> Tensor:
    return gradients.reshape(len(gradients), -1).norm(dim=1)


def _sizes(truth: Gradients) -> dict[str, float]:
    largest = {name: float(_norms(gradients).max()) for name, gradients in truth.items()}
    floor = FLOOR * max(largest.values())
    return {name: size + floor for name, size in largest.items()}


def _distance(given: Gradients, truth: Gradients, sizes: Mapping[str, float]) -> tuple[float, str]:
    """The largest difference of a candidate's gradient, relative, and the parameter's name."""
    return max((_largest(_norms(given[name] - truth[name])) / sizes[name], name) for name in given)


@dataclass(frozen=True)
class Given:
    """What a step gave: each candidate's gradients, their Gram matrix, the weights and the combined gradient."""

    gradients: Gradients
    gram: Tensor
    weights: Tensor
    combined: dict[str, Tensor | None]

    @classmethod
    def of(
        cls,
        optimizer: SelectiveOptimizer,
        shares: list[RecordedShare],
        trained: Mapping[str, nn.Parameter],
        scored: list[str],
    ) -> Given:
        """Of the last backward; what is scored and has no share has no gradient."""
        selection = optimizer.selection
        assert selection is not None
        assert not selection.skipped
        n = len(selection.losses)
        weights = torch.zeros(n, dtype=torch.float64)
        weights[selection.kept] = selection.weights
        formed = {name: torch.zeros(n, *trained[name].shape, dtype=torch.float64) for name in scored}
        formed |= {share.name: _formed(share) for share in shares}
        combined = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
        return cls(formed, selection.gram.double(), weights, combined)

    def put_back(self, trained: Mapping[str, nn.Parameter]) -> None:
        """The combined gradient, where another backward has been since."""
        for name, gradient in self.combined.items():
            trained[name].grad = gradient

    def error(self, truth: Gradients, sizes: Mapping[str, float]) -> tuple[float, str]:
        """The largest error, relative, and where it is."""
        found = [_distance(self.gradients, truth, sizes)]
        flat = torch.cat([truth[name].flatten(1) for name in self.gradients], 1)
        lengths = flat.norm(dim=1) + 1e-30
        gram = (self.gram - flat @ flat.T) / lengths / lengths[:, None]
        found.append((_largest(gram), "Gram matrix"))
        for name, gradient in self.combined.items():
            off = torch.tensordot(self.weights, truth[name], 1)
            if gradient is not None:
                off = off - gradient.double()
            found.append((_largest(off.norm()) / sizes[name], f"combined gradient of {name}"))
        return max(found)


def _largest(errors: Tensor) -> float:
    return float(errors.abs().nan_to_num(torch.inf).max())


def _formed(share: RecordedShare) -> Tensor:
    """The candidates' gradients of one parameter, (n, ...), position by position."""
    total: Any = 0
    for factors in share.factors:
        total = total + _multiplied_out(factors)
    formed: Tensor = total.reshape(len(total), *share.shape)
    return formed


def _multiplied_out(factors: ftw_optim.Factors) -> Tensor:
    left, right = factors.left, factors.right
    if factors.indexed:
        left = nn.functional.one_hot(left, factors.rows)
    left = left.double()
    right = left.new_ones(*left.shape[:2], 1) if right is None else right.double()
    if factors.positions is None:
        return torch.einsum("npr,npc->nrc", left, right)
    owner = nn.functional.one_hot(factors.positions.candidates + 1, factors.count + 1)[..., 1:].double()
    return torch.einsum("bpn,bpr,bpc->nrc", owner, left, right)


def _refusal(error: Exception) -> Verdict:
    """The library's own word where it raised the error or added a note to it; else an error that it did not expect."""
    package = Path(ftw_optim.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    ours = package in Path(frames[-1].filename).parents
    notes = getattr(error, "__notes__", [])
    text = " ".join([f"{type(error).__name__}: {error}", *notes])
    if isinstance(error, TimeoutError):
        raise error
    if ours or notes:
        return Verdict("refused", text)
    return Verdict("error", f"{text} [{Path(frames[-1].filename).name}:{frames[-1].lineno}]")
