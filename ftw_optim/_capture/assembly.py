"""Factors of each parameter, put together from the uses of all layers that own it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import nn

from ftw_optim._capture.attribution import factors_of
from ftw_optim._capture.layer_use import Use
from ftw_optim._factors.factors import Factors
from ftw_optim._factors.row_groups import RowGroups


@final
class Assembly:
    """The factors that one pass has found so far.

    Args:
        parameters: the captured parameters, by name.
        count: how many candidates there are.
        groups: the candidates of the rows of the model's input; None where these are the candidates.

    Attributes:
        found: the factors of each parameter, one entry a use; whoever takes them may remove them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], count: int, groups: RowGroups | None = None) -> None:
        self._parameters, self._count, self._groups = parameters, count, groups
        self._shapes: dict[str, tuple[int, int]] = {}
        self.found: dict[str, list[Factors]] = {}

    def add(self, use: Use) -> None:
        """Add the factors of one use, which a gradient has reached, to those of its parameters; without gradients.

        Raises:
            RuntimeError: the rules of layers that share a parameter disagree about its shape. Everything that
                :func:`factors_of` raises is raised too.
        """
        for name, factors in factors_of(use, self._parameters, self._count, self._groups):
            shape = factors.rows, factors.columns
            first = self._shapes.setdefault(name, shape)
            if shape != first:
                raise RuntimeError(
                    f"The rules of the layers that share {name} return gradients of {first[0]} x {first[1]} and of "
                    f"{shape[0]} x {shape[1]} entries; expected one shape."
                )
            self.found.setdefault(name, []).append(factors)

    def refuse_nothing(self) -> None:
        """Refuse a pass that reached no captured parameter.

        Raises:
            RuntimeError: no factors were added in this pass.
        """
        if not self._shapes:
            raise RuntimeError(
                "Expected the losses to depend on a captured parameter, but none was reached. Compute the losses with "
                "the model that was given to SelectiveOptimizer, with its layers called as modules (an exported graph, "
                "or one compiled ahead of time, calls none)."
            )
