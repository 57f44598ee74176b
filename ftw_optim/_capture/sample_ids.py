"""The candidates of rows and positions, where these are not the rows of the model's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ftw_optim._factors.row_groups import RowGroups

Ids = Tensor | Callable[[], Tensor]
"""The candidate of each row or position, or a function that returns it once the layer has run."""
GivenIds = Tensor | Mapping[str, Ids]
"""What a user may give for one batch: one tensor for all layers, or tensors by the names of layers."""


@final
class SampleIds:
    """The candidates of rows and positions: for all layers alike, or for each layer.

    Args:
        given: int64, -1 for none. One tensor for all layers: shape ``(b, t)`` of the token grid, or ``(r,)`` with one
            entry for each row of the model's input, where a candidate is several rows. Or a mapping from the name of a
            layer or of a module around it (``""``: all layers) to a tensor of the token grid or of the layer's own rows
            ``(r,)``, or to a function that returns one. Layers without an entry are read by the rows of the model's
            input.
        model: the model whose layers are named.

    Attributes:
        groups: the candidates of the rows of the model's input, where these were given; else None.

    Raises:
        TypeError: an entry is neither a tensor nor a function.
        ValueError: a tensor has another dtype or number of axes, or the model has no module of that name.
    """

    def __init__(self, given: GivenIds, model: nn.Module) -> None:
        if isinstance(given, Mapping) and (unknown := given.keys() - dict(model.named_modules()).keys()):
            raise ValueError(
                "Expected sample_ids by the names of the model's modules, as in model.named_modules(), got "
                f"{', '.join(map(repr, sorted(unknown, key=str)))}."
            )
        self._named = isinstance(given, Mapping)
        self._given: Mapping[str, Ids] = given if isinstance(given, Mapping) else {"": given}
        for name, ids in self._given.items():
            if isinstance(ids, Tensor):
                self._check(name, ids)
            elif not callable(ids):
                raise TypeError(
                    f"Expected sample_ids of {name!r} as a tensor, or a function that returns one, got "
                    f"{type(ids).__name__}."
                )
        self._used: dict[str, Tensor] = {}
        self.groups: RowGroups | None = None
        if isinstance(given, Tensor) and given.ndim == 1:
            self._given = {}
            self.groups = RowGroups(given)

    @property
    def is_for_all(self) -> bool:
        """Whether the candidates of every layer's rows were told."""
        return "" in self._given or self.groups is not None

    def of(self, layer: str) -> Tensor | None:
        """The candidates of the rows that a ``layer`` has just run on; None where it has no entry."""
        place = layer
        while place not in self._given:
            if not place:
                return None
            place = place.rpartition(".")[0]
        ids = self._given[place]
        if not isinstance(ids, Tensor):
            ids = ids()
            self._check(place, ids)
        self._used[place] = ids
        return ids

    def check(self, count: int) -> None:
        """Check what was used against the number of losses, ``count``.

        Raises:
            ValueError: an entry is below -1 or not below the number of losses, or a candidate has none of the rows of
                the model's input.
        """
        if self.groups is not None:
            self.groups.check(count)
        for name, ids in self._used.items():
            least, most = (int(ids.min()), int(ids.max())) if ids.numel() else (-1, -1)
            if least < -1 or most >= count:
                where = f" of {name!r}" if name else ""
                raise ValueError(
                    f"Expected sample_ids{where} from -1 (none) to {count - 1}, one less than the number of losses, "
                    f"got {least} to {most}."
                )

    def share_rows(self) -> bool:
        """Whether candidates share a row of a grid that was used: only then can they leak into each other."""
        return any(ids.ndim == 2 and bool(_several(ids).any()) for ids in self._used.values())

    def _check(self, name: str, ids: Any) -> None:
        if not isinstance(ids, Tensor) or ids.ndim not in (1, 2) or ids.dtype != torch.int64:
            rows = "a layer's rows (r,)" if self._named else "the rows (r,) of the model's input"
            shape = f"of the token grid's shape (b, t) or of {rows}"
            got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"Expected sample_ids{f' of {name!r}' if name else ''} as int64 {shape}, got {got}.")


def _several(ids: Tensor) -> Tensor:
    """Mask of the rows of a grid that hold several candidates: bool (b,)."""
    if not ids.shape[1]:
        return ids.new_zeros(len(ids), dtype=torch.bool)
    most = ids.max(dim=1, keepdim=True).values
    return ((ids >= 0) & (ids != most)).any(dim=1)
