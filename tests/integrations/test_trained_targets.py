"""Trainers whose target examples take part in the steps: the gradient that is applied, and the loss that is logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import GreedyFilter
from ftw_optim.integrations.transformers import SelectiveTrainer, SelectiveTrainerMixin
from tests.support.grids import slow
from tests.support.trainer_runs import (
    Recording,
    arguments,
    examples,
    gradients_alone,
    model,
    numbered,
    trained,
)


@pytest.mark.parametrize("weighting", ["token_sum", slow("token_mean")])
@pytest.mark.parametrize("combine", ["auto", slow("graph"), slow("rerun")])
def test_the_applied_gradient_is_that_of_candidates_and_target_examples(
    combine: str, weighting: str, tmp_path: Path
) -> None:
    rows, targets = numbered(examples(12)), examples(5, seed=1)
    recording = Recording()
    trainer, watch = trained(
        SelectiveTrainer,
        model().double(),
        arguments(tmp_path, max_grad_norm=0.0, learning_rate=1e-3),
        rows=rows,
        target_dataset=targets,
        target_batch_size=3,
        selective={
            "filter": GreedyFilter(keep=3),
            "metric": "euclidean",
            "train_on_target": True,
            "combine": combine,
        },
        sample_weighting=weighting,
        selection_log=recording,
        sample_id_column="number",
    )
    assert isinstance(trainer, SelectiveTrainerMixin)
    net = model().double()
    parameters = dict(net.named_parameters())
    assert len(recording.steps) > 1
    for number, (step, seen) in enumerate(zip(recording.steps, watch.gradients, strict=True)):
        if number:
            for name, value in watch.parameters[number - 1].items():
                parameters[name].data.copy_(value)
        selection = step["selection"]
        batch = trainer.target_batches.at(step["step"] - 1)
        goals = [_row_of(ids, mask, targets) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]  # noqa: B905
        losses, found = gradients_alone(net, goals, weighting)
        torch.testing.assert_close(selection.target_losses.to(losses), losses, rtol=2e-6, atol=2e-6)
        _, candidates = gradients_alone(net, [rows[name] for name in step["ids"]], weighting)
        weights = torch.cat([selection.spread_weights(), selection.target_weights]).tolist()
        assert sum(weights) == pytest.approx(1.0)
        for name in found[0]:
            parts = [weight * one[name] for weight, one in zip(weights, [*candidates, *found], strict=True)]
            expected = torch.stack(parts).sum(0)
            size = max(float(one[name].norm()) for one in [*candidates, *found])
            got = seen[name]
            assert got is not None
            assert (got - expected).norm() <= 2e-6 * size, name
    assert any(float(step["selection"].target_weights.sum()) > 0 for step in recording.steps)
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def _row_of(ids: Tensor, mask: Tensor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The example that a row of a padded batch holds."""
    length = int(mask.sum())
    return next(row for row in rows if row["input_ids"] == ids[:length].tolist())


def test_target_examples_run_at_every_step_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refresh_every=1, got 2"):
        trained(
            SelectiveTrainer,
            model(),
            arguments(tmp_path),
            target_dataset=examples(5),
            target_refresh_every=2,
            selective={"train_on_target": True},
        )
