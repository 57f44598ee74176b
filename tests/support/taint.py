"""Stands for an accelerator: follows what a step computes from the model, and counts what would wait for the device."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

WAITS = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.nonzero,
    torch.nonzero, torch.equal, Tensor.equal, torch.allclose, Tensor.unique, torch.unique, Tensor.bincount,
    torch.bincount, Tensor.masked_select, torch.masked_select, Tensor.__contains__, Tensor.numpy,
    Tensor.repeat_interleave, torch.repeat_interleave, Tensor.__iter__, Tensor.is_nonzero, torch.is_nonzero,
}  # fmt: skip


class Device(TorchFunctionMode):
    """Within it, tensors made of the given ones are taken to be on a device; ``waits`` counts each place that waits."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._there = WeakTensorKeyDictionary()
        for tensor in tensors:
            self._there[tensor] = True
        self.waits: Counter[str] = Counter()

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if self._is_there(value)]
        result = func(*args, **kwargs)
        if not given:
            return result
        # Not a torch.device: that of another tensor, which here is the CPU's as well.
        copies = func is Tensor.cpu or (func is Tensor.to and "cpu" in tree_leaves((args[1:], kwargs)))
        masks = func is Tensor.__getitem__ and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:])
        )
        if func is Tensor.to and result is args[0] and not self._is_there(result):
            result = result.clone()  # onto the device
        frame = traceback.extract_stack(limit=2)[0] if func in WAITS or copies or masks else None
        if frame is not None and "/ftw_optim/_" in frame.filename:  # not the model's own
            self.waits[f"{frame.filename.rsplit('/', 1)[1]}:{frame.lineno} {getattr(func, '__name__', func)}"] += 1
        if copies:
            return result.clone()  # onto the host
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._there[value] = True
        return result
