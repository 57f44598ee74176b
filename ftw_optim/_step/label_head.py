"""The output layer of a language model, run on the positions with a label only.

The logits are the largest tensor of a language model, and the output layer is a good part of its work; losses need them
only where a label counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim._capture.armed_hooks import passing_without_trace
from ftw_optim._capture.chosen import Chosen, running_on
from ftw_optim._layers.randomness import RandomState

IGNORED = -100
"""The label of positions that do not count, as everywhere in PyTorch and Transformers."""
HEADS = ("auto", "labels", "all")
"""The values of the option ``head``."""

Run = Callable[[], Any]
"""Runs the model and returns its logits."""

_allowed: WeakKeyDictionary[nn.Module, dict[bool, str | None]] = WeakKeyDictionary()
"""Why a model's output layer has to run on all positions, by the model's mode; None where it need not."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LabelLogits:
    """The logits that losses are computed from.

    Attributes:
        logits: shape ``(n, t, vocabulary)``; of chosen positions alone ``(1, r, vocabulary)``.
        targets: the token that each of these positions should predict, -100 for none.
        grid: the shape ``(n, t)`` of all positions.
        index: the numbers of the chosen positions in the grid, ``(r,)``; None where all were run.
    """

    logits: Tensor
    targets: Tensor
    grid: torch.Size
    index: Tensor | None = None

    def losses(self) -> tuple[Tensor, Tensor]:
        """The loss of each position, zero where it has no target, and the mask of those with one; both ``(n, t)``."""
        # float32: the sum over a large vocabulary loses digits in half precision.
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        targets = self.targets.to(logits.device)
        values = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        counted = (targets != IGNORED).flatten()
        if self.index is None:
            return values.view(self.grid), counted.view(self.grid)
        index, size = self.index.to(values.device), self.grid.numel()
        losses = values.new_zeros(size).index_copy(0, index, values)
        mask = counted.new_zeros(size).index_copy(0, index, counted)
        return losses.view(self.grid), mask.view(self.grid)


def label_logits(model: nn.Module, run: Run, targets: Tensor, head: str = "auto") -> LabelLogits:
    """The logits of a causal language model at the positions that have a target, or at all.

    Before a model's output layer is run on some positions for the first time, two passes without gradients show if it
    gives each position the same logits whichever others are run.

    Args:
        model: the model; its output layer is what ``get_output_embeddings()`` returns.
        run: runs the model, and returns its logits.
        targets: shape ``(n, t)``, the token that each position should predict, -100 for none.
        head: ``"labels"``: the positions with a target; ``"all"``; ``"auto"``: those with a target where that is right.

    Raises:
        ValueError: ``head`` is none of these, or ``"labels"`` where the model does not allow it.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {head!r}.")
    index = _worth_choosing(targets, head)
    if index is not None:
        reason = _reason(model, run, targets, index)
        if reason is None:
            with _running_on(_output_layer(model), Chosen(index=index, grid=_pair(targets))):
                logits = run()
            return LabelLogits(logits=logits, targets=targets.flatten()[index][None], grid=targets.shape, index=index)
        if head == "labels":
            raise ValueError(f'head="labels" needs another model: {reason}. Use head="auto" or head="all".')
    return LabelLogits(logits=run(), targets=targets, grid=targets.shape)


def _worth_choosing(targets: Tensor, head: str) -> Tensor | None:
    """The numbers of the positions with a target, ``(r,)``; None where the output layer had better run on all."""
    if head == "all":
        return None
    try:
        index = (targets.flatten() != IGNORED).nonzero().flatten()
    except RuntimeError:
        if head == "labels":
            raise
        return None  # under a transformation such as vmap, the number of labels cannot be known
    # One position alone shows nothing, and where nearly all have labels there is nothing to save.
    return index if len(index) > 1 and (head == "labels" or len(index) < 0.9 * targets.numel()) else None


def _reason(model: nn.Module, run: Run, targets: Tensor, index: Tensor) -> str | None:
    """Why the output layer has to run on all positions; None where it need not."""
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        return "a compiled model runs its output layer inside of one graph"
    known = _allowed.setdefault(model, {})
    if model.training not in known:
        known[model.training] = _looked_into(model, run, targets, index)
    return known[model.training]


def _looked_into(model: nn.Module, run: Run, targets: Tensor, index: Tensor) -> str | None:
    layer = _output_layer(model)
    if layer is None:
        return "it has no get_output_embeddings() that returns its output layer"
    state, grid = RandomState.now(model.parameters()), _pair(targets)
    fewer = index.flip(0)[: (len(index) + 1) // 2]
    found = []
    for rows in (index, fewer):
        with passing_without_trace(model), _running_on(layer, Chosen(index=rows, grid=grid)) as calls:
            try:
                logits = run()
            except torch.OutOfMemoryError:
                raise  # which says nothing of the model
            except (RuntimeError, ValueError, IndexError) as error:
                return f"it cannot run on some positions ({type(error).__name__})"
            finally:
                state.restore()
        if calls != [True] or not isinstance(logits, Tensor) or logits.shape[:-1] != (1, len(rows)):
            return "its output layer does not run once on all positions, or its logits are not what that returns"
        found.append(logits[0].to(torch.promote_types(logits.dtype, torch.float32)))
    same = found[0].flip(0)[: len(fewer)]
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    if not torch.linalg.vector_norm(same - found[1]) <= 16 * eps * torch.linalg.vector_norm(same):
        return "its logits at one position depend on which others are run"
    return None


@contextmanager
def _running_on(layer: nn.Module | None, chosen: Chosen) -> Iterator[list[bool]]:
    """A block in which a layer runs on the chosen positions only; yields, for each call, whether it could choose."""
    assert layer is not None
    calls: list[bool] = []
    around = ExitStack()

    def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fits = bool(args) and isinstance(args[0], Tensor) and args[0].shape[:2] == chosen.grid
        calls.append(fits)
        if not fits:
            return None
        hidden = args[0].flatten(0, 1).index_select(0, chosen.index.to(args[0].device))[None]
        around.enter_context(running_on(chosen))
        return (hidden, *args[1:]), kwargs

    def done(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        around.close()

    # First of all, so that other hooks see what the layer sees; and done after they have.
    handles = [
        layer.register_forward_pre_hook(choose, prepend=True, with_kwargs=True),
        layer.register_forward_hook(done, always_call=True),
    ]
    try:
        yield calls
    finally:
        around.close()
        for handle in handles:
            handle.remove()


def _output_layer(model: nn.Module) -> nn.Module | None:
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    find = getattr(model, "get_output_embeddings", None)
    try:
        layer = None if find is None else find()
    except (NotImplementedError, AttributeError):
        return None
    return layer if isinstance(layer, nn.Module) else None


def _pair(targets: Tensor) -> tuple[int, int]:
    n, t = targets.shape
    return n, t


def logits_of(output: Any) -> Any:
    """The logits among what a model returned: alone, first in a tuple, or as ``logits`` (an attribute or a key)."""
    if isinstance(output, tuple):
        return getattr(output, "logits", output[0])
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else getattr(output, "logits", output)
