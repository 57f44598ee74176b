"""Selection of some of a batch's candidates, for a batch in any structure of tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def has_rows(batch: Any) -> bool:
    """Whether a batch holds only tensors, all with a first axis of the same length: the candidates' axis."""
    lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else -1 for leaf in tree_leaves(batch)}
    return len(lengths) == 1 and -1 not in lengths


def rows_of(batch: Any, rows: Tensor) -> Any:
    """The part of a batch with the candidates at the indices ``rows``; for a batch that :func:`has_rows`."""
    return tree_map_only(Tensor, lambda leaf: leaf[rows.to(leaf.device)], batch)
