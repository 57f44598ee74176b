"""Self-checks of capture: factors against autograd's gradients, and uses of a parameter outside its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors, projection, weighted_sum
from ftw_optim._factors.finiteness import told

WAYS_OUT = (
    "Leave it out of what is scored (scored=last_blocks(model, 1), or a predicate (name, parameter) that says no to "
    'it) with combine="graph", which updates every parameter exactly; freeze it; or register a rule with '
    "@register_layer."
)


@final
class SelfChecks:
    """The layers that passed the self-check, each in the ways in which it was read."""

    PATIENCE = 5
    """Number of checks of a layer that never gets a gradient, such as one behind a gate that stays shut."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], int] = {}

    def due(self, keys: Iterable[tuple[object, ...]]) -> bool:
        """Whether any of these keys still has to be checked."""
        return any(self._seen.get(key, 0) < self.PATIENCE for key in keys)

    def passed(self, key: tuple[object, ...], *, conclusive: bool) -> None:
        """Note a check that found no error; it is conclusive only where a gradient arrived that is not zero."""
        self._seen[key] = self.PATIENCE if conclusive else self._seen.get(key, 0) + 1


def refuse_uses_outside(names: Sequence[str]) -> None:
    """Refuse parameters that were used outside of the layers that own them.

    Args:
        names: the names of such parameters; none: nothing is refused.

    Raises:
        RuntimeError: there is such a parameter.
    """
    if names:
        raise RuntimeError(
            f"Expected {', '.join(names[:5])} to be used only by calling the layers that own them, but they are used "
            "in another way too (a weight read directly, as in F.linear(x, layer.weight) or a fused loss; a layer's "
            "forward called past its hooks; an output in an object that is no pytree), so the captured gradient would "
            f"be incomplete. Call the layer as a module. {WAYS_OUT}"
        )


@final
class PassCheck:
    """The self-check of one pass: ``sum_i r_i g_i`` against autograd's gradient of the losses weighted by ``r``.

    The weights ``r`` are random, since a plain sum is right even when rows are mixed up.

    Args:
        weights: ``r``, shape ``(n,)`` float64.
        gradients: autograd's gradients of the parameters that the weighted losses reached, by name.
        layers: the layers each parameter was captured in, for the message.
        computed_in: the dtypes the layers computed in.
    """

    def __init__(
        self,
        weights: Tensor,
        gradients: Mapping[str, Tensor],
        layers: Mapping[str, Sequence[str]],
        computed_in: Iterable[torch.dtype],
    ) -> None:
        self._weights, self._layers, self._computed_in = weights, layers, tuple(computed_in)
        self._waiting = dict(gradients)
        self.complete = True
        """Whether every parameter that was captured could be compared."""

    def skip(self, name: str) -> None:
        """Leave out a parameter whose factors are not finite: they cannot be compared."""
        self._waiting.pop(name, None)
        self.complete = False

    def verify(self, name: str, uses: Sequence[Factors]) -> None:
        """Compare the captured factors of one parameter.

        Raises:
            RuntimeError: their weighted sum differs from autograd's gradient by more than rounding.
        """
        gradient = self._waiting.pop(name, None)
        if gradient is None:
            return
        dtypes = [gradient.dtype, *self._computed_in]
        weights, expected = self._weights, gradient.to(uses[0].dtype())
        error = torch.linalg.vector_norm(weighted_sum(uses, weights, expected.shape) - expected)
        scale = torch.stack([use.magnitude(weights.to(expected)) for use in uses]).max()
        scale = torch.maximum(scale, torch.linalg.vector_norm(expected))
        floor = torch.stack([use.rounding(weights, coarsest(dtypes)).to(scale) for use in uses]).sum()
        if not error <= tolerance(dtypes) * scale + floor:
            raise RuntimeError(
                f"Self-check: the captured per-candidate gradients of {name} (layer "
                f"{', '.join(map(repr, self._layers[name]))}) differ from autograd's by {float(error / scale):.1e} of "
                "their size. Expected losses that each depend on one row of the model's input: look for layers that "
                "mix rows (BatchNorm), inputs with time as first axis, an index of shape (n,) where n positions exist "
                "too, or a layer whose rule does not hold. " + WAYS_OUT
            )

    def finish(self) -> None:
        """Refuse parameters that autograd reached but for which no factors were captured.

        Raises:
            RuntimeError: a parameter was never compared.
        """
        refuse_uses_outside(list(self._waiting))


def verify_projection(
    found: Mapping[str, list[Factors]],
    gradients: Mapping[str, Tensor],
    weights: Tensor,
    generator: torch.Generator,
    computed_in: Iterable[torch.dtype] = (),
    *,
    more: Sequence[Tensor] = (),
) -> list[bool]:
    """Check autograd's gradients against the weighted factors by one random projection for each parameter.

    Args:
        found: captured factors, by parameter name.
        gradients: what a backward of the weighted losses formed, for the same parameters.
        weights: the weights of the losses, shape ``(n,)``, divided by the scale of the factors.
        generator: draws the random projections.
        computed_in: the dtypes the layers computed in.
        more: further flags to copy from the device in the same transfer.

    Returns:
        ``more``, as Python bools.

    Raises:
        RuntimeError: a gradient differs from its factors, or a parameter has none: it was used outside its layers.
    """
    names, misses = [], []
    for name, gradient in gradients.items():
        uses = found.get(name)
        if uses is None:
            names.append(name)
            misses.append(torch.ones((), dtype=torch.bool, device=gradient.device))
            continue
        dtype, device = uses[0].dtype(), gradient.device
        matrix = gradient.to(dtype).reshape(uses[0].rows, uses[0].columns)
        left, right = (torch.randn(size, generator=generator).to(device, dtype) for size in matrix.shape)
        expected, scale = projection(uses, weights, left, right)
        # The error of a single number may exceed that of the norm: four times the tolerance (seen: one, in bfloat16).
        error = (left @ matrix @ right - expected).abs()
        dtypes = [gradient.dtype, *computed_in]
        precision = coarsest(dtypes)
        floor = torch.stack([use.rounding(weights, precision).to(scale) for use in uses]).sum()
        names.append(name)
        misses.append(error > 4 * (tolerance(dtypes) * torch.maximum(scale, expected.abs()) + floor))
    seen = told([*misses, *more])
    listed = [name for name, miss in zip(names, seen[: len(names)], strict=True) if miss]
    if listed:
        raise RuntimeError(
            f"The captured gradients of {', '.join(listed[:5])} differ from those autograd formed: expected these "
            "parameters to be used only by calling the layers that own them (a weight read directly, as in "
            "F.linear(x, layer.weight), is not captured). Call the layer as a module. " + WAYS_OUT
        )
    return seen[len(names) :]


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """The largest relative difference that counts as rounding in the coarsest of some dtypes.

    It is half of the digits; at most those of float32, even where parameters are wider: most model families normalise
    in float32 whatever their inputs are.
    """
    return math.sqrt(coarsest(dtypes))


def coarsest(dtypes: Iterable[torch.dtype]) -> float:
    """The largest eps of some dtypes and float32."""
    return max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))
