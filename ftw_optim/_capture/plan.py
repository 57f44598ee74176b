"""The capture plan: which parameters are captured, and by which modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from torch import nn

from ftw_optim._capture.coverage import Covered, table
from ftw_optim._capture.owners import Owner, owners
from ftw_optim._capture.self_check import WAYS_OUT


@final
@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """The captured parameters, by name, and the layers that own them."""

    parameters: Mapping[str, nn.Parameter]
    owners: tuple[Owner, ...]


def plan(model: nn.Module, names: Iterable[str], model_owners: list[Owner] | None = None) -> CapturePlan:
    """The plan that captures the named parameters.

    Raises:
        NotImplementedError: a named parameter cannot be captured.
    """
    names = set(names)
    found = owners(model) if model_owners is None else model_owners
    missing = uncovered(found, names, model)
    if missing:
        listed = "; ".join(f"{row.name}: {row.reason}" for row in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise NotImplementedError(f"Expected parameters that can be captured, but not {listed}{more}. {WAYS_OUT}")
    kept = []
    for owner in found:
        own = {local: name for local, name in owner.parameters.items() if name in names}
        if own:
            kept.append(replace(owner, parameters=own))
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    return CapturePlan(parameters=parameters, owners=tuple(kept))


def uncovered(model_owners: Iterable[Owner], names: Iterable[str], model: nn.Module) -> list[Covered]:
    """The coverage rows of the named parameters that are refused."""
    wanted = set(names)
    rows = table(list(model_owners), dict(model.named_parameters()))
    return [row for row in rows if row.name in wanted and not row.exact]
