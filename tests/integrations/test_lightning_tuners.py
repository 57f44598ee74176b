"""Lightning's finders of a learning rate and a batch size, and several fits: with selection as without."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ftw_optim import GreedyFilter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from ftw_optim.integrations.lightning import SelectiveModuleMixin
from tests.support.grids import slow
from tests.support.lightning_runs import EVERYONE, QUIET, trainer_of

pytestmark = QUIET

X = torch.randn(28, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(28) % 3
SAME = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Base(LightningModule):
    """With the attributes that the finders set."""

    def __init__(self, lr: float = 0.1, batch_size: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.lr, self.batch_size = lr, batch_size
        self.most = len(X)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def losses_of(self, batch: Any) -> Tensor:
        if len(batch[0]) > self.most:
            raise RuntimeError("CUDA out of memory.")
        return functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), batch_size=self.batch_size)


class Plain(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses_of(batch).mean()


class Everyone(SelectiveModuleMixin, Base):
    def candidate_losses(self, batch: Any) -> Tensor:
        return self.losses_of(batch)

    def target_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X[:6], Y[:6]), batch_size=2, shuffle=True)

    def configure_selection(self) -> dict[str, Any]:
        return dict(EVERYONE)


class Greedy(Everyone):
    """Its selections depend on which target batch it is, on the moments, and on how many steps there were."""

    def configure_selection(self) -> dict[str, Any]:
        return {"filter": GreedyFilter(keep=2), "decay": 0.5}


def parameters(module: LightningModule) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A folder for the checkpoints that finders restore."""
    return {"default_root_dir": tmp_path, "max_epochs": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "select_from"), [(1, "window"), (3, "batch"), (3, "window")])
@pytest.mark.parametrize("stop", [None, 4.0])
def test_the_learning_rate_finder_finds_what_it_finds_without(
    options: dict[str, Any], stop: float | None, steps: int, select_from: str
) -> None:
    """The same losses; those of a window that is selected from as one are the window's, not the last batch's."""
    results = []
    for kind in (Plain, Everyone):
        module: Any = kind()
        module.select_from = select_from
        before = parameters(module)
        trainer = trainer_of(**options, accumulate_grad_batches=steps)
        finder = Tuner(trainer).lr_find(module, num_training=18, max_lr=10.0, early_stop_threshold=stop)
        assert finder is not None
        torch.testing.assert_close(parameters(module), before, **SAME)
        results.append((finder.results["lr"], finder.results["loss"], module.lr))
    assert len(results[0][0]) >= 8
    if select_from == "batch" or steps == 1:
        torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)
    else:
        assert stop is not None or results[1][0] == results[0][0]
        assert all(one > 0 for one in results[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [slow(Everyone), Greedy])
@pytest.mark.parametrize("steps", [1, slow(3)])
@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_a_fit_after_the_learning_rate_finder_is_the_fit_without_it(
    options: dict[str, Any], how: str, steps: int, kind: type[Everyone]
) -> None:
    """At the rate that was found: moments, target batches, windows and counts are as before; to the last bit."""
    options["max_epochs"] = 10 if steps == 3 else 3
    module = kind()
    module.accumulate_grad_batches = steps
    if how == "tuner":
        trainer = trainer_of(**options)
        Tuner(trainer).lr_find(module, num_training=steps * 6 + 8)
    else:
        trainer = trainer_of(LearningRateFinder(num_training_steps=steps * 6 + 8), **options)
    trainer.fit(module)
    assert module.lr != 0.1
    without = kind(lr=module.lr)
    again = trainer_of(**options, accumulate_grad_batches=steps)
    again.fit(without)
    assert trainer.global_step == again.global_step
    torch.testing.assert_close(parameters(module), parameters(without), **SAME)
    assert (
        trainer.optimizers[0].state_dict()["selective"].keys() == again.optimizers[0].state_dict()["selective"].keys()
    )


class Later(LearningRateFinder):
    """Runs in the midst of a fit, as Lightning's documentation shows; its rate is not taken."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.slow
def test_a_finder_in_the_midst_of_a_fit_leaves_the_targets_where_they_were(options: dict[str, Any]) -> None:
    found = []
    for callbacks in ([Later(num_training_steps=11, update_attr=False)], []):
        module = Greedy()
        positions = []
        module.on_train_batch_start = lambda *_, m=module, p=positions: p.append(m._selecting.state_dict()["targets"])
        trainer = trainer_of(*callbacks, **options)
        trainer.fit(module)
        found.append((positions[-14:], parameters(module)))
    torch.testing.assert_close(found[0], found[1], **SAME)


@pytest.mark.parametrize(
    ("how", "most", "mode"),
    [slow("tuner", 9, "power"), slow("callback", 9, "binsearch"), slow("callback", 28, "power")],
)
def test_the_batch_size_finder_finds_what_it_finds_without(
    options: dict[str, Any], how: str, most: int, mode: str
) -> None:
    """Also where memory ends; a fit after it is the fit with that size."""
    sizes = []
    for kind in (Plain, Greedy):
        module: Any = kind()
        module.most = most
        before = parameters(module)
        if how == "tuner":
            trainer = trainer_of(**options)
            Tuner(trainer).scale_batch_size(module, mode=mode, max_trials=4, steps_per_trial=2)
            torch.testing.assert_close(parameters(module), before, **SAME)
        else:
            trainer = trainer_of(BatchSizeFinder(mode=mode, max_trials=4, steps_per_trial=2), **options)
        trainer.fit(module)
        sizes.append(module.batch_size)
    assert sizes[0] == sizes[1] <= most
    without = Greedy(batch_size=module.batch_size)
    trainer_of(**options).fit(without)
    torch.testing.assert_close(parameters(module), parameters(without), **SAME)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")  # Lightning restores without them
def test_a_finder_that_fails_says_why_and_leaves_a_module_that_can_be_fitted(options: dict[str, Any]) -> None:
    module = Greedy()
    module.most = 3
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        Tuner(trainer_of(**options)).lr_find(module, num_training=18)
    module.most = 28
    trainer_of(**options).fit(module)
    without = Greedy()
    trainer_of(**options).fit(without)
    torch.testing.assert_close(parameters(module), parameters(without), **SAME)


@pytest.mark.slow
@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_module_can_be_fitted_again(options: dict[str, Any], same_trainer: bool) -> None:
    """As without selection, with a new optimizer; by the same trainer or another."""
    found = []
    for kind in (Plain, Everyone):
        module = kind()
        trainer = trainer_of(**options)
        trainer.fit(module)
        if same_trainer:
            trainer.fit_loop.max_epochs = 6
        else:
            trainer = trainer_of(**options)
        trainer.fit(module)
        found.append((trainer.global_step, parameters(module)))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_module_without_selection_can_be_fitted_by_the_same_trainer_afterwards(options: dict[str, Any]) -> None:
    found = []
    for kind in (Plain, Everyone):
        trainer = trainer_of(**options)
        trainer.fit(kind())
        trainer.fit_loop.max_epochs = 6
        module = Plain()
        trainer.fit(module)
        found.append((trainer.global_step, parameters(module)))
    torch.testing.assert_close(found[1], found[0], **SAME)
