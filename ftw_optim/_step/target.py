"""The target gradient: when it is formed anew, and how it is kept and averaged between steps."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from ftw_optim._capture.armed_hooks import ArmedHooks
from ftw_optim._capture.backward import Graph, parameter_gradients
from ftw_optim._capture.stand_ins import leaves, whole_zeros
from ftw_optim._capture.structure import Structure
from ftw_optim._factors.finiteness import all_finite
from ftw_optim._layers.randomness import own_randomness
from ftw_optim._step.captured_rows import CapturedRows

LOOK = "look at the target batch."


@final
@dataclass(frozen=True)
class TargetGradient:
    """The gradient that the combined candidates should match: the gradient of the mean target loss.

    Attributes:
        closure: called without arguments, returns the target examples' losses, shape ``(m,)``, computed with the
            model in whatever mode it is in. It runs under a random state of its own, so that the candidates see the
            same dropout masks as without it.
        refresh_every: number of selections from one evaluation of the gradient to the next; it is kept in between.
        decay: factor of the moving average at each evaluation, ``gradient = decay * kept + (1 - decay) * new``; in
            [0, 1).
        held_out: called without arguments, returns the losses of rows of the same kind that nothing is trained on, so
            that ``selection.blind`` can tell whether the target rows are memorised; run without gradients, with the
            model in the mode of the step.
        held_out_every: number of selections from one such look to the next.
        until: number of selections after which the gradient is formed no more: it stays what it was. With
            ``train_on_target=True`` the target rows take part in the steps from then on, and only guide before: what is
            trained on is memorised, and guides to what it knows already. None: without end.
    """

    closure: Callable[[], Tensor]
    refresh_every: int = 1
    decay: float = 0.0
    held_out: Callable[[], Tensor] | None = None
    held_out_every: int = 10
    until: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.closure):
            raise TypeError(
                f"Expected a closure that returns the target losses (m,), got {type(self.closure).__name__}."
            )
        if self.held_out is not None and not callable(self.held_out):
            raise TypeError(
                f"Expected held_out as a closure that returns losses (m,), got {type(self.held_out).__name__}."
            )
        for name, value in (("refresh_every", self.refresh_every), ("held_out_every", self.held_out_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if self.until is not None and (
            isinstance(self.until, bool) or not isinstance(self.until, int) or self.until < 1
        ):
            raise ValueError(f"until must be a positive number of selections, or None, got {self.until!r}.")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}.")

    @property
    def remembers(self) -> bool:
        """Whether the gradient must outlive the step it was formed in."""
        return self.refresh_every > 1 or self.decay > 0.0 or self.until is not None

    def guides_no_more(self, backwards: int) -> bool:
        """Whether the gradient stays what it was, after so many selections."""
        return self.until is not None and backwards >= self.until

    def gradients(
        self,
        parameters: Mapping[str, Tensor],
        previous: Mapping[str, Tensor] | None,
        structure: Structure,
        *,
        backwards: int,
        scale: float,
        seed: int,
        meet: Callable[[], None] = lambda: None,
    ) -> TargetNow:
        """The target gradient of this step: formed anew, or the kept one.

        Args:
            parameters: the scored parameters, by name.
            previous: the gradient of the step before, or None.
            structure: the model; its ``.grad`` are set aside where only a plain backward works.
            backwards: number of selections before this one.
            scale: multiplies the losses for the pass; the gradient is divided by it.
            seed: seed of the random state the closure runs under.
            meet: called between the closure and the backward pass.

        Returns:
            The gradient by parameter name, zero where the target does not depend on a parameter; float32 at least.
            Whether it is finite is checked later, by its ``overflowed``.

        Raises:
            TypeError: the closure returned no tensor.
            ValueError: the shape of the losses is not ``(m,)`` with m > 0, or they are detached.
        """
        kept = usable(previous, parameters)
        if kept is not None and (backwards % self.refresh_every or self.guides_no_more(backwards)):
            return TargetNow(
                gradients=kept,
                finite=torch.ones(0, dtype=torch.bool),
                before=previous,
                remembered=True,
            )
        everywhere, modules = structure.parameters.values(), structure.modules.values()
        with own_randomness(everywhere, seed), torch.enable_grad(), ArmedHooks(modules) as armed:
            losses = target_losses(self.closure)
            meet()
            armed.take_over()
            graph = Graph(losses)
            read = leaves(structure, parameters)
            found = parameter_gradients(losses.mean() * scale, read, graph, structure)
        new = {
            name: found[name].to(torch.promote_types(parameter.dtype, torch.float32)) / scale
            if name in found
            else whole_zeros(parameter, torch.promote_types(parameter.dtype, torch.float32))
            for name, parameter in parameters.items()
        }
        flags = torch.stack([losses.detach().isfinite().all(), all_finite(new.values()).to(losses.device)])
        return TargetNow(
            gradients=self.averaged(kept, new),
            finite=flags,
            before=previous,
            remembered=self.remembers,
            guide_losses=losses.detach(),
        )

    def averaged(self, kept: Mapping[str, Tensor] | None, new: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The moving average of the gradients, where there is a kept one and a decay."""
        if kept is None or not self.decay:
            return new
        return {name: self.decay * kept[name] + (1 - self.decay) * gradient for name, gradient in new.items()}


