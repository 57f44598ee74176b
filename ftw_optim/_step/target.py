"""The target gradient: when it is formed, and what becomes of the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ftw_optim._capture.backward import Graph, finite, parameter_gradients
from ftw_optim._layers.randomness import own_randomness

LOOK = "look at the target batch."


@final
@dataclass(frozen=True)
class TargetGradient:
    """The gradient that the combined candidates should match: that of the mean of some target losses.

    Attributes:
        closure: called without arguments, returns the target examples' losses, shape ``(m,)``, computed with the
            model in whatever mode it is in. It runs under a random state of its own, so that the candidates see the
            dropout masks they would see without it.
        refresh_every: backward calls from one evaluation to the next; the gradient in between is kept.
        decay: at each evaluation ``gradient = decay * kept + (1 - decay) * new``; in [0, 1).
    """

    closure: Callable[[], Tensor]
    refresh_every: int = 1
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.closure):
            raise TypeError(
                f"Expected a closure that returns the target losses (m,), got {type(self.closure).__name__}."
            )
        if isinstance(self.refresh_every, bool) or not isinstance(self.refresh_every, int) or self.refresh_every < 1:
            raise ValueError(f"refresh_every must be a positive integer, got {self.refresh_every!r}.")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}.")

    @property
    def remembers(self) -> bool:
        """Whether the gradient must outlive the step it was formed in."""
        return self.refresh_every > 1 or self.decay > 0.0

    def gradients(
        self,
        parameters: Mapping[str, Tensor],
        kept: Mapping[str, Tensor] | None,
        model: nn.Module,
        *,
        calls: int,
        scale: float,
        seed: int,
    ) -> TargetNow:
        """The target gradient of this step, by parameter name; parameters that it does not depend on are left out.

        Args:
            parameters: those scored.
            kept: the gradient of the step before, or None.
            model: whose ``.grad`` is set aside where only a plain backward will do.
            calls: backward calls before this one.
            scale: multiplies the losses for the pass; the gradient is divided by it.
            seed: of the random state the closure runs under.

        Returns:
            Float32 at least. Whether it is finite is asked later: see :meth:`TargetNow.overflowed`.

        Raises:
            TypeError: the closure returned no tensor.
            ValueError: its shape is not ``(m,)`` with m > 0, or it is detached.
        """
        # A gradient kept for other parameters than are scored now cannot serve.
        usable = kept is not None and kept.keys() == parameters.keys()
        if usable and calls % self.refresh_every:
            assert kept is not None
            return TargetNow(
                gradients={name: gradient.to(parameters[name].device) for name, gradient in kept.items()},
                finite=torch.ones(0, dtype=torch.bool),
                before=kept,
                remembered=True,
            )
        with own_randomness(model.parameters(), seed), torch.enable_grad():
            losses: Any = self.closure()
            _check(losses)
            graph = Graph(losses)
            found = parameter_gradients(losses.mean() * scale, parameters, graph, model)
        new = {
            name: found[name].to(torch.promote_types(parameter.dtype, torch.float32)) / scale
            if name in found
            else torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for name, parameter in parameters.items()
        }
        flags = torch.stack([losses.detach().isfinite().all(), finite(new.values()).to(losses.device)])
        if usable and self.decay:
            assert kept is not None
            new = {name: self.decay * kept[name] + (1 - self.decay) * gradient for name, gradient in new.items()}
        return TargetNow(gradients=new, finite=flags, before=kept, remembered=self.remembers)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TargetNow:
    """The target gradient of one step.

    Attributes:
        gradients: by parameter name.
        finite: bool: whether the losses are, and the gradient; empty where they are known to be. Looked at together
            with the Gram matrix, so that a device is waited for once.
        before: the gradient that was kept from the step before.
        remembered: it must outlive the step.
    """

    gradients: Mapping[str, Tensor]
    finite: Tensor
    before: Mapping[str, Tensor] | None
    remembered: bool

    def to_keep(self, *, overflowed: bool) -> Mapping[str, Tensor] | None:
        """What the next step is given: an average of target gradients survives one that overflowed."""
        if not self.remembered:
            return None
        return self.before if overflowed else self.gradients

    def overflowed(self, flags: Tensor, scale: float) -> bool:
        """Whether the gradient of the scaled losses did.

        Args:
            flags: :attr:`finite`, on the CPU.
            scale: of the losses.

        Raises:
            ValueError: the losses are not finite, or the gradient is not though nothing was scaled up.
        """
        if bool(flags.all()):
            return False
        if not flags[0]:
            raise ValueError("Expected finite target losses, got NaN or infinity. Nothing was changed; " + LOOK)
        if scale > 1.0:
            return True
        names = [name for name, gradient in self.gradients.items() if not bool(gradient.isfinite().all())]
        raise ValueError(
            f"Expected a finite target gradient, but that of {', '.join(names[:5])} is not, while the losses are. "
            "Nothing was changed; " + LOOK
        )


def _check(losses: Any) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"The target closure must return a tensor of losses (m,), got {type(losses).__name__}.")
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(
            "The target closure must return one loss per target example, shape (m,) with m > 0, got shape "
            f"{tuple(losses.shape)}. Their mean is taken afterwards."
        )
    if not losses.requires_grad:
        raise ValueError("The target closure returned losses without a gradient; do not detach them.")
