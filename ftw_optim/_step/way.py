"""The ways of combining: what each captures, keeps and needs; ``combine.py`` has the function of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ftw_optim._capture.owners import owners
from ftw_optim._capture.plan import uncovered
from ftw_optim._capture.structure import Structure
from ftw_optim._step.parameters import StepParameters


@final
@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to the combined gradient.

    Attributes:
        name: the value of the option ``combine``.
        captures_all: the factors of every updated parameter are captured, not only those of the scored ones.
        keeps_graph: the graph of the candidates' losses is kept for a second backward pass.
        drops_factors: factors are dropped layer by layer, as soon as they are added to the Gram matrix.
        needs_rows: the closure is called again, as ``closure(rows=kept)``.
    """

    name: str
    captures_all: bool = False
    keeps_graph: bool = False
    drops_factors: bool = False
    needs_rows: bool = False


WAYS = {
    way.name: way
    for way in (
        Way(name="factors", captures_all=True),
        Way(name="graph", keeps_graph=True),
        Way(name="rerun", drops_factors=True, needs_rows=True),
    )
}
COMBINES = ("auto", *WAYS)
"""The values of the option ``combine``."""


def way_of(combine: str, structure: Structure, parameters: StepParameters) -> Way:
    """The way of a step with this option.

    ``"auto"`` is the cheapest: with a rule for every updated parameter the factors cost less than a second backward,
    however few parameters are scored; to run modules again for parameters that are not scored costs more.
    """
    if combine != "auto":
        return WAYS[combine]
    costly = _run_again(structure) & (parameters.updated.keys() - parameters.scored.keys())
    return WAYS["graph" if costly or uncovered(structure, parameters.updated) else "factors"]


def _run_again(structure: Structure) -> frozenset[str]:
    """The parameters for which a module is run again."""
    layers = [owner for owner in owners(structure) if owner.rule is None]
    return structure.once("run again", lambda: frozenset(n for owner in layers for n in owner.parameters.values()))