def usable(kept: Mapping[str, Tensor] | None, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """The kept gradient on the parameters' devices; None where it was kept for other parameters than these."""
    if kept is None or kept.keys() != parameters.keys():
        return None
    return {name: gradient.to(parameters[name].device) for name, gradient in kept.items()}


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TargetNow:
    """The target gradient of one step.

    Attributes:
        gradients: the gradients by parameter name.
        finite: two flags, bool (2,): whether the losses and whether the gradient are finite; empty where they are known
            to be. They are copied together with the Gram matrix, so that a device is waited for only once.
        before: the gradient that was kept from the step before.
        remembered: whether the gradient must outlive the step.
        coming: the gradient to keep for the next step; None: that of this one.
        rows: the target rows' losses and factors, where these take part in the step.
        share: the share of the remembered gradient in what these rows are to match.
        guides_itself: whether the rows tell what to match, rather than the gradient alone.
        guide_losses: the losses of the rows that guide, on their device; None where they were not formed anew.
        total: the number of rows that take part on all ranks; None: :attr:`rows` are all.
    """

    gradients: Mapping[str, Tensor]
    finite: Tensor
    before: Mapping[str, Tensor] | None
    remembered: bool
    coming: Mapping[str, Tensor] | None = None
    rows: CapturedRows | None = None
    share: float = 0.0
    guides_itself: bool = False
    guide_losses: Tensor | None = None
    total: int | None = None

    @property
    def count(self) -> int:
        """The number of target rows that take part in the step, of all ranks."""
        if self.total is not None:
            return self.total
        return 0 if self.rows is None else len(self.rows.losses)

    def to_keep(self, *, overflowed: bool) -> Mapping[str, Tensor] | None:
        """The gradient to keep for the next step; after an overflow the one from before, so that averages survive."""
        if not self.remembered:
            return None
        if overflowed:
            return self.before
        return self.gradients if self.coming is None else self.coming

    def overflowed(self, flags: Tensor, scale: float) -> bool:
        """Whether the gradient of the scaled losses overflowed.

        Args:
            flags: :attr:`finite`, on the CPU.
            scale: the factor by which the losses were multiplied.

        Raises:
            ValueError: the losses are not finite, or the gradient is not, although the losses were not scaled up.
        """
        if bool(flags.all()):
            return False
        if not flags[0]:
            _refuse_losses()
        if scale <= 1.0:
            _refuse_gradients([name for name, one in self.gradients.items() if not bool(one.isfinite().all())])
        return True

    def rows_overflowed(self, finite: Tensor, scored: Container[str], scale: float) -> bool:
        """Whether the gradient of a scaled loss overflowed, of the rows that take part; asked where something is wrong.

        Args:
            finite: whether the losses of candidates and rows are finite, bool ``(n + m,)`` on the CPU.
            scored: names of the scored parameters.
            scale: the factor by which the losses were multiplied.

        Raises:
            ValueError: a row's loss is not finite, or its gradient is not, although the losses were not scaled up.
        """
        if self.rows is None:
            return False
        if not bool(finite[-self.count :].all()):
            _refuse_losses()
        uses = [(name, use) for name, uses in self.rows.found.items() if name in scored for use in uses]
        names = dict.fromkeys(name for name, use in uses if not bool(use.finite().all()))
        if names and scale <= 1.0:
            _refuse_gradients(list(names))
        return bool(names)


def _refuse_losses() -> NoReturn:
    raise ValueError("Expected finite target losses, got NaN or infinity. Nothing was changed; " + LOOK)


def _refuse_gradients(names: Sequence[str]) -> NoReturn:
    raise ValueError(
        f"Expected a finite target gradient, but that of {', '.join(names[:5])} is not, while the losses are. "
        "Nothing was changed; " + LOOK
    )


def target_losses(closure: Callable[[], Tensor]) -> Tensor:
    """The losses of the target examples, shape ``(m,)``, with their graph.

    Raises:
        TypeError: the closure returned no tensor.
        ValueError: the shape of the losses is not ``(m,)`` with m > 0, or they are detached.
    """
    losses = losses_of_rows(closure, name="target", row="target example")
    if not losses.requires_grad:
        raise ValueError("The target closure returned losses without a gradient; do not detach them.")
    return losses


def losses_of_rows(closure: Callable[[], Tensor], *, name: str, row: str) -> Tensor:
    """What a closure returns, which must be losses of shape ``(m,)``.

    Args:
        closure: called without arguments.
        name: of the closure, for the messages.
        row: what each loss is of, for the messages.

    Raises:
        TypeError: the closure returned no tensor.
        ValueError: the shape of the losses is not ``(m,)`` with m > 0.
    """
    losses: Any = closure()
    if not isinstance(losses, Tensor):
        raise TypeError(f"The {name} closure must return a tensor of losses (m,), got {type(losses).__name__}.")
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(
            f"The {name} closure must return one loss per {row}, shape (m,) with m > 0, got shape "
            f"{tuple(losses.shape)}. Their mean is taken afterwards."
        )
    return losses
