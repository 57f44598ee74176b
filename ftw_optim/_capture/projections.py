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
    reached = [some for bucket in buckets if (some := bucket.among(gradients)).names]
    together = {name for bucket in reached for name in bucket.names}
    alone = {name: gradient for name, gradient in gradients.items() if name not in together}
    _refuse_different([name for name in alone if name not in found])
    check = Projections(weights, generator, tuple(computed_in))
    for name, gradient in alone.items():
        check.add(name, found[name], gradient)
    for bucket in reached:
        formed = torch.stack([gradients[name] for name in bucket.names])
        check.add_all(bucket, formed, Buffer() if buffer is None else buffer)
    return check.finish(more)


@final
class Projections:
    """The projections of some gradients, both as autograd formed them and as factors give them.

    Args:
        weights: the weights of the losses, shape ``(n,)``, divided by the scale of the factors.
        generator: draws the random projections.
        computed_in: the dtypes the layers computed in.
    """

    def __init__(self, weights: Tensor, generator: torch.Generator, computed_in: Sequence[torch.dtype]) -> None:
        self._weights, self._generator, self._computed_in = weights, generator, computed_in
        self._names: list[str] = []
        self._rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        """Projections formed and expected, size of their terms, norm of the gradient; of one parameter or several."""
        self._tolerances: list[float] = []
        self._floors: dict[int, Tensor] = {}

    def _drawn(self, *shape: int, like: Tensor) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(like)

    def add(self, name: str, uses: Sequence[Factors], gradient: Tensor) -> None:
        """Add the gradient of one parameter."""
        matrix = gradient.to(uses[0].dtype()).reshape(uses[0].rows, uses[0].columns)
        ends = self.ends(matrix)
        self.add_projected(
            name, uses, ends, ends[0] @ matrix @ ends[1], torch.linalg.vector_norm(matrix), gradient.dtype
        )

    def ends(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The two vectors of the projection of one parameter's gradient."""
        left, right = (self._drawn(size, like=matrix) for size in matrix.shape)
        return left, right

    def add_projected(
        self,
        name: str,
        uses: Sequence[Factors],
        ends: tuple[Tensor, Tensor],
        formed: Tensor,
        norm: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Add the gradient of one parameter, of which only the projection and the norm are left."""
        expected, size = projection(uses, self._weights, *ends)
        dtypes = [dtype, *self._computed_in]
        self._begin(name, uses, dtypes)
        self._note(formed, expected, size, norm, dtypes=dtypes)

    def add_all(self, bucket: Bucket, gradients: Tensor, buffer: Buffer) -> None:
        """Add the gradients of a bucket's parameters, shape ``(B, *shape)``."""
        count, columns = len(bucket.names), bucket.uses[0].columns
        matrices = gradients.to(bucket.dtype).reshape(count, -1, columns)
        left = self._drawn(count, 1, matrices.shape[1], like=matrices)
        right = self._drawn(count, columns, 1, like=matrices)
        expected, sizes = bucket.projection(self._weights, left[:, 0], right[..., 0], buffer)
        norms, dtypes = torch.linalg.vector_norm(matrices, dim=(1, 2)), [gradients.dtype, *self._computed_in]
        for name, use in zip(bucket.names, bucket.uses, strict=True):
            self._begin(name, [use], dtypes)
        self._note(left @ matrices @ right, expected, sizes, norms, dtypes=dtypes)

    def _begin(self, name: str, uses: Sequence[Factors], dtypes: Sequence[torch.dtype]) -> None:
        """Begin the next parameter: its name, and the rounding of terms that were summed before."""
        floors = [use.rounding(self._weights, coarsest(dtypes)) for use in uses if use.terms is not None]
        if floors:
            self._floors[len(self._names)] = torch.stack(floors).sum()
        self._names.append(name)

    def _note(self, *row: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        formed, expected, size, norm = (values.reshape(-1) for values in row)
        self._rows.append((formed, expected, size, norm))
        self._tolerances += [tolerance(dtypes)] * len(expected)

    def finish(self, more: Sequence[Tensor] = ()) -> list[bool]:
        """Refuse gradients that differ from their factors; returns further flags, read in the same transfer.

        Raises:
            RuntimeError: there is such a gradient.
        """
        misses, flags = self._told(more)
        _refuse_different(misses)
        return flags

    def _told(self, more: Sequence[Tensor]) -> tuple[list[str], list[bool]]:
        """The names of the gradients that differ from their factors, and the values of further flags."""
        if not self._names:
            return [], told(more)
        formed, expected, sizes, norms = (
            torch.cat([one.to(values[0].device, torch.promote_types(values[0].dtype, one.dtype)) for one in values])
            for values in zip(*self._rows, strict=True)
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


@final
class PassingGradients:
    """The same check of gradients that are gone once they were seen, and may come in several parts.

    Args:
        found: captured factors, by parameter name.
        weights, generator, computed_in: as for :class:`Projections`.
    """

    def __init__(
        self,
        found: Mapping[str, Sequence[Factors]],
        weights: Tensor,
        generator: torch.Generator,
        computed_in: Iterable[torch.dtype] = (),
    ) -> None:
        self._found = found
        self._check = Projections(weights, generator, tuple(computed_in))
        self._seen: dict[str, tuple[tuple[Tensor, Tensor], Tensor, Tensor, torch.dtype]] = {}

    def see(self, name: str, gradient: Tensor) -> None:
        """Look at a part of the gradient of one parameter.

        Raises:
            RuntimeError: no factors were captured of this parameter.
        """
        uses = self._found.get(name)
        if uses is None:
            _refuse_different([name])
            return
        matrix = gradient.to(uses[0].dtype()).reshape(uses[0].rows, uses[0].columns)
        ends = self._seen[name][0] if name in self._seen else self._check.ends(matrix)
        formed, norm = ends[0] @ matrix @ ends[1], torch.linalg.vector_norm(matrix)
        if name in self._seen:
            formed, norm = formed + self._seen[name][1], norm + self._seen[name][2]
        self._seen[name] = ends, formed, norm, gradient.dtype

    def finish(self, more: Sequence[Tensor] = ()) -> list[bool]:
        """See :meth:`Projections.finish`."""
        for name, (ends, formed, norm, dtype) in self._seen.items():
            self._check.add_projected(name, self._found[name], ends, formed, norm, dtype)
        return self._check.finish(more)


def _refuse_different(names: Sequence[str]) -> None:
    if names:
        raise RuntimeError(
            f"The captured gradients of {', '.join(names[:5])} differ from those autograd formed: expected these "
            "parameters to be used only by calling the layers that own them (a weight read directly, as in "
            "F.linear(x, layer.weight), is not captured). Call the layer as a module. " + WAYS_OUT
        )
