"""The coverage table shown to users: which rule captures each parameter, and at what cost."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import final

from torch import nn

from ftw_optim._capture.owners import owners
from ftw_optim._capture.structure import Structure, has_hooks
from ftw_optim._factors.micro_batches import Footprint
from ftw_optim._layers.registry import LayerRule


@final
@dataclass(frozen=True, kw_only=True)
class Covered:
    """One line of a coverage table.

    Attributes:
        name: the parameter's name, as in ``model.named_parameters()``.
        shape: the parameter's shape.
        rule: the rule that captures it, several of them for a tied parameter; "fallback" where a module is run again;
            None where it is refused.
        reason: why it is refused, with the module's name; empty where it is captured exactly.
        again: the modules that are run again for it, candidate by candidate, since no rule knows it.
        scored: whether the parameter counts in the Gram matrix; None before a backward.
        uses: how often the last backward captured the parameter; None before a backward.
        multiplications: multiplications for one candidate's gradient to be multiplied out from the factors; 0 where the
            parameter is not scored; None before a backward.
        bytes: memory of the parameter's factors in the last backward; None before a backward.
    """

    name: str
    shape: tuple[int, ...]
    rule: str | None
    reason: str = ""
    again: tuple[str, ...] = ()
    scored: bool | None = None
    uses: int | None = None
    multiplications: int | None = None
    bytes: int | None = None

    @property
    def exact(self) -> bool:
        """Whether the parameter is captured; every captured parameter is exact, all others are refused.

        A layer may still get inputs, when it runs, in which candidates cannot be told apart. The step then raises an
        error that names the layer.
        """
        return self.rule is not None

    @property
    def cost(self) -> str:
        """The cost of capturing the parameter, in words, in addition to the ordinary backward pass."""
        if not self.exact:
            return self.reason
        if self.again:
            return f"runs {', '.join(self.again)} again, holds n x {_count(self._numel)} numbers"
        return "factors"

    @property
    def _numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


@final
@dataclass(frozen=True)
class Coverage:
    """Every trainable parameter with the rule that captures it, or why it is refused. Prints as a table.

    The printed table shows equal lines of repeated blocks as one line, with the range of their numbers in the name.
    """

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
        lines = [
            ["parameter", "shape", "rule", "capture", "cost"] + (["scored", "uses", "MACs", "MiB"] if after else [])
        ]
        for rows in _repeated(self.rows):
            row = rows[0]
            line = [_names(rows), "x".join(map(str, row.shape)) or "scalar", row.rule or "-"]
            line += ["exact" if row.exact else "refused", row.cost]
            if after:
                line += [
                    "yes" if row.scored else "no",
                    str(row.uses or 0),
                    _count(sum(one.multiplications or 0 for one in rows)),
                    f"{sum(one.bytes or 0 for one in rows) / 2**20:.1f}",
                ]
            lines.append(line)
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def after(self, scored: Collection[str], footprints: Mapping[str, Footprint]) -> Coverage:
        """This table, with the columns filled in that only a backward can tell.

        Args:
            scored: names of the parameters that count in the Gram matrix.
            footprints: number of uses, multiplications and bytes of the factors of each captured parameter.
        """
        rows = []
        for row in self.rows:
            took, counts = footprints.get(row.name, Footprint.of([])), row.name in scored
            rows.append(
                replace(
                    row,
                    scored=counts,
                    uses=took.uses,
                    multiplications=took.multiplications if counts else 0,
                    bytes=took.bytes,
                )
            )
        return Coverage(tuple(rows))


def coverage(model: nn.Module) -> Coverage:
    """The table of a model's trainable parameters: what captures each exactly and at which cost, or why nothing does.

    Args:
        model: any module. Only small probes of single layers are run.

    Returns:
        One row for each entry of ``model.named_parameters()`` that requires a gradient. ``print`` it.
    """
    return table(Structure(model))


def refused(structure: Structure) -> Sequence[Covered]:
    """The rows of the parameters that are not captured."""
    return structure.once("refused", lambda: [row for row in table(structure) if not row.exact])


def table(structure: Structure) -> Coverage:
    """The coverage of a model's parameters that require a gradient."""
    found, parameters = owners(structure), structure.parameters
    rules: dict[str, list[str]] = {}
    again: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for owner in found:
        for local, name in owner.parameters.items():
            if isinstance(owner.rule, str):
                where = ".".join(filter(None, (owner.name, local)))
                reasons.setdefault(name, f"{owner.rule} ({where})")
            elif isinstance(owner.rule, LayerRule):
                rules.setdefault(name, []).append(owner.rule.name)
            else:
                rules.setdefault(name, []).append("fallback")
                again.setdefault(name, []).append(type(owner.module).__name__)
    for name, parameter in parameters.items():
        if has_hooks(parameter):
            reasons.setdefault(name, "a hook on the parameter changes or reads its gradient, which capture bypasses")
    return Coverage(
        tuple(
            Covered(
                name=name,
                shape=tuple(parameter.shape),
                rule=None if name in reasons else " + ".join(dict.fromkeys(rules.get(name, []))) or None,
                reason=reasons.get(name, "" if name in rules else "no module owns it"),
                again=tuple(dict.fromkeys(again.get(name, []))),
            )
            for name, parameter in parameters.items()
            if parameter.requires_grad
        )
    )


def _repeated(rows: Sequence[Covered]) -> Iterator[list[Covered]]:
    """Groups of rows that differ only in the numbers in their names, in the order of their first rows."""
    together: dict[object, list[Covered]] = {}
    for row in rows:
        alike = replace(row, name=_NUMBER.sub("*", row.name), reason=_NUMBER.sub("*", row.reason))
        together.setdefault(alike, []).append(row)
    yield from together.values()


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A number between dots: the place of a block in its stack."""


def _names(rows: Sequence[Covered]) -> str:
    """One name for a group of rows, such as ``layers.{0-3}.weight``."""
    numbers = [list(map(int, _NUMBER.findall(row.name))) for row in rows]
    ranges = iter([_ranges(column) for column in zip(*numbers, strict=True)])
    return _NUMBER.sub(lambda match: next(ranges), rows[0].name)


def _ranges(numbers: Sequence[int]) -> str:
    distinct = sorted(set(numbers))
    if len(distinct) == 1:
        return str(distinct[0])
    runs = [[number for _, number in run] for _, run in groupby(enumerate(distinct), lambda pair: pair[1] - pair[0])]
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"


def _count(number: int) -> str:
    """A count in words: three digits and a letter for thousands, millions or billions."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
