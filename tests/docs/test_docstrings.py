"""A docstring can be read without the code around it: its first line says what it is about."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ftw_optim"
FILES = sorted(PACKAGE.rglob("*.py"))

PREPOSITIONS = {"At", "Behind", "By", "For", "From", "In", "Of", "On", "Over", "To", "With", "Within", "Without"}
NO_SUBJECT = PREPOSITIONS | {"As", "Equal", "Likewise", "Only", "That", "These", "Those", "Whose"}
"""Words that begin neither a noun phrase with its noun nor a verb that stands alone."""


def _first_lines(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of the first line of each docstring, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for statement in body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield statement.lineno, value.value.strip().partition("\n")[0]


def _without_subject(source: str) -> list[tuple[int, str]]:
    return [
        (line, text) for line, text in _first_lines(source) if text.split(maxsplit=1)[0].strip(",.:;") in NO_SUBJECT
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_first_lines_have_a_subject(path: Path) -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {text}"
        for line, text in _without_subject(path.read_text(encoding="utf-8"))
    ]
    assert not found, "Expected docstrings whose first line begins with a noun phrase or a verb:\n" + "\n".join(found)


def test_the_check_finds_docstrings_without_a_subject() -> None:
    source = '"""Sums."""\nn = 1\n"""Of them."""\ndef f():\n    """That: one."""\nclass C:\n    """To compute in."""\n'
    assert _without_subject(source) == [(3, "Of them."), (5, "That: one."), (7, "To compute in.")]
