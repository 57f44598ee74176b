"""The list of private names of other packages: it is that of the code, and tells who has moved one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from ftw_optim._private_names import ALL, TORCH, PrivateNames, check_private_names

ROOT = Path(__file__).parents[2]
LIST = ROOT / "ftw_optim" / "_private_names.py"
TREES = [
    ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "ftw_optim").rglob("*.py")) if path != LIST
]
PRIVATE = re.compile(r"_[a-z]\w*")


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines: functions, classes, variables, attributes that it sets, its own file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


OWN = {
    *(name for tree in TREES for name in defined(tree)),
    *(part for path in (ROOT / "ftw_optim").rglob("*.py") for part in (*path.parts, path.stem)),
    "_known_to_all_ranks",  # which setattr gives to errors
}


def used(tree: ast.AST) -> Iterator[str]:
    """The private names that a module reads: as attributes, as strings for ``getattr``, or by importing them."""
    formatted = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in formatted:
            yield node.value
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("ftw_optim"):
            names = [alias.name for alias in node.names]
            yield from names
            yield from (node.module or "").split(".")


def listed(of: PrivateNames) -> set[str]:
    places = {part for place in of.names for part in place.split(".")}
    return {name for names in of.names.values() for name in names} | set(of.sought) | places


def foreign(tree: ast.AST) -> set[str]:
    return {name for name in used(tree) if PRIVATE.fullmatch(name)} - OWN


def test_every_private_name_of_another_package_is_in_the_list() -> None:
    found = {name for tree in TREES for name in foreign(tree)}
    assert "_get_sequence_nr" in found
    unlisted = found - {name for of in ALL for name in listed(of)}
    assert not unlisted, f"add {sorted(unlisted)} to {LIST.name}, and look them up in the oldest and newest releases"


def test_a_new_private_access_would_be_seen() -> None:
    tree = ast.parse("from torch._inductor import x\ngetattr(node, '_seen_by_name')\ntrainer._never_heard_of")
    assert foreign(tree) == {"_inductor", "_seen_by_name", "_never_heard_of"}


def test_every_name_in_the_list_is_read() -> None:
    read = {name for tree in TREES for name in used(tree)}
    for of in ALL:
        names = {name for names in of.names.values() for name in names} | set(of.sought)
        assert not names - read, f"{of.package}: nothing reads {sorted(names - read)}"


def test_a_name_that_has_moved_is_told_with_the_release_and_those_that_were_checked() -> None:
    moved = PrivateNames(
        package="torch",
        oldest="2.8.0",
        newest="2.9.0",
        names={"torch.nn.Module": ("_modules", "_gone"), "torch.nn.Vanished": ("_at_all",)},
    )
    with pytest.raises(ImportError) as caught:
        check_private_names(moved)
    text = str(caught.value)
    assert "names torch.nn.Module._gone, torch.nn.Vanished, which" in text
    assert f"torch {torch.__version__} has none" in text
    assert "checked in torch 2.8.0 to 2.9.0" in text


def test_attributes_that_instances_get_are_found_in_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Optimizer.__init__`` sets its hooks; a class whose methods do not set them has none."""
    names = {"torch.optim.Optimizer": ("_optimizer_step_pre_hooks",)}
    kept = PrivateNames(package="torch", oldest="2.8", newest="2.9", names=names)
    check_private_names(kept)
    monkeypatch.setattr(torch.optim, "Optimizer", type("Optimizer", (), {"step": lambda self: None}))
    with pytest.raises(ImportError, match=r"Optimizer\._optimizer_step_pre_hooks"):
        check_private_names(kept)


def test_the_installed_torch_has_them_all() -> None:
    check_private_names(TORCH)


@pytest.mark.parametrize("of", ALL, ids=lambda of: of.package)
def test_the_releases_are_those_that_the_package_declares(of: PrivateNames) -> None:
    """The lower bound of ``pyproject.toml`` is the oldest; the release that the README installs lies between.

    The benchmarks ask for newer ones.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.findall(rf'"{of.package}>=([\d.]+)[",<]', project)
    assert bounds
    assert min(map(Version, bounds)) == Version(of.oldest)
    (pin,) = re.findall(rf"^{of.package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert Version(of.oldest) <= Version(pin) <= Version(of.newest)


@pytest.mark.parametrize("of", ALL, ids=lambda of: of.package)
def test_the_releases_are_those_of_the_kept_results(of: PrivateNames) -> None:
    """Of ``tests/matrix.py``: its rows "oldest" and "newest"."""
    lines = (ROOT / "tests" / "matrix_results.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    column = cells[0].index(of.package)
    found = {row[0]: row[column] for row in cells[2:] if len(row) == len(cells[0])}
    assert Version(found["oldest"]).public == of.oldest
    assert Version(found["newest"]).public == of.newest
