"""The state of the random generators that a module may draw from: Python's, NumPy's and those of torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RandomState:
    """The state of every generator that a module's call may draw from."""

    tensors: Mapping[torch.device, Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> RandomState:
        """The present state, on the CPU and on the devices of ``tensors``."""
        states = {torch.device("cpu"): torch.get_rng_state()}
        for device in {tensor.device for tensor in tensors}:
            if device.type not in ("cpu", "meta"):
                states[device] = torch.get_device_module(device.type).get_rng_state(device)
        numpy = sys.modules.get("numpy")
        return cls(
            tensors=states,
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(legacy=False),
        )

    def restore(self) -> None:
        """Make this the present state again."""
        for device, state in self.tensors.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device.type).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        return (
            self.python == other.python
            and all(torch.equal(state, other.tensors[device]) for device, state in self.tensors.items())
            and (self.numpy is None or _equal_states(self.numpy, other.numpy))
        )

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def own_randomness(tensors: Iterable[Tensor], seed: int) -> Iterator[None]:
    """A block with a random state of its own, seeded, on the devices of ``tensors``; afterwards it is as before."""
    before = RandomState.now(tensors)
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        yield
    finally:
        before.restore()


def _equal_states(one: Any, other: Any) -> bool:
    """Whether two states of numpy's generator are equal, as dictionaries with an array inside."""
    return repr(one) == repr(other)
