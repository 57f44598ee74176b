"""Target rows in the steps of Lightning and accelerate: the gradient that is applied, and what is logged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from ftw_optim import GreedyFilter, Selection, SelectiveOptimizer
from ftw_optim.integrations.accelerate import loss_scale
from tests.support.grids import slow
from tests.support.lightning_runs import CASES, QUIET, Loader, Selective, losses_of, rows_of, trainer_of
from tests.support.models import Case
from tests.support.oracles import candidate_gradients

pytestmark = QUIET

Batch = dict[str, Tensor]


def expected_of(selection: Selection, model: Any, batches: list[Batch], target: Batch, scale: float) -> Batch:
    """The weighted sum of gradients formed one row at a time, of candidates and target rows."""
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    found: Batch = {}
    gradients = [
        *candidate_gradients(Case(model, rows, rows, losses_of)),
        *candidate_gradients(Case(model, target, target, losses_of)),
    ]
    weights = torch.cat([selection.spread_weights(), selection.target_weights])
    assert float(weights.sum()) == pytest.approx(1.0)
    for weight, one in zip(weights.tolist(), gradients, strict=True):
        for name, gradient in one.items():
            found[name] = found.get(name, torch.zeros(())) + scale * weight * gradient
    return found


@pytest.mark.parametrize(
    ("trains", "select_from"),
    [("the target", "window"), slow("the target", "batch"), slow("others", "window"), ("others", "batch")],
)
def test_lightning_sees_the_gradient_of_candidates_and_target_rows(trains: str, select_from: str) -> None:
    case = CASES["gpt2 with lora"]()
    others = rows_of(case.target, slice(0, 3))
    expected: Batch = {}
    seen: list[Batch] = []
    compared = []

    class Checked(Selective):
        def target_dataloader(self) -> Any:
            return [rows_of(case.target, slice(row, row + 2)) for row in range(2)]

        def target_losses(self, batch: Batch) -> Tensor:
            seen.append(batch)
            return super().target_losses(batch)

        def configure_selection(self) -> dict[str, Any]:
            trained: Any = True if trains == "the target" else lambda: losses_of(self.model, others)
            return {"filter": GreedyFilter(keep=2), "train_on_target": trained}

        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                expected.clear()
                self.pool: list[Batch] = []
            self.pool.append(batch)

        def log_selection(self, selection: Selection, loss: Tensor) -> None:
            super().log_selection(selection, loss)
            batches = self.pool if select_from == "window" else self.pool[-1:]
            goals = seen[-1] if trains == "the target" else others
            for name, value in expected_of(selection, case.model, batches, goals, len(batches) / 2).items():
                expected[name] = expected.get(name, torch.zeros(())) + value

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for name, parameter in self.case.model.named_parameters():
                if parameter.requires_grad:
                    torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-8)
            compared.append(len(expected))

    module = Checked(case)
    module.accumulate_grad_batches, module.select_from = 2, select_from
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, Loader(case))
    assert len(compared) == 4
    assert {"selection/target_share", "selection/target_loss"} < trainer.logged_metrics.keys()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    GradientState._reset_state()  # a trainer that was killed leaves its data loader in it
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_clips_the_gradient_of_candidates_and_target_rows(accelerator: Accelerator) -> None:
    case = CASES["llama"]()
    oracle = copy.deepcopy(case.model)
    target = rows_of(case.target, slice(0, 3))
    selective = SelectiveOptimizer(
        torch.optim.AdamW(case.model.parameters(), lr=0.01),
        case.model,
        lambda: losses_of(model, target),
        filter=GreedyFilter(keep=2),
        train_on_target=True,
    )
    model, optimizer = accelerator.prepare(case.model, selective)
    for start in range(0, 8, 4):
        oracle.load_state_dict(case.model.state_dict())
        expected: Batch = {}
        for batch in (rows_of(case.candidates, slice(at, at + 2)) for at in (start, start + 2)):
            with accelerator.accumulate(model):
                selective.backward(lambda batch=batch: losses_of(model, batch), grad_scale=loss_scale(accelerator))
                assert selective.selection is not None
                for name, value in expected_of(selective.selection, oracle, [batch], target, 0.5).items():
                    expected[name] = expected.get(name, torch.zeros(())) + value
                if accelerator.sync_gradients:
                    for name, parameter in case.model.named_parameters():
                        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-8)
                    accelerator.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
