"""Some of a batch's candidates, whatever the batch is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def has_rows(batch: Any) -> bool:
    """Whether a batch is of tensors alone, all with an axis of the same length first: the candidates'."""
    lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else -1 for leaf in tree_leaves(batch)}
    return len(lengths) == 1 and -1 not in lengths


def rows_of(batch: Any, rows: Tensor) -> Any:
    """The candidates of these indices, in a batch that :func:`has_rows`."""
    return tree_map_only(Tensor, lambda leaf: leaf[rows.to(leaf.device)], batch)
