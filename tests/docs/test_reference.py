"""The API reference: every public module and name has its place, and it is built without a warning."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # of Python 3.11 and newer

ROOT = Path(__file__).parents[2]
PAGES = ROOT / ".docs"
COMMAND = ["-W", "-q", "-b", "html", ".docs"]
MODULES = sorted(
    {"ftw_optim", "ftw_optim.testing"}
    | {f"ftw_optim.{room}" for room in ("proposals", "report", "score", "selection_log", "integrations")}
    | {
        f"ftw_optim.integrations.{path.stem}"
        for path in (ROOT / "ftw_optim" / "integrations").iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or path.is_dir())
    }
)


def public_names(module: str) -> set[str]:
    """What a module offers: its ``__all__``, else what it defines, or a package imports of its own modules."""
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return set(found.__all__)
    facade = hasattr(found, "__path__")
    return {
        name
        for name, value in vars(found).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (value.__module__.startswith(f"{module}.") if facade else value.__module__ == module)
    }


def test_every_public_module_has_its_place() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES.glob("*.rst"))
    assert sorted(re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)) == MODULES
    listed = re.findall(r"^   (\w+)$", (PAGES / "index.rst").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in PAGES.glob("*.rst") if path.stem != "index")


def test_the_extra_and_its_pins_are_what_the_settings_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {re.split(r"[><=~ ]", requirement)[0] for requirement in extras["docs"]}
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert names == {"furo", "sphinx"}
    assert names <= pins


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx") is None, reason="needs the extra docs")
def test_the_reference_is_built_without_warnings_and_holds_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", *COMMAND, "-d", str(tmp_path / "read"), str(tmp_path / "pages")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    places = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "pages").glob("*.html"))
    for module in MODULES:
        names = public_names(module)
        assert names or module in ("ftw_optim.integrations", "ftw_optim.score")  # whose modules these are; a command
        assert not [name for name in names if f'id="{module}.{name}"' not in places]
