"""The wheel holds all of the package, and every module in it can be imported where there is no checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = {"accelerate", "datasets", "lightning", "pyarrow", "tqdm", "transformers", "trl"}
IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import ftw_optim

def stop(name):
    raise

modules, missing = {"ftw_optim": ftw_optim.__file__}, []
for module in pkgutil.walk_packages(ftw_optim.__path__, "ftw_optim.", onerror=stop):
    modules[module.name] = module.module_finder.find_spec(module.name).origin
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing.append(error.name)
print(json.dumps([modules, missing]))
"""


def sources() -> set[str]:
    """The files of the package but its documents, which are for readers of the repository."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ftw_optim").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }


def isolation() -> list[str]:
    """None where a setuptools that can build is at hand: it takes nothing from the network."""
    try:
        return ["--no-build-isolation"] if int(version("setuptools").split(".")[0]) >= 77 else []
    except PackageNotFoundError:
        return []


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout, in which nothing of an earlier build lies, unpacked."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "ftw_optim", copy / "ftw_optim", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation(), "-w", str(out), str(copy)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = out.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_the_wheel_holds_every_file_of_the_package(unpacked: Path) -> None:
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == sources()
    assert {"ftw_optim/py.typed", "ftw_optim/report/_style.css"} <= found


@pytest.mark.slow
def test_every_module_can_be_imported_from_the_wheel(unpacked: Path) -> None:
    """A folder without an ``__init__.py`` would be a namespace, which is found in the checkout alone."""
    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(unpacked)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    modules, missing = json.loads(ran.stdout.splitlines()[-1])
    assert set(missing) <= EXTRAS
    found = {Path(path).relative_to(unpacked).as_posix() for path in modules.values()}
    assert found == {name for name in sources() if name.endswith(".py")}
