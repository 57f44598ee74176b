"""Trainers whose target examples take part in the steps: the gradient that is applied, and the loss that is logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftw_optim import GreedyFilter
from ftw_optim.integrations._trainers.targets import TargetBatches
from ftw_optim.integrations.transformers import SelectiveTrainer, SelectiveTrainerMixin
from tests.support.grids import slow
from tests.support.trainer_runs import (
    Recording,
    Stop,
    arguments,
    examples,
    gradients_alone,
    model,
    numbered,
    padded,
    trained,
)


@pytest.mark.parametrize("weighting", ["token_sum", slow("token_mean")])
@pytest.mark.parametrize("combine", ["auto", slow("graph"), slow("rerun")])
@pytest.mark.parametrize("guide_share", [0.0, 0.4])
def test_the_applied_gradient_is_that_of_candidates_and_target_examples(
    guide_share: float, combine: str, weighting: str, tmp_path: Path
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
        guide_share=guide_share,
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
        goals = _rows_of(trainer.trained_batches or trainer.target_batches, step["step"] - 1, targets)
        guides = _rows_of(trainer.target_batches, step["step"] - 1, targets)
        assert guide_share == 0.0 or not any(row in goals for row in guides)
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


def _rows_of(batches: TargetBatches, step: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples that the padded batch of a step holds."""
    batch = batches.at(step)
    found = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        found.append(next(row for row in rows if row["input_ids"] == ids[: int(mask.sum())].tolist()))
    return found


@pytest.mark.parametrize("share", [-0.5, 0.01, 0.99, 1.0])
def test_a_share_that_leaves_one_side_without_examples_is_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="guide_share between 0 and 1"):
        SelectiveTrainer(
            model(), arguments(tmp_path), train_dataset=examples(4), target_dataset=examples(5), guide_share=share
        )


@given(total=st.integers(2, 40), share=st.floats(0.3, 0.7), seed=st.integers(0, 5))
def test_guides_and_trained_examples_are_parted_once_and_for_all(total: int, share: float, seed: int) -> None:
    batches = TargetBatches(dataset=list(range(total)), collate=list, size=3, seed=seed)
    seen = []
    for part in batches.parted(share):
        seen.append({number for step in range(2 * total) for number in part.at(step)})
    assert seen[0] | seen[1] == set(range(total))
    assert not seen[0] & seen[1]
    assert len(seen[0]) == round(share * total)
    again = TargetBatches(dataset=list(range(total)), collate=list, size=3, seed=seed).parted(share)
    assert [part.at(4) for part in again] == [part.at(4) for part in batches.parted(share)]


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


@pytest.mark.parametrize("weighting", ["token_sum", slow("token_mean")])
def test_held_out_examples_are_watched(weighting: str, tmp_path: Path) -> None:
    held_out, targets = examples(7, seed=2), examples(5, seed=1)
    recording = Recording()
    trainer, watch = trained(
        SelectiveTrainer,
        model().double(),
        arguments(tmp_path, max_grad_norm=0.0, learning_rate=1e-2, logging_steps=1),
        rows=examples(12),
        target_dataset=targets,
        target_batch_size=4,
        held_out_dataset=held_out,
        held_out_every=2,
        selective={"train_on_target": True},
        sample_weighting=weighting,
        selection_log=recording,
    )
    net = model().double()
    found = [step["selection"] for step in recording.steps]
    assert len(found) > 2
    for number in range(0, len(found), 2):
        if number:
            for name, value in watch.parameters[number - 1].items():
                dict(net.named_parameters())[name].data.copy_(value)
        parts = [gradients_alone(net, held_out[at : at + 4], weighting)[0] for at in (0, 4)]
        assert found[number].held_out_loss == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
        assert found[number].guide_loss == pytest.approx(float(found[number].target_losses.mean()), rel=1e-5)
    assert found[1].held_out_loss == found[0].held_out_loss
    assert all("selection/blind" in line for line in trainer.state.log_history if "loss" in line)


@pytest.mark.slow
def test_a_memorised_target_is_blind_and_one_of_rows_like_the_held_out_ones_is_not(tmp_path: Path) -> None:
    recording = Recording()
    trained(
        SelectiveTrainer,
        model().double(),
        arguments(tmp_path, learning_rate=0.03, num_train_epochs=16),
        rows=examples(12),
        target_dataset=examples(4, seed=1),
        target_batch_size=4,
        held_out_dataset=examples(16, seed=2),
        held_out_every=1,
        selective={"train_on_target": True},
        selection_log=recording,
    )
    blind = [step["selection"].blind for step in recording.steps]
    assert not blind[0]
    assert blind[-1]


def test_a_batch_of_held_out_examples_without_labels_is_refused(tmp_path: Path) -> None:
    unlabelled = [{**row, "labels": [-100] * len(row["input_ids"])} for row in examples(4)]
    with pytest.raises(ValueError, match="look at the labels of target_dataset and held_out_dataset"):
        trained(
            SelectiveTrainer,
            model(),
            arguments(tmp_path),
            target_dataset=examples(5),
            held_out_dataset=unlabelled,
        )


@pytest.mark.parametrize("stop", [None, slow(2), slow(4)])
def test_target_examples_guide_first_and_are_trained_on_later(stop: int | None, tmp_path: Path) -> None:
    recording = Recording()

    def run(*callbacks: Any, resume: bool = False) -> None:
        trainer = SelectiveTrainer(
            model().double(),
            arguments(tmp_path, num_train_epochs=3, save_steps=1, save_strategy="steps", learning_rate=1e-3),
            data_collator=padded,
            train_dataset=examples(12),
            target_dataset=examples(5, seed=1),
            target_batch_size=3,
            guide_until=0.5,
            selective={"filter": GreedyFilter(keep=3)},
            selection_log=recording,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)

    if stop is None:
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run(Stop(stop))
        run(resume=True)
    taking_part = [len(step["selection"].target_weights) for step in recording.steps]
    assert len(taking_part) == 6
    assert taking_part == [0, 0, 0, 3, 3, 3]
    late = [step["selection"].target_weights for step in recording.steps[3:]]
    assert all(bool(weights.any()) for weights in late)


@pytest.mark.parametrize(
    "options", [{"guide_until": 1.0}, {"guide_until": -0.1}, {"guide_until": 0.5, "guide_share": 0.5}]
)
def test_a_time_to_guide_that_is_none_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="guide_until must be in"):
        SelectiveTrainer(model(), arguments(tmp_path), train_dataset=examples(4), target_dataset=examples(5), **options)
