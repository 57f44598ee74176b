"""The check of every step whose gradient autograd forms: one random projection of each gradient, from both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ftw_optim._capture.self_check import WAYS_OUT, coarsest, noise, tolerance
from ftw_optim._factors.buckets import Bucket
from ftw_optim._factors.buffer import Buffer
from ftw_optim._factors.factors import Factors, projection
from ftw_optim._factors.finiteness import told


def verify_projection(
    found: Mapping[str, Sequence[Factors]],
    gradients: Mapping[str, Tensor],
    weights: Tensor,
    generator: torch.Generator,
    computed_in: Iterable[torch.dtype] = (),
    *,
    buckets: Sequence[Bucket] = (),
    buffer: Buffer | None = None,
    more: Sequence[Tensor] = (),
) -> list[bool]:
    """Check autograd's gradients against the weighted factors by one random projection for each parameter.

    Args:
        found: captured factors, by parameter name.
        gradients: what a backward of the weighted losses formed, for the same parameters.
        weights: the weights of the losses, shape ``(n,)``, divided by the scale of the factors.
        generator: draws the random projections.
        computed_in: the dtypes the layers computed in.
        buckets: captured factors of further parameters.
        buffer: memory for the factors in buckets.
        more: further flags to copy from the device in the same transfer.

    Returns:
        ``more``, as Python bools.

    Raises:
        RuntimeError: a gradient differs from its factors, or a parameter has none: it was used outside its layers.
    """
    shared = [bucket for bucket in buckets if gradients.keys() >= set(bucket.names)]
    together = {name for bucket in shared for name in bucket.names}
    single = {name: [use] for bucket in buckets for name, use in zip(bucket.names, bucket.uses, strict=True)}
    alone = {name: uses for name, uses in {**found, **single}.items() if name not in together and name in gradients}
    _refuse_different([name for name in gradients if name not in alone and name not in together])
    check = _Projections(weights, generator, tuple(computed_in))
    for name, uses in alone.items():
        check.add(name, uses, gradients[name])
    for bucket in shared:
        formed = torch.stack([gradients[name] for name in bucket.names])
        check.add_all(bucket, formed, Buffer() if buffer is None else buffer)
    misses, flags = check.told(more)
    _refuse_different(misses)
    return flags


@final
class _Projections:
    """The projections of some gradients, both as autograd formed them and as factors give them."""

    def __init__(self, weights: Tensor, generator: torch.Generator, computed_in: Sequence[torch.dtype]) -> None:
        self._weights, self._generator, self._computed_in = weights, generator, computed_in
        self._names: list[str] = []
        self._formed: list[Tensor] = []
        self._expected: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tolerances: list[float] = []
        self._floors: dict[int, Tensor] = {}

    def _drawn(self, *shape: int, like: Tensor) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(like)

    def add(self, name: str, uses: Sequence[Factors], gradient: Tensor) -> None:
        """Add the gradient of one parameter."""
        matrix = gradient.to(uses[0].dtype()).reshape(uses[0].rows, uses[0].columns)
        left, right = (self._drawn(size, like=matrix) for size in matrix.shape)
        expected, size = projection(uses, self._weights, left, right)
        dtypes = [gradient.dtype, *self._computed_in]
        floors = [use.rounding(self._weights, coarsest(dtypes)) for use in uses if use.terms is not None]
        if floors:
            self._floors[len(self._names)] = torch.stack(floors).sum()
        self._names.append(name)
        self._note(left @ matrix @ right, expected, size, torch.linalg.vector_norm(matrix), dtypes)

    def add_all(self, bucket: Bucket, gradients: Tensor, buffer: Buffer) -> None:
        """Add the gradients of a bucket's parameters, shape ``(B, *shape)``."""
        count, columns = len(bucket.names), bucket.uses[0].columns
        matrices = gradients.to(bucket.dtype).reshape(count, -1, columns)
        left, right = (
            self._drawn(count, 1, matrices.shape[1], like=matrices),
            self._drawn(count, columns, 1, like=matrices),
        )
        expected, sizes = bucket.projection(self._weights, left[:, 0], right[..., 0], buffer)
        self._names += bucket.names
        norms = torch.linalg.vector_norm(matrices, dim=(1, 2))
        self._note(left @ matrices @ right, expected, sizes, norms, [gradients.dtype, *self._computed_in])

    def _note(
        self, formed: Tensor, expected: Tensor, size: Tensor, norm: Tensor, dtypes: Sequence[torch.dtype]
    ) -> None:
        for values, one in (
            (self._formed, formed),
            (self._expected, expected),
            (self._sizes, size),
            (self._norms, norm),
        ):
            values.append(one.reshape(-1))
        self._tolerances += [tolerance(dtypes)] * expected.numel()

    def told(self, more: Sequence[Tensor]) -> tuple[list[str], list[bool]]:
        """The names of the gradients that differ from their factors, and the values of further flags."""
        if not self._names:
            return [], told(more)
        formed, expected, sizes, norms = (
            torch.cat([one.to(values[0].device, torch.promote_types(values[0].dtype, one.dtype)) for one in values])
            for values in (self._formed, self._expected, self._sizes, self._norms)
        )
        # Of few positions the projections may all be small by chance, but not what is projected of their rounding.
        sizes = torch.maximum(sizes, norms)
        bounds = torch.maximum(sizes, expected.abs()) * torch.tensor(self._tolerances).to(sizes) + noise([sizes])
        for at, floor in self._floors.items():
            bounds[at] += floor.to(bounds)
        # The error of a single number may exceed that of the norm: four times the tolerance (seen: one, in bfloat16).
        flags = told([(formed - expected).abs() > 4 * bounds, *more])
        count = len(self._names)
        return [name for name, miss in zip(self._names, flags, strict=False) if miss], flags[count:]


def _refuse_different(names: Sequence[str]) -> None:
    if names:
        raise RuntimeError(
            f"The captured gradients of {', '.join(names[:5])} differ from those autograd formed: expected these "
            "parameters to be used only by calling the layers that own them (a weight read directly, as in "
            "F.linear(x, layer.weight), is not captured). Call the layer as a module. " + WAYS_OUT
        )
