"""Processes of one run, kept alive for many jobs: they are started once, and talk to each other over gloo."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist

PATIENCE = 90.0
"""Seconds that a job may take."""


class Failure(NamedTuple):
    """The error that a job ended with on one rank."""

    kind: str
    text: str
    trace: str


@final
class Processes:
    """Some processes of one ``torch.distributed`` run; a job is a function of a module, called on each of them.

    Args:
        count: their number.
        directory: where they find each other.
    """

    def __init__(self, count: int, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
        self.count = count
        self._ends: list[Connection] = []
        self._workers = []
        for rank in range(count):
            here, there = context.Pipe()
            arguments = (rank, count, str(directory / f"store{count}"), there, list(sys.path))
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            self._ends.append(here)
            self._workers.append(worker)

    def outcomes(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the job returned on each rank, or the :class:`Failure` it ended with."""
        for end in self._ends:
            end.send_bytes(pickle.dumps((job, arguments)))
        found = []
        for rank, end in enumerate(self._ends):
            if not end.poll(PATIENCE):
                self.close()
                raise AssertionError(f"Rank {rank} did not answer within {PATIENCE} seconds: it waits for another.")
            found.append(pickle.loads(end.recv_bytes()))
        return found

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the job returned on each rank; an error on any of them fails."""
        found = self.outcomes(job, *arguments)
        for rank, one in enumerate(found):
            assert not isinstance(one, Failure), f"Rank {rank} raised {one.kind}: {one.trace}"
        return found

    @property
    def alive(self) -> bool:
        """Whether all of them are."""
        return all(worker.is_alive() for worker in self._workers)

    def close(self) -> None:
        """End all of them."""
        for worker in self._workers:
            worker.kill()
            worker.join()


def _work(rank: int, count: int, store: str, end: Connection, path: list[str]) -> None:
    faulthandler.enable()  # where a process dies, what it was doing is the only trace of why
    sys.path[:] = path
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # What TRL sets by default and PEFT asks of a model, under names that Transformers has changed.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    # Layers that are sharded one by one return views of their outputs, which nothing here changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    # As torchrun tells, which frameworks ask; they find the group that is there.
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in own.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns where nobody has said so
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            job, arguments = pickle.loads(end.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            answer = job(*arguments)
        except Exception as error:
            answer = Failure(type(error).__name__, str(error), traceback.format_exc())
        end.send_bytes(pickle.dumps(answer))


@contextmanager
def running(count: int, directory: Path) -> Iterator[Processes]:
    """Processes that end with the block."""
    processes = Processes(count, directory)
    try:
        yield processes
    finally:
        processes.close()
