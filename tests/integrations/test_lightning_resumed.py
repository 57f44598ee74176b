"""Modules of Lightning, killed and resumed: to the last bit."""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ftw_optim import GreedyFilter, Selection

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, Trainer

from ftw_optim.integrations._trainers.targets import CycledBatches
from tests.support.grids import slow
from tests.support.lightning_runs import CASES, QUIET, Loader, Log, Plain, Selective, rows_of, trainer_of

pytestmark = QUIET


class Killed(Exception):
    """By the scheduler of a cluster, say."""


class SavedThenKilled(Callback):
    """Saves after some batch, and dies in the midst of the next one."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.left = path, batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.left == 0:
            raise Killed


class Chosen(Selective):
    """Remembers every selection."""

    accumulate_grad_batches = 2
    gradient_clip_val = 0.3

    def configure_selection(self) -> dict[str, Any]:
        self.chosen: list[Any] = []
        return {"filter": GreedyFilter(keep=2), **self.options}

    def target_dataloader(self) -> Any:
        """Shuffled by the global generator."""
        rows = [rows_of(self.case.target, row) for row in range(3)]
        return DataLoader(rows, batch_size=2, shuffle=True)

    def log_selection(self, selection: Selection, loss: Tensor) -> None:
        super().log_selection(selection, loss)
        self.chosen.append([selection.kept, selection.weights, selection.losses, selection.gram, selection.cosine])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("select_from", "batch", "options"),
    [
        slow("window", 4, {}),
        ("window", 5, {}),  # one batch waits for its window
        slow("window", 7, {}),  # at the end of the epoch
        ("window", 10, {"refresh_every": 3}),
        ("batch", 4, {"decay": 0.5}),
    ],
)
def test_a_run_killed_and_resumed_is_the_uninterrupted_one(
    tmp_path: Path, select_from: str, batch: int, options: dict[str, Any]
) -> None:
    """To the last bit: weights, selections, learning rates, target batches; also from the midst of a window."""

    def start() -> Chosen:
        module = Chosen(CASES["llama"](), "every step")
        module.select_from, module.options = select_from, options
        return module

    log, module = Log(), start()
    trainer_of(log).fit(module, Loader(module.case))

    killed = start()
    path = tmp_path / "run.ckpt"
    with pytest.raises(Killed):
        trainer_of(SavedThenKilled(path, batch)).fit(killed, Loader(killed.case))
    torch.manual_seed(batch)  # another process has another
    resumed, rest = start(), Log()
    trainer = trainer_of(rest)
    trainer.fit(resumed, Loader(resumed.case), ckpt_path=path)
    assert trainer.global_step == 8
    assert 0 < len(resumed.chosen) < len(module.chosen)
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed.chosen, module.chosen[-len(resumed.chosen) :], **same)
    torch.testing.assert_close(list(resumed.parameters()), list(module.parameters()), **same)
    assert len(module.chosen) == len(resumed.chosen) + (batch if select_from == "batch" else (batch + batch // 7) // 2)


def test_a_checkpoint_of_the_bare_optimizer_is_loaded(tmp_path: Path) -> None:
    """Its moments and step count, from a run without selection."""
    case = CASES["llama"]()
    trainer = trainer_of(max_epochs=1)
    trainer.fit(Plain(case), Loader(case))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    module = Selective(CASES["llama"]())
    trainer = trainer_of()
    trainer.fit(module, Loader(module.case), ckpt_path=tmp_path / "plain.ckpt")
    assert trainer.global_step == 14
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {14}


def test_target_batches_go_round_and_round_and_can_be_found_again() -> None:
    """In orders of their own, which leave the global generator as it was."""
    loader = DataLoader(torch.arange(5), batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    batches = CycledBatches(loader, seed=1)
    seen, states = [], []
    for _ in range(9):
        states.append(batches.state_dict())
        seen.append(next(batches))
    assert torch.equal(state, torch.get_rng_state())
    orders = [torch.cat(seen[start : start + 3]).tolist() for start in (0, 3, 6)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert orders[0] != orders[1]
    for number, saved in enumerate(states):
        again = CycledBatches(loader, seed=1)
        again.load_state_dict(saved)
        torch.testing.assert_close(list(islice(again, 9 - number)), seen[number:])
    with pytest.raises(ValueError, match="Expected target batches, got none"):
        next(CycledBatches([]))
