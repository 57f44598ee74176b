"""Grids of parameters, of which the README's command runs a part, and a plain ``pytest`` all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """A point of a grid that stands for nothing that the others do not."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def grid(*axes: Iterable[Any], fast: Callable[..., bool]) -> list[Any]:
    """Every combination of some axes, marked as slow where ``fast`` of it is false."""
    points = list(product(*axes))
    assert any(fast(*point) for point in points), "A part of the grid must run by default."
    names = ["-".join(str(value).removeprefix("torch.") for value in point) for point in points]
    return [
        pytest.param(*point, marks=() if fast(*point) else pytest.mark.slow, id=name)
        for point, name in zip(points, names, strict=True)
    ]
