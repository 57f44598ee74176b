"""The trainer of Transformers with selection: the oracle's gradients, the data that it draws, and what it logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

from ftw_optim import GreedyFilter, last_blocks
from ftw_optim.integrations.transformers import SelectiveTrainer, SelectiveTrainerMixin
from tests.support.grids import slow
from tests.support.trainer_runs import (
    ALL,
    Recording,
    Watch,
    arguments,
    check_against_samples_alone,
    examples,
    logged,
    lora_model,
    model,
    numbered,
    padded,
    trained,
)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["token_sum", slow("token_mean")])
@pytest.mark.parametrize(
    ("build", "selective"),
    [
        (lambda: model(), {"combine": "factors"}),
        (lambda: model("llama", tie_word_embeddings=True), {}),
        slow(lambda: model(), {"combine": "rerun"}),
        (lambda: lora_model(), {}),
    ],
    ids=["qwen3", "tied", "rerun", "lora"],
)
def test_the_trainer_sees_the_weighted_gradients_of_samples_alone(
    build: Callable[[], nn.Module], selective: dict[str, Any], weighting: str, tmp_path: Path
) -> None:
    rows, targets = numbered(examples(12)), examples(5, seed=1)
    recording = Recording()
    trainer, watch = trained(
        SelectiveTrainer,
        build().double(),
        arguments(tmp_path, max_grad_norm=0.0, learning_rate=1e-3),
        rows=rows,
        target_dataset=targets,
        target_batch_size=3,
        selective={"filter": GreedyFilter(keep=3), "metric": "euclidean", **selective},
        sample_weighting=weighting,
        selection_log=recording,
        sample_id_column="number",
        source_column="origin",
    )
    assert isinstance(trainer, SelectiveTrainerMixin)
    batches = trainer.target_batches

    def targets_of(step: int) -> list[dict[str, Any]]:
        found = []
        for ids, mask in zip(*(batches.at(step - 1)[key] for key in ("input_ids", "attention_mask")), strict=True):
            length = int(mask.sum())
            found.append(next(row for row in targets if row["input_ids"] == ids[:length].tolist()))
        return found

    check_against_samples_alone(
        build().double(),
        watch,
        recording,
        lambda ids: [rows[number] for number in ids],
        targets_of,
        weighting,
        tolerance=2e-6,  # of the norms of these models, which always compute in float32
    )
    assert [step["sources"] for step in recording.steps] == [
        [f"source {number % 3}" for number in step["ids"]] for step in recording.steps
    ]
    assert sorted(number for step in recording.steps[:2] for number in step["ids"]) == list(range(12))


def test_only_the_last_block_scored(tmp_path: Path) -> None:
    net = model()
    trainer, _ = trained(
        SelectiveTrainer,
        net,
        arguments(tmp_path),
        target_dataset=examples(5, seed=1),
        selective={"scored": last_blocks(net, 1), "combine": "graph"},
    )
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_target_batches_are_served_evenly_and_decided_by_the_step(tmp_path: Path) -> None:
    trainer = SelectiveTrainer(
        model(),
        arguments(tmp_path),
        data_collator=lambda rows: rows,
        train_dataset=examples(4),
        target_dataset=list(range(7)),
        target_batch_size=3,
        target_refresh_every=2,
    )
    batches = [trainer.target_batches.at(step) for step in range(28)]
    assert batches[::2] == batches[1::2]
    served = [number for batch in batches[::2] for number in batch]
    assert all(sorted(served[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))
    assert served[:7] != served[7:14]


def test_a_stream_of_candidates_with_columns(tmp_path: Path) -> None:
    """No candidate is lost where a pass over the stream ends within a window: they count in the next one."""
    rows, recording = numbered(examples(14)), Recording()
    trainer, _ = trained(
        SelectiveTrainer,
        model(),
        arguments(tmp_path, max_steps=5),
        rows=Dataset.from_list(rows).to_iterable_dataset(),
        target_dataset=Dataset.from_list(examples(5, seed=1)),
        selection_log=recording,
        sample_id_column="number",
        source_column="origin",
        text_column="origin",
        realised_every=2,
    )
    assert trainer.state.global_step == 5
    ids = [step["ids"] for step in recording.steps]
    assert ids[:2] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [number for window in ids for number in window] == (list(range(14)) * 3)[: sum(map(len, ids))]
    for step in recording.steps:
        assert step["sources"] == step["texts"] == [f"source {number % 3}" for number in step["ids"]]
    assert [step["step"] for step in recording.steps] == [1, 2, 3, 4, 5]
    assert ["realised_decrease" in step["metrics"] for step in recording.steps] == [False, True, False, True, False]


@pytest.mark.slow
def test_evaluation_within_a_run_is_the_trainers_own(tmp_path: Path) -> None:
    """Columns for the log and metrics of selections keep out of it; the best model is loaded at the end."""
    rows = numbered(examples(15))
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "logging_steps": 3,
    }

    def run(kind: Callable[..., Trainer], **options: Any) -> Trainer:
        args = arguments(tmp_path / kind.__name__, **settings)  # type: ignore[attr-defined]
        return trained(kind, model(), args, rows=rows, eval_dataset=rows[:4], **options)[0]

    own = run(Trainer)
    ours = run(
        SelectiveTrainer,
        target_dataset=rows[:3],
        selective=ALL,
        selection_log=Recording(),
        sample_id_column="number",
        source_column="origin",
    )
    evaluated = [[row["eval_loss"] for row in one.state.log_history if "eval_loss" in row] for one in (own, ours)]
    assert len(evaluated[0]) == 3
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-5)
    assert not any(key.startswith("selection") for row in ours.state.log_history if "eval_loss" in row for key in row)
    for name, value in own.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-5, atol=2e-6)


def test_ids_of_data_that_has_none_are_step_and_number(tmp_path: Path) -> None:
    recording = Recording()
    trained(
        SelectiveTrainer,
        model(),
        arguments(tmp_path, num_train_epochs=1),
        target_dataset=examples(5, seed=1),
        selection_log=recording,
    )
    assert [step["ids"] for step in recording.steps] == [
        [f"{step}.{number}" for number in range(size)] for step, size in enumerate((6, 6, 3), start=1)
    ]
    assert all(step["sources"] is None for step in recording.steps)


@pytest.mark.slow
def test_the_log_holds_averages_over_its_interval(tmp_path: Path) -> None:
    each, _ = trained(SelectiveTrainer, model(), arguments(tmp_path), target_dataset=examples(5, seed=1))
    pairs, _ = trained(
        SelectiveTrainer, model(), arguments(tmp_path, logging_steps=2), target_dataset=examples(5, seed=1)
    )
    names = [
        f"selection/{name}"
        for name in ("kept_share", "effective_size", "residual", "cosine", "predicted_decrease", "rejected", "skipped")
    ]
    single = torch.tensor(logged(each, *names))
    torch.testing.assert_close(torch.tensor(logged(pairs, *names)), single.view(3, 2, -1).mean(dim=1))
    assert single[:, 0].tolist() == pytest.approx([2 / 6, 2 / 6, 1 / 3] * 2)
    phases = [f"selection/ms_{phase}" for phase in ("target", "candidates", "gram", "solve", "combine")]
    assert (torch.tensor(logged(each, *phases)) > 0).all()
    assert not any("selection/realised_decrease" in row for row in each.state.log_history)


@pytest.mark.slow
def test_the_realised_decrease_is_that_beside_an_idle_step(tmp_path: Path) -> None:
    """Against two runs from the same start; and measuring changes nothing."""
    settings = {"num_train_epochs": 1, "warmup_steps": 0, "max_grad_norm": 0.0}

    def run(**options: Any) -> tuple[Trainer, Watch]:
        return trained(
            SelectiveTrainer,
            model(),
            arguments(tmp_path, **settings),
            target_dataset=examples(5, seed=1),
            target_batch_size=5,
            **options,
        )

    _, watch = run()
    measured, seen = run(realised_every=1)
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=0, atol=0)
    steps = [row["step"] for row in measured.state.log_history if "selection/realised_decrease" in row]
    assert steps == [1, 2, 3]

    def target_loss(values: dict[str, torch.Tensor]) -> float:
        net = model()
        net.load_state_dict(values, strict=False)
        batch = padded(examples(5, seed=1))
        with torch.no_grad():
            return float(net(**batch).loss)

    first = {name: value.detach().clone() for name, value in model().named_parameters()}
    idle = {  # AdamW at its first step with a gradient of zero only decays
        name: value * (1 - 1e-2 * (0.1 if value.ndim > 1 else 0.0)) for name, value in first.items()
    }
    expected = target_loss(idle) - target_loss(watch.parameters[0])
    found = measured.state.log_history[0]["selection/realised_decrease"]
    assert found == pytest.approx(expected, abs=2e-6)
    assert abs(found) > 1e-3


def test_a_candidate_without_labels_and_a_step_without_use(tmp_path: Path) -> None:
    """Nothing points where the target does: the step is skipped, and the run goes on."""
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in examples(15)]
    rows[0] = examples(1)[0]
    trainer, watch = trained(SelectiveTrainer, model(), arguments(tmp_path), rows=rows, target_dataset=examples(5))
    skipped = [value for (value,) in logged(trainer, "selection/skipped")]
    assert sorted(skipped)[-3:] == [1.0, 1.0, 1.0]
    for number, (one, other) in enumerate(zip(watch.parameters, watch.parameters[1:], strict=False), start=1):
        same = all(torch.equal(one[name], other[name]) for name in one)
        assert same == (skipped[number] == 1.0)
