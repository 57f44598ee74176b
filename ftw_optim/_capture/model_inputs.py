"""The inputs of the model, as far as they show how many candidates there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ftw_optim._capture.layouts import Grid
from ftw_optim._capture.sample_ids import SampleIds


@final
class ModelInputs:
    """The tensors that the model was called with.

    Args:
        sample_ids: the candidates of rows and positions, as the user gave them.
        bags: whether a layer finds the candidates in its inputs by itself, so that a first input with one axis may be
            the positions of bags of any length.
    """

    def __init__(self, sample_ids: SampleIds | None, *, bags: bool) -> None:
        self._sample_ids, self._bags = sample_ids, bags
        self._groups = None if sample_ids is None else sample_ids.groups
        self._tensors: list[Tensor] = []
        self._counts: list[int] = []
        self._held: set[tuple[int, int]] = set()

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the inputs of one call.

        Raises:
            ValueError: no number of candidates fits this call and those before, or there are not as many rows as
                ``sample_ids`` has.
        """
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0]
        self._held.update((one.data_ptr(), one.numel()) for leaf in leaves for one in _within(leaf))
        if not tensors:
            return
        first = tensors[0]
        if self._bags and first.ndim == 1 and len(tensors) > 1 and not first.is_floating_point():
            return  # positions of bags of any length: the losses will tell
        counts = _counts(tensors)
        if self._groups is not None:
            if self._groups.rows not in counts:
                raise ValueError(
                    f"Expected sample_ids with one entry for each of the {counts[0]} rows of the model's input, got "
                    f"{self._groups.rows}."
                )
            counts = [self._groups.rows]
        if self._counts:
            both = [count for count in self._counts if count in counts]
            if not both or (1 in both and len(both) == 1 and 1 not in (self._counts[0], counts[0])):
                raise ValueError(
                    f"The closure called the model on {self._counts[0]} and then on {counts[0]} rows; expected all "
                    "candidates in one call, or each call over all of them."
                )
            counts = both
        self._counts = counts
        self._tensors += tensors

    def grid(self, count: int | None = None) -> Grid:
        """The grid of candidates, or of rows that are grouped; there are ``count`` if that is known already."""
        if not self._counts:
            return Grid(n=None if self._groups is None else self._groups.rows, sample_ids=self._sample_ids)
        n = self._counts[0] if count is None else count
        rows = [one for one in self._tensors if one.shape[0] == n]
        first = next((one for one in rows if one.ndim > 1), rows[0])
        return Grid(
            n=n,
            positions=first.shape[1] if first.ndim > 1 else None,
            deep=any(one.ndim > 2 or (one.ndim == 2 and not one.is_floating_point()) for one in rows),
            sample_ids=self._sample_ids,
            counts=self._counts,
        )

    def holds(self, x: Tensor) -> bool:
        """Whether all of ``x`` is an input of the model, so that no row of it was chosen inside."""
        return (x.data_ptr(), x.numel()) in self._held


def _counts(tensors: list[Tensor]) -> list[int]:
    """The numbers of rows that the tensors allow; first that of the first tensor, unless it is one row for all others.

    One row is for all where a later tensor has the same shape but for more rows, as ``input_ids`` behind
    ``position_ids``; a square one is a mask of positions.
    """
    first = tensors[0].shape
    alike = (one.shape[0] for one in tensors if one.shape[1:] == first[1:] and one.shape[0] not in (1, *first[1:2]))
    likely = next(alike, 1) if first[0] == 1 and len(first) > 1 else first[0]
    return list(dict.fromkeys((likely, *(one.shape[0] for one in tensors))))


def _within(leaf: Any) -> Iterator[Tensor]:
    """A tensor, or the tensors that an object of a batch holds by key or attribute."""
    if isinstance(leaf, Tensor):
        yield leaf
    elif isinstance(leaf, Mapping) or hasattr(leaf, "__dict__"):
        held = leaf if isinstance(leaf, Mapping) else vars(leaf)
        yield from (value for value in held.values() if isinstance(value, Tensor))
