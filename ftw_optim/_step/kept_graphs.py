"""Batches whose graphs are kept for a second backward pass, and the sums of losses that it starts from."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple, final

from torch import Tensor

from ftw_optim._capture.capture import Capture


class Total(NamedTuple):
    """A sum of losses to differentiate; one that does not count is there because other ranks wait for its passes."""

    loss: Tensor
    counts: bool = True


@final
class Batches:
    """The batches of one closure.

    Attributes:
        captures: the captures that have not ended.
        graphs: the capture and the losses of each batch whose graph is kept, and whether they count.
    """

    def __init__(self) -> None:
        self.captures = ExitStack()
        self.graphs: list[tuple[Capture, Tensor, bool]] = []

    def end(self) -> None:
        """Let go of the graphs, and end the captures."""
        self.graphs.clear()
        self.captures.close()
