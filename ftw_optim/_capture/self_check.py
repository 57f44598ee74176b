"""Checks of what was captured: against autograd's gradients, and for uses of a parameter outside its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors, projection, weighted_sum

WAYS_OUT = (
    "Leave it out of what is scored (scored=last_blocks(model, 1), or a predicate (name, parameter) that says no to "
    'it) with combine="graph", which updates every parameter exactly; freeze it; or register a rule with '
    "@register_layer."
)


@final
class SelfChecks:
    """What the self-check has vouched for: which layers, read in which ways."""

    PATIENCE = 5
    """How often a layer is looked at that never gets a gradient, such as one behind a gate that stays shut."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], int] = {}

    def due(self, keys: Iterable[tuple[object, ...]]) -> bool:
        """Whether any of these has not been vouched for."""
        return any(self._seen.get(key, 0) < self.PATIENCE for key in keys)

    def passed(self, key: tuple[object, ...], *, conclusive: bool) -> None:
        """Note a check that found nothing; without gradients it could not."""
        self._seen[key] = self.PATIENCE if conclusive else self._seen.get(key, 0) + 1


def refuse_uses_outside(names: Sequence[str]) -> None:
    """Raise if a gradient reached any parameter by another way than the layers that own it."""
    if names:
        raise RuntimeError(
            f"Expected {', '.join(names[:5])} to be used only by calling the layers that own them, but they are used "
            "in another way too (a weight read directly, as in F.linear(x, layer.weight) or a fused loss; a layer's "
            "forward called past its hooks; an output in an object that is no pytree), so the captured gradient would "
            f"be incomplete. Call the layer as a module. {WAYS_OUT}"
        )


@final
class PassCheck:
    """The self-check of one pass: ``sum_i r_i g_i`` beside autograd's gradient of losses weighted by a random ``r``.

    Random weights, since a plain sum is right even when rows are mixed up.

    Args:
        weights: ``r``, shape ``(n,)`` float64.
        gradients: autograd's, of the parameters that it reached.
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

    def verify(self, name: str, uses: Sequence[Factors]) -> None:
        """Compare the captured factors of one parameter.

        Raises:
            RuntimeError: they are not autograd's gradient.
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
        """Refuse what autograd reached and no layer was captured for.

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
        weights: shape ``(n,)``, those of the losses (over the scale of the factors).
        generator: of the projections.
        computed_in: the dtypes the layers computed in.
        more: flags that are copied from the device along.

    Returns:
        ``more``, as Python bools.

    Raises:
        RuntimeError: they differ: a captured parameter was used outside the layers that own it.
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
        # A single number may be off by more than the norm is, four times the tolerance (seen: one, in bfloat16).
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


def told(flags: Sequence[Tensor]) -> list[bool]:
    """Some flags, each a bool scalar, from their devices in one copy."""
    if not flags:
        return []
    answers: list[bool] = torch.stack([flag.to(flags[0].device) for flag in flags]).cpu().tolist()
    return answers


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Largest relative difference that counts as rounding in the coarsest of some dtypes.

    Half of the digits, and those of float32 even where parameters are wider: most model families normalise in float32
    whatever they are given.
    """
    return math.sqrt(coarsest(dtypes))


def coarsest(dtypes: Iterable[torch.dtype]) -> float:
    """The largest eps of some dtypes and float32."""
    return max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))
