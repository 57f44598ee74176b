"""The wheel holds all of the package, and works where there is no checkout and no package but torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import PackageNotFoundError, distribution, metadata, version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = {"accelerate", "datasets", "lightning", "pyarrow", "tqdm", "transformers", "trl"}
IMPORT_ALL = """
import importlib, json, os, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import ftw_optim

def found(folder, prefix):  # without importing a package, which may need another
    for module in pkgutil.iter_modules([folder], prefix):
        yield module
        if module.ispkg:
            yield from found(os.path.join(folder, module.name.rpartition(".")[2]), f"{module.name}.")

modules, missing = {"ftw_optim": ftw_optim.__file__}, []
for module in found(os.path.dirname(ftw_optim.__file__), "ftw_optim."):
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


def checkout(directory: Path) -> Path:
    """A directory with a copy of what is packed, in which nothing of an earlier build lies."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / "ftw_optim", directory / "ftw_optim", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def needs(name: str) -> set[str]:
    """The installed distributions that one needs, itself among them."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        try:
            required = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        found.add(name)
        named = (one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""}))
        waiting += [other for other in named if other not in found]
    return found


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; it must succeed."""
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which pip would look at
    ran = subprocess.run(list(map(str, command)), cwd=cwd, env=here, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout, unpacked."""
    copy, out = checkout(tmp_path_factory.mktemp("copy")), tmp_path_factory.mktemp("wheel")
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


def test_torch_is_all_that_it_needs(unpacked: Path) -> None:
    (file,) = unpacked.glob("*.dist-info/METADATA")
    required = map(Requirement, re.findall(r"^Requires-Dist: (.*)$", file.read_text("utf-8"), re.MULTILINE))
    assert [one.name for one in required if one.marker is None or "extra" not in str(one.marker)] == ["torch"]


# ---------------------------------------------------------------------- what is published


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of a copy of the checkout, and the wheel that is made of the archive."""
    copy, out = checkout(tmp_path_factory.mktemp("copy")), tmp_path_factory.mktemp("dist")
    alone = ["--no-isolation"] if isolation() else []
    run(sys.executable, "-m", "build", *alone, "--outdir", out, copy)
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def torch_alone(published: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, torch, and what torch needs. Nothing is fetched: these are linked."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in needs("torch"):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(installed.locate_file(top))))
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", published[1])
    return python


@pytest.mark.slow
@pytest.mark.skipif(find_spec("build") is None or find_spec("twine") is None, reason="needs the extra release")
def test_what_is_published_passes_twine_and_holds_the_package(published: tuple[Path, Path]) -> None:
    archive, wheel = published
    assert run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", archive, wheel).count("PASSED") == 2
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert sources() | {"LICENSE", "README.md", "pyproject.toml"} <= names
    with ZipFile(wheel) as archived:
        assert sources() <= set(archived.namelist())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("build") is None, reason="needs the extra release")
def test_a_whole_run_needs_torch_alone(torch_alone: Path, tmp_path: Path) -> None:
    """The example of the README, every module that no framework is for, and the page of the demonstration."""
    installed = run(sys.executable, "-m", "pip", "--python", torch_alone, "list", "--format", "freeze")
    assert f"ftw-optim=={metadata('ftw-optim')['Version']}" in installed
    assert "transformers" not in installed
    (example, *_) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    assert "kept [" in run(torch_alone, "-I", "example.py", cwd=tmp_path)
    site = run(torch_alone, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    modules, missing = json.loads(run(torch_alone, "-I", "-c", IMPORT_ALL, site, cwd=tmp_path).splitlines()[-1])
    assert len(modules) == sum(name.endswith(".py") for name in sources())
    assert set(missing) <= EXTRAS
    assert "report.html" in run(torch_alone, "-I", "-m", "ftw_optim.report", "--demo", cwd=tmp_path)
