"""The target gradient: when it is formed, and what becomes of the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ftw_optim._passes import Graph, parameter_gradients
from ftw_optim._randomness import own_randomness


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
    ) -> dict[str, Tensor] | None:
        """The target gradient of this step, by parameter name; parameters that it does not depend on are left out.

        Args:
            parameters: those scored.
            kept: the gradient of the step before, or None.
            model: whose ``.grad`` is set aside where only a plain backward will do.
            calls: backward calls before this one.
            scale: multiplies the losses for the pass; the gradient is divided by it.
            seed: of the random state the closure runs under.

        Returns:
            Float32 at least. None where the scaled gradient overflowed.

        Raises:
            TypeError: the closure returned no tensor.
            ValueError: its shape is not ``(m,)`` with m > 0, it is detached, or it or its gradient is not finite.
        """
        # A gradient kept for other parameters than are scored now cannot serve.
        usable = kept is not None and kept.keys() == parameters.keys()
        if usable and calls % self.refresh_every:
            assert kept is not None
            return {name: gradient.to(parameters[name].device) for name, gradient in kept.items()}
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
        finite = torch.stack([gradient.sum().isfinite().cpu() for gradient in new.values()])
        if not finite.all():
            if scale > 1.0:
                return None
            name = list(new)[int((~finite).nonzero()[0])]
            raise ValueError(
                f"Expected a finite target gradient, but that of {name} is not, while the losses are. Nothing was "
                "changed; look at the target batch."
            )
        if usable and self.decay:
            assert kept is not None
            return {name: self.decay * kept[name] + (1 - self.decay) * gradient for name, gradient in new.items()}
        return new


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
    if not losses.isfinite().all():
        raise ValueError(
            f"Expected finite target losses, got {losses.detach().tolist()}. Nothing was changed; look at the target "
            "batch."
        )
