"""The output layer of a language model, run on the positions with a label only.

The logits are the largest tensor of a language model, and the output layer is a good part of its work; losses need them
only where a label counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim._capture.armed_hooks import ArmedHooks
from ftw_optim._capture.chosen import Chosen, chosen_now, running_on
from ftw_optim._layers.randomness import RandomState
from ftw_optim._step.output_layer import follows_number_by_number, output_layer, runs_again_later, why_not_chosen

IGNORED = -100
"""The label of positions that do not count, as everywhere in PyTorch and Transformers."""
HEADS = ("auto", "labels", "all")
"""The values of the option ``head``."""

Run = Callable[[], Any]
"""Runs the model and returns its logits."""

_allowed: WeakSet[nn.Module] = WeakSet()
"""Models whose output layer has run on some positions."""
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Why a model's output layer has to run on all positions, once that is known."""


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

    A model allows the former where its output layer is linear and runs once, on all positions, and where what follows
    treats each number by itself; the graph shows that at every call. Where it does not, the model runs again, on all
    positions, and from then on always does.

    Args:
        model: the model; its output layer is what ``get_output_embeddings()`` returns.
        run: runs the model, and returns its logits.
        targets: shape ``(n, t)``, the token that each position should predict, -100 for none.
        head: ``"labels"``: the positions with a target; ``"all"``; ``"auto"``: those with a target where that is right.
            Without gradients all of them are ``"all"``: there is no graph to show it.

    Raises:
        ValueError: ``head`` is none of these, or ``"labels"`` where the model does not allow it.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {head!r}.")
    index = _worth_choosing(targets, head)
    if index is not None:
        reason = _refused.get(model) or why_not_chosen(model)
        if reason is None:
            before = None if model in _allowed else RandomState.now(model.parameters())
            found = _on_chosen(model, run, targets, index)
            if isinstance(found, LabelLogits):
                _allowed.add(model)
                return found
            reason = found
            ArmedHooks(model.modules()).disarm()  # no backward follows this pass
            if before is not None:
                before.restore()
        if head == "labels":
            raise ValueError(f'head="labels" needs another model: {reason}. Use head="auto" or head="all".')
        logits = run()  # if this fails too, it is not the choice of positions that the model cannot take
        _refused[model] = reason
        return LabelLogits(logits=logits, targets=targets, grid=targets.shape)
    return LabelLogits(logits=run(), targets=targets, grid=targets.shape)


def _worth_choosing(targets: Tensor, head: str) -> Tensor | None:
    """The numbers of the positions with a target, ``(r,)``; None where the output layer had better run on all."""
    if head == "all" or not torch.is_grad_enabled():
        return None
    try:
        index = (targets.flatten() != IGNORED).nonzero().flatten()
    except RuntimeError:
        if head == "labels":
            raise
        return None  # under a transformation such as vmap, the number of labels cannot be known
    # Where nearly all have labels there is nothing to save.
    return index if len(index) and (head == "labels" or len(index) < 0.9 * targets.numel()) else None


def _on_chosen(model: nn.Module, run: Run, targets: Tensor, index: Tensor) -> LabelLogits | str:
    """The logits of the chosen positions, or why the model does not give them."""
    layer = output_layer(model)
    assert layer is not None
    with _running_on(layer, Chosen(index=index, grid=_pair(targets))) as calls:
        try:
            logits = run()
        except torch.OutOfMemoryError:
            raise  # which says nothing of the model
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"it cannot run on some positions ({type(error).__name__})"
    if len(calls) != 1 or calls[0] is None:
        return "its output layer does not run once, on all positions"
    if not isinstance(logits, Tensor) or logits.shape[:-1] != (1, len(index)):
        return "its logits are not what its output layer returns"
    if not follows_number_by_number(logits, calls[0]):
        return "something follows its output layer that may mix positions"
    return LabelLogits(logits=logits, targets=targets.flatten()[index][None], grid=targets.shape, index=index)


@contextmanager
def _running_on(layer: nn.Module, chosen: Chosen) -> Iterator[list[Tensor | None]]:
    """A block in which a layer runs on the chosen positions only.

    Yields, for each call, what the layer returned; None where it was not called on the whole grid, or within a
    checkpoint, which would run it again without us.
    """
    calls: list[Tensor | None] = []
    around = ExitStack()

    def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fits = bool(args) and isinstance(args[0], Tensor) and args[0].shape[:2] == chosen.grid
        if not fits or runs_again_later():
            calls.append(None)
            return None
        hidden = args[0].flatten(0, 1).index_select(0, chosen.index.to(args[0].device))[None]
        around.enter_context(running_on(chosen))
        return (hidden, *args[1:]), kwargs

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if chosen_now() is chosen:
            calls.append(output if isinstance(output, Tensor) else None)

    def done(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        around.close()

    # First of all, so that other hooks see what the layer sees, and change what was noted; and done after they have.
    handles = [
        layer.register_forward_pre_hook(choose, prepend=True, with_kwargs=True),
        layer.register_forward_hook(note, prepend=True),
        layer.register_forward_hook(done, always_call=True),
    ]
    try:
        yield calls
    finally:
        around.close()
        for handle in handles:
            handle.remove()


def _pair(targets: Tensor) -> tuple[int, int]:
    n, t = targets.shape
    return n, t


def logits_of(output: Any) -> Any:
    """The logits among what a model returned: alone, first in a tuple, or as ``logits`` (an attribute or a key)."""
    if isinstance(output, tuple):
        return getattr(output, "logits", output[0])
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else getattr(output, "logits", output)
