"""The capture plan: which parameters are captured, and by which modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from torch import nn

from ftw_optim._capture.coverage import Covered, refused
from ftw_optim._capture.owners import Owner, owners
from ftw_optim._capture.self_check import WAYS_OUT
from ftw_optim._capture.structure import Structure


@final
@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """The captured parameters, by name, and the layers that own them.

    Attributes:
        structure: the whole model.
        parameters: the captured parameters, by name.
        owners: the layers that own them, with these parameters alone.
    """

    structure: Structure
    parameters: Mapping[str, nn.Parameter]
    owners: tuple[Owner, ...]


def plan(structure: Structure, names: Iterable[str]) -> CapturePlan:
    """The plan that captures the named parameters of a model.

    Raises:
        NotImplementedError: a named parameter cannot be captured.
    """
    wanted = frozenset(names)
    return structure.once("plan", lambda: _plan(structure, wanted), of=wanted)


def _plan(structure: Structure, names: frozenset[str]) -> CapturePlan:
    missing = uncovered(structure, names)
    if missing:
        listed = "; ".join(f"{row.name}: {row.reason}" for row in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise NotImplementedError(f"Expected parameters that can be captured, but not {listed}{more}. {WAYS_OUT}")
    kept = []
    for owner in owners(structure):
        own = {local: name for local, name in owner.parameters.items() if name in names}
        if own:
            kept.append(replace(owner, parameters=own))
    parameters = {name: parameter for name, parameter in structure.parameters.items() if name in names}
    return CapturePlan(structure=structure, parameters=parameters, owners=tuple(kept))


def uncovered(structure: Structure, names: Collection[str]) -> list[Covered]:
    """The coverage rows of the named parameters that are refused."""
    return [row for row in refused(structure) if row.name in names]
