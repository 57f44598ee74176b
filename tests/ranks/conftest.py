"""Processes that wait for jobs, started when the first test wants them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes import Processes, running


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with running(2, tmp_path_factory.mktemp("two")) as processes:
        yield processes


@pytest.fixture(scope="session")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with running(4, tmp_path_factory.mktemp("four")) as processes:
        yield processes
