"""A folder of results: a file for each run, so that a killed comparison goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .runs import Run


class Store:
    """The results of one setting.

    Args:
        directory: made where it is missing.
        setting: all that results depend on beside what names a run.

    Raises:
        ValueError: the directory has results of another setting.
    """

    def __init__(self, directory: Path, setting: Mapping[str, Any]) -> None:
        self.directory = directory
        (directory / "runs").mkdir(parents=True, exist_ok=True)
        # As it comes back from a file: tuples become lists.
        wanted = json.loads(json.dumps(setting))
        before = self.once("setting", lambda: wanted)
        differing = [key for key in {*wanted, *before} if wanted.get(key) != before.get(key)]
        if differing:
            listed = ", ".join(f"{key}: {before.get(key)!r}, now {wanted.get(key)!r}" for key in sorted(differing))
            raise ValueError(f"{directory} has results of another setting ({listed}). Give another --out.")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What a file holds; made and written where it is missing."""
        path = self.directory / f"{name}.json"
        if not path.exists():
            write(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def has(self, run: Run) -> bool:
        """Whether the run is done."""
        return self._path(run).exists()

    def save(self, run: Run) -> None:
        """Write a run that is done."""
        write(self._path(run), asdict(run))

    def load(self, run: Run) -> Run:
        """The run of this name, as it was saved."""
        return Run(**json.loads(self._path(run).read_text(encoding="utf-8")))

    def _path(self, run: Run) -> Path:
        return self.directory / "runs" / f"{run.name.replace(':', '_')}.json"


def write(path: Path, content: Any) -> None:
    """Write a JSON file at once: it is there in full, or as it was before."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(_rounded(content)) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _rounded(value: Any) -> Any:
    """The content with numbers of six digits, which is what they are good for."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
