"""Modules, data and trainers of Lightning that its tests share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from ftw_optim import KeepAll, UniformWeights, token_losses
from tests.support.models import Case, precision, transformers_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import Callback, LightningModule, Trainer

from ftw_optim.integrations.lightning import SelectiveModuleMixin

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
QUIET = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # by Lightning
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`"),
]
"""Marks of each module of tests: what Lightning says on the way."""


CASES: dict[str, Callable[[], Case]] = {
    "llama": lambda: transformers_model("llama")(torch.float64, 14),
    "gpt2 with lora": lambda: transformers_model("gpt2", lora=True)(torch.float64, 14),
}
EVERYONE = {"filter": KeepAll(), "weight": UniformWeights()}


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with precision(next(model.parameters()).dtype):
        return token_losses(model, batch)


def rows_of(batch: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


class Loader:
    """Two candidates a batch in an order that the epoch tells; it can be saved, and go on from there."""

    def __init__(self, case: Case) -> None:
        self.case, self.epoch, self.next = case, 0, 0

    def __len__(self) -> int:
        return self.case.n // 2

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.next == len(self):
            self.epoch, self.next = self.epoch + 1, 0
        order = torch.randperm(self.case.n, generator=torch.Generator().manual_seed(self.epoch)).view(-1, 2)
        while self.next < len(self):
            self.next += 1
            yield rows_of(self.case.candidates, order[self.next - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.next = state["epoch"], state["next"]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: optimizer,
    "every step": lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, lambda step: 1.0 / (1 + step)), "interval": "step"},
    },
    "some steps": lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": StepLR(optimizer, 1, gamma=0.7), "interval": "step", "frequency": 2},
    },
    "every epoch": lambda optimizer: ([optimizer], [StepLR(optimizer, 1, gamma=0.3)]),
}


class Base(LightningModule):
    """What a user has: a model, decay groups, a schedule."""

    def __init__(self, case: Case, schedule: str = "none") -> None:
        super().__init__()
        self.model, self.case, self.schedule = case.model, case, schedule

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01)
        return SCHEDULES[self.schedule](optimizer)


class Plain(Base):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return losses_of(self.model, batch).mean()


class Selective(SelectiveModuleMixin, Base):
    options: dict[str, Any] = {}  # noqa: RUF012

    def candidate_losses(self, batch: dict[str, Tensor]) -> Tensor:
        return losses_of(self.model, batch)

    def target_dataloader(self) -> Any:
        return [rows_of(self.case.target, slice(row, row + 1)) for row in range(3)]

    def configure_selection(self) -> dict[str, Any]:
        return dict(self.options)


class Log(Callback):
    """The learning rate and the parameters after each optimizer step, and what is seen just before."""

    def __init__(self, *, look: Callable[[Any], Any] = lambda module: None) -> None:
        self.steps: list[Any] = []
        self.seen: list[Any] = []
        self.look = look

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(self.look(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.steps.append([rate, [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]])


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "enable_checkpointing": False, "devices": 1, **quiet, **options}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **options)


def selective_of(case: Case, schedule: str = "none", **attributes: Any) -> Selective:
    module = Selective(case, schedule)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module
