"""Self-checks of capture: factors against autograd's gradients, and uses of a parameter outside its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._factors.factors import Factors, weighted_sum

Link = tuple[type, type]
"""The types of two operations of a graph, of which the first reads what the second returned."""

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
        self._links: set[tuple[str, str]] = set()  # names, since types of operations cannot be pickled

    def forget(self) -> None:
        """Check every layer anew."""
        self._seen.clear()

    def notice(self, links: set[Link]) -> None:
        """Check every layer anew if the graph has links between operations that no graph before had.

        Losses that begin to depend on other rows, in a loss of another kind, show so.
        """
        named = {(above.__name__, below.__name__) for above, below in links}
        if not named <= self._links:
            self._links |= named
            self.forget()

    def due(self, keys: Iterable[tuple[object, ...]]) -> bool:
        """Whether any of these keys still has to be checked."""
        return any(self._seen.get(key, 0) < self.PATIENCE for key in keys)

    def passed(self, key: tuple[object, ...], *, conclusive: bool, short: bool) -> None:
        """Note a check that found no error.

        Args:
            key: the layer, and how it was read.
            conclusive: whether a gradient arrived that is not zero.
            short: whether anything was computed in a short dtype, where some losses had the same weight: then it takes
                three checks.
        """
        self._seen[key] = self._seen.get(key, 0) + (1 if not conclusive else 2 if short else self.PATIENCE)


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


def check_weights(count: int, generator: torch.Generator, computed_in: Iterable[torch.dtype]) -> Tensor:
    """Weights of so many losses for a :class:`PassCheck`: between 0 and 2, float64.

    They differ much, so that the weighted sum shows if rows are mixed up. Where anything was computed in a short dtype,
    they are 1/4, 1/2, 1 and 2 in turn, in a random order: a backward pass, which is linear, rounds each row weighted by
    a power of two as it did without the weight.
    """
    if coarsest(computed_in) == coarsest([]):
        return 2 * torch.rand(count, generator=generator, dtype=torch.float64)
    exponents = torch.arange(count) % 4 - 2
    return 2.0 ** exponents[torch.randperm(count, generator=generator)].to(torch.float64)


@final
class PassCheck:
    """The self-check of one pass: ``sum_i r_i g_i`` against autograd's gradient of the losses weighted by ``r``.

    Random weights, since a plain sum is right even when rows are mixed up; see :func:`check_weights`.

    Args:
        weights: ``r``, shape ``(n,)`` float64.
        gradients: autograd's gradients of the parameters that the weighted losses reached, by name.
        layers: the layers each parameter was captured in, for the message.
        computed_in: the dtypes the layers computed in, and float16 if anything on the way to the losses was.
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
        self._noise = noise([torch.linalg.vector_norm(gradient.double()) for gradient in gradients.values()])
        self.drowned: set[str] = set()
        """Parameters whose gradients are lost in the rounding of the largest: of them the check knows nothing."""
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
        floor = floor + self._noise.to(scale)
        if bool(scale <= floor):
            self.drowned.add(name)
        # The kernels of norms sum the gradients of scales and shifts in the short dtype itself.
        bound = tolerance(dtypes) if gradient.ndim < 2 else narrow_tolerance(dtypes)
        if not error <= bound * scale + floor:
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


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """The largest relative difference that counts as rounding in the coarsest of some dtypes.

    It is half of the digits; at most those of float32, even where parameters are wider: most model families normalise
    in float32 whatever their inputs are.
    """
    return math.sqrt(coarsest(dtypes))


def narrow_tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """The tolerance where both sides were rounded alike but for their last sum: a few eps of a short dtype.

    Not in float16, whose small numbers lose digits once they are halved.
    """
    dtypes = tuple(dtypes)
    return tolerance(dtypes) if torch.float16 in dtypes else max(tolerance([]), 4 * coarsest(dtypes))


def noise(sizes: Sequence[Tensor]) -> Tensor:
    """The size below which a gradient is nothing but what rounding leaves where exact terms would cancel; a scalar.

    The query and key projections of rows of one token get such: softmax over one key passes no gradient on. The size is
    that of float32, in which kernels compute what cancels, whatever the dtype of what they return.

    Args:
        sizes: of the gradients of all parameters, scalars or several in one tensor.
    """
    largest = [size.to(sizes[0]) for size in sizes]
    return coarsest([]) * torch.stack(largest).max() if largest else torch.zeros(())


def coarsest(dtypes: Iterable[torch.dtype]) -> float:
    """The largest eps of some dtypes and float32."""
    return max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))
