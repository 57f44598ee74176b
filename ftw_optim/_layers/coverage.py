"""Which rule captures which parameter: the table shown to users, and the plan that capture follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ftw_optim._layers.registry import LayerRule, own_parameters, rule_for

_known: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], LayerRule | str]] = WeakKeyDictionary()


@final
@dataclass(frozen=True, kw_only=True)
class Covered:
    """One line of a coverage table.

    Attributes:
        name: of the parameter, as in ``model.named_parameters()``.
        shape: of the parameter.
        rule: the rule that captures it, several of them for a tied parameter; None where none does.
        reason: why no rule captures it, with the module's name; empty where one does.
        scored: it counts in the Gram matrix; None before a backward.
        uses: how often the last backward captured it; None before a backward.
        multiplications: per candidate, that its share of the Gram matrix took; None before a backward.
    """

    name: str
    shape: tuple[int, ...]
    rule: str | None
    reason: str = ""
    scored: bool | None = None
    uses: int | None = None
    multiplications: int | None = None


@final
@dataclass(frozen=True)
class Coverage:
    """Every trainable parameter with the rule that captures it, or why none does. Prints as a table."""

    rows: tuple[Covered, ...]

    def __iter__(self) -> Iterator[Covered]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Covered:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        after = any(row.uses is not None for row in self.rows)
        header = ["parameter", "shape", "rule"] + (["scored", "uses", "multiplications"] if after else [])
        lines = [header]
        for row in self.rows:
            line = [row.name, "x".join(map(str, row.shape)) or "scalar", row.rule or f"NONE: {row.reason}"]
            if after:
                line += ["yes" if row.scored else "no", str(row.uses or 0), f"{row.multiplications or 0:,}"]
            lines.append(line)
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def after(
        self, scored: Callable[[str], bool], uses: Mapping[str, int], multiplications: Mapping[str, int]
    ) -> Coverage:
        """The same table after a backward."""
        return Coverage(
            tuple(
                replace(
                    row,
                    scored=scored(row.name),
                    uses=uses.get(row.name, 0),
                    multiplications=multiplications.get(row.name, 0),
                )
                for row in self.rows
            )
        )


@final
@dataclass(frozen=True, kw_only=True)
class Owner:
    """A module that owns parameters directly, with the names they have in it and in the model."""

    name: str
    module: nn.Module
    rule: LayerRule | str
    parameters: Mapping[str, str] = field(default_factory=dict)


def owners(model: nn.Module) -> list[Owner]:
    """All modules that own trainable parameters, in the model's order; tied ones under their first name."""
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first_name.setdefault(id(parameter), name)
    found = []
    for name, module in model.named_modules():
        own = {
            local: first_name[id(parameter)]
            for local, parameter in own_parameters(module).items()
            if parameter.requires_grad
        }
        if own:
            found.append(Owner(name=name, module=module, rule=_rule(module), parameters=own))
    return found


def _rule(module: nn.Module) -> LayerRule | str:
    """``rule_for(module)``, remembered: a layer known by its behaviour is run to see it."""
    key = (
        type(module),
        module.training,
        *((name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in own_parameters(module).items()),
    )
    remembered = _known.get(module)
    if remembered is None or remembered[0] != key:
        remembered = (key, rule_for(module))
        _known[module] = remembered
    return remembered[1]


def coverage(model: nn.Module) -> Coverage:
    """Table of every trainable parameter of a model: the rule that should capture it, or why none does.

    Args:
        model: any module; nothing of it is run but small probes of single layers.

    Returns:
        One row for each entry of ``model.named_parameters()`` that requires a gradient. ``print`` it.
    """
    return table(owners(model), dict(model.named_parameters()))


def table(found: list[Owner], parameters: Mapping[str, torch.Tensor]) -> Coverage:
    """The coverage of the ``parameters`` that require a gradient."""
    rules: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for owner in found:
        for local, name in owner.parameters.items():
            place = ".".join(filter(None, (owner.name, local)))
            if isinstance(owner.rule, str):
                reasons.setdefault(name, f"{owner.rule} ({place})")
            elif owner.rule.parameters is not None and local not in owner.rule.parameters:
                reasons.setdefault(name, f"the rule {owner.rule.name} does not know it ({place})")
            else:
                rules.setdefault(name, []).append(owner.rule.name)
    for name, parameter in parameters.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            reasons.setdefault(name, "a hook on the parameter changes or reads its gradient, which capture bypasses")
    return Coverage(
        tuple(
            Covered(
                name=name,
                shape=tuple(parameter.shape),
                rule=None if name in reasons else " + ".join(dict.fromkeys(rules.get(name, []))) or None,
                reason=reasons.get(name, ""),
            )
            for name, parameter in parameters.items()
            if parameter.requires_grad
        )
    )
