"""The order of the rooms, on the code and in its table: imports point downwards, and each room says what it is."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ftw_optim"
FLOORS = [
    {"score"},
    {"integrations"},
    {"testing", "report"},
    {"_step"},
    {"_ranks"},
    {"_capture", "_gram"},
    {"_preconditioners"},
    {"_layers", "selection_log", "proposals"},
    {"_matching", "_factors"},
    {"_private_names"},
]
"""From the top: a room may import those of lower floors alone; the package's own names are above them all."""
INSIDE = {"integrations": ["integrations", "streaming", "_trainers"], "_capture": ["_capture", "replay"]}
"""From the top: a room of several parts, itself before its folders; a part may import itself and later ones."""
REGISTRARS = {"register_layer", "recognise", "register_preconditioner"}
"""Functions of a registry that a file of rules imports."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
LATE: dict[tuple[str, str], str] = {}
"""Imports inside of functions, by module and what it imports, each with its reason."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Full names of the modules of which some come from this package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, f"{name} imports relatively, line {node.lineno}"
    assert node.module is not None
    for alias in node.names:
        inside = f"{node.module}.{alias.name}"
        yield inside if inside in MODULES else node.module


def imports(name: str) -> set[str]:
    """What a module imports of the package, wherever it stands."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {other for other in imported(name, node) if other.split(".")[0] == "ftw_optim"}
    assert found <= MODULES.keys(), f"{name} imports what is not there"
    return found


def room(name: str) -> str:
    """The folder or module at the top of the package; of the package itself, nothing."""
    return name.split(".")[1] if "." in name else ""


def part(name: str) -> str:
    """The part of its room that a module is in, by :data:`INSIDE`."""
    folder = [*name.split("."), ""][2]
    return folder if folder in INSIDE.get(room(name), []) else room(name)


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} - {""} == FLOOR.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR)


def test_imports_point_downwards_or_stay_in_their_room() -> None:
    for name in MODULES.keys() - {"ftw_optim"}:
        for other in imports(name):
            assert room(other), f"{name} imports the package's own names, which import all of it"
            if room(other) != room(name):
                below = FLOOR[room(other)] > FLOOR[room(name)]
            else:
                parts = INSIDE.get(room(name), [room(name)])
                below = parts.index(part(other)) >= parts.index(part(name))
            assert below, f"{name} imports {other}, which is not below it"


def test_the_table_of_rooms_has_this_order() -> None:
    section = (PACKAGE / "README.md").read_text(encoding="utf-8").partition("## The rooms")[2].partition("\n## ")[0]
    table = [(int(floor), path.rstrip("/")) for floor, path in re.findall(r"^\| (\d+) \| `(\S+)` \|", section, re.M)]
    assert table == sorted(table, key=lambda row: row[0]), "the table begins with the top floor"
    expected = []
    for name, floor in FLOOR.items():
        module = name if (PACKAGE / name).is_dir() else f"{name}.py"
        expected += [(floor, module), *((floor, f"{name}/{folder}") for folder in INSIDE.get(name, [])[1:])]
    assert sorted(table) == sorted(expected)
    for name, parts in INSIDE.items():
        assert [path for _, path in table if path.split("/")[0] == name] == [name, *(f"{name}/{p}" for p in parts[1:])]


def test_every_file_of_rules_is_imported_by_its_room() -> None:
    """Where it is not, its rules are never registered."""
    files = set()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & REGISTRARS:
                files.add(name)
    files -= {"ftw_optim"}  # which imports them for users
    assert files
    for name in files:
        folder = name.rpartition(".")[0]
        assert name in imports(folder), f"{name} registers rules; name it in {folder.replace('.', '/')}/__init__.py"


def test_no_modules_import_each_other() -> None:
    """A cycle is an error, and shown."""
    assert list(TopologicalSorter({name: imports(name) - {name} for name in MODULES}).static_order())


def test_nothing_is_imported_inside_of_a_function_without_a_reason() -> None:
    found = set()
    for name, tree in MODULES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        found |= {(name, other) for other in imported(name, node)}
    assert found == LATE.keys()
    assert all(LATE.values())


def test_every_folder_is_a_room_with_a_docstring() -> None:
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert name_of(folder / "__init__.py") in MODULES, f"{folder} has no __init__.py"
    for name, tree in MODULES.items():
        assert ast.get_docstring(tree), f"{name} does not say what it is"


def test_the_top_of_the_package_fits_on_a_page() -> None:
    assert len({room(name) for name in MODULES}) <= 16  # with __init__.py, whose room has no name


def test_files_of_tests_are_short_and_named_apart() -> None:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    for path in paths:
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 500, f"{path} has {lines} lines"
    names = Counter(path.name for path in paths if path.name.startswith("test_"))
    assert max(names.values()) == 1, names.most_common(3)


def test_no_test_imports_another() -> None:
    """What several use is in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                assert (node.module or "").startswith("tests.support."), f"{path} imports {node.module}"
