"""Real text that every machine has: the docstrings of the Python installation, as signature -> docstring.

The sources of the standard library and of torch are read with ``ast``; none of them is imported. Left out are
private top-level packages and test suites. Near-copies are removed: no two kept records share a stretch of 40
characters, whatever the case and the spacing, so no test record is known from a record of the pool.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Record = dict[str, str]

TARGET_AREA = "torch.distributed"
WINDOW = 40
SHORTEST_DOCSTRING = 20
_SKIPPED_PARTS = {"site-packages", "dist-packages", "test", "tests", "testing", "lib2to3"}


class Corpus(NamedTuple):
    """Disjoint splits: ``target`` and ``test`` from one area, a pool that hides the rest of it."""

    pool: list[Record]
    target: list[Record]
    test: list[Record]


def build_corpus(target_size: int, test_size: int, *, area: str = TARGET_AREA) -> Corpus:
    """The splits for one area of the installation, always the same ones on the same installation.

    Raises:
        ValueError: the area has fewer records than the two splits need.
    """
    records = without_near_copies(installation_records())
    # Which record goes where belongs to the data, not to a run: its seed is fixed.
    random.Random(0).shuffle(records)
    inside = [record for record in records if record["source"] == area]
    if len(inside) < target_size + test_size:
        raise ValueError(f"{area!r} has {len(inside)} records, but target and test need {target_size} + {test_size}.")
    target, test = inside[:target_size], inside[target_size : target_size + test_size]
    held_out = {id(record) for record in target + test}
    return Corpus([record for record in records if id(record) not in held_out], target, test)


def installation_records() -> list[Record]:
    """The documented classes and functions of the standard library and of torch, in file order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    torch_spec = importlib.util.find_spec("torch")  # finds the files of the package without running them
    assert torch_spec is not None
    assert torch_spec.origin is not None
    return [*read_tree(stdlib), *read_tree(Path(torch_spec.origin).parent, package="torch")]


def read_tree(root: Path, *, package: str = "") -> Iterator[Record]:
    """Records of all Python files below ``root``; the source is the top folder or module."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        top = parts[0]
        if top.startswith("_") or _SKIPPED_PARTS.intersection(parts):
            continue
        source = f"{package}.{top}" if package else top
        try:
            with warnings.catch_warnings(action="ignore"):  # unknown escapes in somebody else's strings
                tree = ast.parse(path.read_bytes())
        except SyntaxError:  # written for another Python version, or a template
            continue
        yield from documented(tree, source)


def documented(tree: ast.AST, source: str) -> Iterator[Record]:
    """One record for each class and function with a docstring; those inside functions are not visited."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= SHORTEST_DOCSTRING:
                yield {"source": source, "prompt": _signature(node), "response": docstring.strip()}
        if isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With):
            yield from documented(node, source)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}:"


def without_near_copies(records: Iterable[Record]) -> list[Record]:
    """The records, in order, that share no window with one kept before."""
    seen: set[str] = set()
    kept = []
    for record in records:
        found = windows(f"{record['prompt']} {record['response']}")
        if seen.isdisjoint(found):
            seen |= found
            kept.append(record)
    return kept


def windows(text: str) -> set[str]:
    """Every stretch of ``WINDOW`` characters, in lower case, with single spaces; a shorter text is one."""
    flat = " ".join(text.lower().split())
    return {flat[start : start + WINDOW] for start in range(max(1, len(flat) - WINDOW + 1))}
