"""The optimizer's parameters by their names in the model: the updated ones, and the scored ones among them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from ftw_optim._capture.structure import Structure

Scored = Callable[[str, nn.Parameter], bool]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StepParameters:
    """The optimizer's parameters that require a gradient; found anew for each step, since wrappers swap parameters.

    Attributes:
        updated: all of these parameters, by name.
        groups: the group of each parameter, by name.
        scored: the parameters that count in the Gram matrix, by name.
        others_train: whether some other parameter of the model requires a gradient too.
    """

    updated: Mapping[str, nn.Parameter]
    groups: Mapping[str, dict[str, Any]]
    scored: Mapping[str, nn.Parameter]
    others_train: bool

    def mask(self, names: Container[str]) -> int:
        """Which of the updated parameters are named, a bit for each in their order."""
        return sum(1 << place for place, name in enumerate(self.updated) if name in names)

    def named(self, masks: Iterable[int]) -> list[str]:
        """The updated parameters that are in any of the masks, in their order."""
        joined = 0
        for mask in masks:
            joined |= mask
        return [name for place, name in enumerate(self.updated) if joined >> place & 1]


def parameters_of(structure: Structure, groups: Sequence[dict[str, Any]], scored: Scored | None) -> StepParameters:
    """The parameters in ``groups``, by the names the model gives them.

    Raises:
        ValueError: a parameter is not the model's, none requires a gradient, or ``scored`` accepts none.
    """
    names = structure.names
    updated: dict[str, nn.Parameter] = {}
    group_of: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"Group {number} holds a parameter of shape {tuple(parameter.shape)} that is not the model's; "
                    "expected parameters of the model given to SelectiveOptimizer. Optimize the others apart."
                )
            if parameter.requires_grad:
                updated[name], group_of[name] = parameter, group
    if not updated:
        raise ValueError("None of the optimizer's parameters requires a gradient; expected at least one.")
    counted = {name: p for name, p in updated.items() if scored is None or scored(name, p)}
    if not counted:
        raise ValueError(
            f"scored={scored!r} accepts none of the {len(updated)} updated parameters; expected one or more."
        )
    trained = structure.once("trained", lambda: sum(p.requires_grad for p in structure.parameters.values()))
    return StepParameters(updated=updated, groups=group_of, scored=counted, others_train=trained > len(updated))
