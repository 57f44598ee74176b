"""The last pass of a model in shards, which is made once more where only other ranks have rows: they would wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ftw_optim._capture.structure import Structure

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@final
class SeenPass:
    """The inputs of the latest pass that ran candidates, of a model in shards.

    Where other ranks' candidates are, this rank's have been before: they take the same way through the model.
    """

    def __init__(self) -> None:
        self._latest: Call | None = None
        self._of_candidates: Call | None = None

    @classmethod
    def of(cls, structure: Structure) -> SeenPass:
        """What was seen of a model, from step to step."""
        return structure.once("seen pass", cls)

    @contextmanager
    def watching(self, structure: Structure) -> Iterator[None]:
        """A block in which the calls are seen: those of the one module that has all shards inside of it."""
        outermost = structure.outermost
        handle = outermost[0].register_forward_pre_hook(self._see, with_kwargs=True) if len(outermost) == 1 else None
        try:
            yield
        finally:
            self._latest = None
            if handle is not None:
                handle.remove()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._latest = module, *tree_map_only(Tensor, Tensor.detach, (args, kwargs))

    def was_of_candidates(self) -> None:
        """Note that the latest call ran candidates."""
        self._of_candidates = self._latest

    @property
    def known(self) -> bool:
        """Whether there is a pass that can be made again."""
        return self._of_candidates is not None

    def losses(self) -> Tensor:
        """One number for each row of the pass, made once more, with their graph."""
        assert self._of_candidates is not None
        module, args, kwargs = self._of_candidates
        outputs = [one for one in tree_leaves(module(*args, **kwargs)) if isinstance(one, Tensor) and one.ndim > 1]
        found = next(one for one in outputs if one.requires_grad)
        return found.to(torch.promote_types(found.dtype, torch.float32)).flatten(1).mean(dim=1)
