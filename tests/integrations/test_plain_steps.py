"""Trainers that make no selection at some steps: these are the trainer's own, and of the same candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, UniformWeights
from ftw_optim.integrations.transformers import SelectiveTrainer
from ftw_optim.integrations.trl import SelectiveSFTTrainer
from ftw_optim.proposals import FilterUnless, VettedProposal
from ftw_optim.proposals.trust import LikenessTrust
from tests.support.grids import slow
from tests.support.trainer_runs import (
    ARGUMENTS,
    HARD,
    PROPOSED_ROWS,
    Recording,
    Stop,
    arguments,
    logged_trainer,
    model,
    padded,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings(
    # An SFTConfig of TRL sets an option of Transformers by its old name.
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning",
)
ALIKE = {"filter": KeepAll(), "weight": UniformWeights()}


def trainer_of(path: Path, recording: Recording, *callbacks: Any, **options: Any) -> SelectiveTrainer:
    names = ("save_strategy", "save_steps", "num_train_epochs")
    settings = {name: options.pop(name) for name in names if name in options}
    return logged_trainer(path, recording, *callbacks, settings=settings, **options)


def close(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [2, slow(3), slow(100)])
def test_steps_without_a_selection_train_as_equal_weights_do(every: int, tmp_path: Path) -> None:
    recording = Recording()
    trainer = trainer_of(tmp_path / "some", recording, selective=dict(ALIKE), select_every=every)
    trainer.train()
    steps = trainer.state.global_step
    assert [step["step"] for step in recording.steps] == [step + 1 for step in range(steps) if step % every == 0]
    plain = Trainer(model(), arguments(tmp_path / "plain"), data_collator=padded, train_dataset=PROPOSED_ROWS)
    plain.train()
    close(trainer.model, plain.model)
    found, expected = ([line["loss"] for line in one.state.log_history if "loss" in line] for one in (trainer, plain))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether likeness is trusted, a list of one flag, instead of what so few scores of a random model bear out."""
    flag = [True]
    monkeypatch.setattr(VettedProposal, "trusts_likeness", lambda proposal: flag[0] and proposal._calls > 1)
    monkeypatch.setattr(LikenessTrust, "share", lambda trust: 1.0)
    return flag


TESTED: dict[str, Any] = {"proposal": "tested", "read_ahead": 14, "filter": GreedyFilter(keep=3)}


def test_a_trusted_proposal_is_told_of_every_fourth_step(trusted: list[bool], tmp_path: Path) -> None:
    recordings = [Recording(), Recording()]
    trainer = trainer_of(tmp_path / "some", recordings[0], selective=dict(TESTED), num_train_epochs=4)
    trainer.train()
    every = trainer_of(tmp_path / "all", recordings[1], selective=dict(TESTED), select_every=1, num_train_epochs=4)
    every.train()
    assert len(recordings[1].steps) == every.state.global_step == trainer.state.global_step
    chosen = {step["step"]: step["ids"] for step in recordings[1].steps}
    few = [step["step"] for step in recordings[0].steps]
    assert set(range(1, trainer.state.global_step + 1, 4)) <= set(few)
    assert len(few) < trainer.state.global_step / 2
    assert all(step["ids"] == chosen[step["step"]] for step in recordings[0].steps)
    close(trainer.model, every.model)
    sampler = trainer.proposed_sampler
    assert sampler is not None
    assert sampler.taken == len(sampler)


def test_every_step_selects_while_likeness_is_not_trusted(trusted: list[bool], tmp_path: Path) -> None:
    trusted[0] = False
    recording = Recording()
    trainer = trainer_of(tmp_path, recording, selective=dict(TESTED))
    trainer.train()
    assert len(recording.steps) == trainer.state.global_step


@pytest.mark.parametrize("killed", [3, slow(6)])
def test_a_run_that_was_killed_goes_on_as_it_would_have(killed: int, trusted: list[bool], tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4}
    recordings = [Recording(), Recording()]
    whole = trainer_of(tmp_path / "whole", recordings[0], selective=dict(TESTED), **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "cut", recordings[1], Stop(killed), selective=dict(TESTED), **options).train()
    resumed = trainer_of(tmp_path / "cut", recordings[1], selective=dict(TESTED), **options)
    resumed.train(resume_from_checkpoint=True)
    one, other = ([(step["step"], step["ids"]) for step in recording.steps] for recording in recordings)
    assert one == other
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_sft_trainer_makes_its_own_step(tmp_path: Path) -> None:
    words = [" ".join(f"w{(start * 7 + step) % 40}" for step in range(5)) for start in range(24)]
    rows = Dataset.from_list([{"prompt": text, "completion": f" {text[:2]}"} for text in words])

    def of(folder: str, **options: Any) -> SelectiveSFTTrainer:
        trainer = SelectiveSFTTrainer(
            model(),
            SFTConfig(str(tmp_path / folder), **{**ARGUMENTS, **HARD, "num_train_epochs": 1}),
            train_dataset=rows,
            processing_class=tokenizer(),
            target_dataset=rows.select([3, 4, 5, 6]),
            selective=dict(ALIKE),
            **options,
        )
        trainer.train()
        return trainer

    some, every = of("some", select_every=3), of("all")
    close(some.model, every.model)
    assert some.selective_optimizer is not None
    assert every.selective_optimizer is not None
    assert some.selective_optimizer.selections == -(-every.selective_optimizer.selections // 3)


def test_the_default_is_every_step_but_beside_a_tested_proposal(tmp_path: Path) -> None:
    def every(**options: Any) -> int:
        return trainer_of(tmp_path, Recording(), **options)._plain_steps.every

    assert every(selective=dict(ALIKE)) == 1
    assert every(selective=dict(TESTED)) == 4
    assert every(selective=dict(TESTED), select_every=2) == 2
    assert every(selective=dict(TESTED), sample_weighting="token_mean") == 1
    assert every(selective={**TESTED, "train_on_target": True}) == 1
    assert every(selective=dict(TESTED), guide_share=0.5) == 1
    assert every(selective=dict(TESTED), guide_until=0.5) == 1
    assert every(selective=dict(TESTED), target_refresh_every=2) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select_every": 0}, "select_every must be a positive integer, got 0"),
        ({"select_every": True}, "positive integer, got True"),
        ({"select_every": 2.0}, "positive integer, got 2.0"),
        ({"select_every": 2, "sample_weighting": "token_mean"}, 'with sample_weighting="token_mean"'),
        ({"select_every": 2, "guide_share": 0.5}, "with target examples that take part"),
        (
            {"select_every": 2, "target_refresh_every": 3},
            "with target_refresh_every=3: leave select_every out, or that",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, Recording(), selective=dict(TESTED), **options)


class OwnLosses(SelectiveTrainer):
    """Another loss than the trainer's."""

    def position_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        losses, counted = super().position_losses(model, inputs)
        return 0.1 * losses**3, counted


def test_losses_of_ones_own_that_nothing_compares_are_not_left_to_the_trainer(tmp_path: Path) -> None:
    unchecked = {**TESTED, "self_check": False}
    assert trainer_of(tmp_path, Recording(), kind=OwnLosses, selective=unchecked)._plain_steps.every == 1
    with pytest.raises(ValueError, match="position_losses of your own and no self_check"):
        trainer_of(tmp_path, Recording(), kind=OwnLosses, selective=unchecked, select_every=2)


def test_a_step_that_is_not_finite_rejects_the_candidate_at_fault(tmp_path: Path) -> None:
    """The row's token has an embedding that overflows, at a step that would have been plain."""
    recordings = [Recording(), Recording()]
    for recording, every in zip(recordings, (1, 3), strict=True):
        trainer = trainer_of(
            tmp_path / str(every),
            recording,
            selective={**ALIKE, "self_check": False},
            select_every=every,
            num_train_epochs=1,
        )
        row = next(dict(row) for row in PROPOSED_ROWS)
        rows = [
            {**one, "input_ids": [42 if token == 41 else token for token in one["input_ids"]]} for one in PROPOSED_ROWS
        ]
        rows[33] = {**row, "input_ids": [41] * len(row["input_ids"])}
        trainer.train_dataset = rows
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[41] = float("inf")
        trainer.train()
    (fault,) = (step for step in recordings[0].steps if len(step["selection"].rejected))
    assert fault["step"] % 3 != 1, "a step that is plain"
    again = {step["step"]: step["selection"].rejected.tolist() for step in recordings[1].steps}
    assert again[fault["step"]] == fault["selection"].rejected.tolist()
    assert sorted(again) == sorted({fault["step"], *range(1, 1 + len(recordings[0].steps), 3)})


def test_a_plain_step_after_a_skipped_selection_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an overflow under a GradScaler, which lets no step through and clears gradients by the model."""
    trainer = trainer_of(tmp_path, Recording(), selective=dict(ALIKE), select_every=100, num_train_epochs=1)
    made = []
    trainer.create_optimizer()
    assert trainer.selective_optimizer is not None
    trainer.selective_optimizer.optimizer.register_step_post_hook(lambda *_: made.append(trainer.state.global_step))
    at = SelectiveOptimizer.backward

    def skipped(optimizer: SelectiveOptimizer, *args: Any, **kwargs: Any) -> Any:
        loss = at(optimizer, *args, **kwargs)
        optimizer._pending = False
        return loss

    monkeypatch.setattr(SelectiveOptimizer, "backward", skipped)
    monkeypatch.setattr(trainer, "create_optimizer", lambda *_: trainer.optimizer)
    trainer.train()
    assert made == list(range(1, trainer.state.global_step)), "all but the skipped one"


def test_what_is_realised_is_measured_at_the_next_selection(tmp_path: Path) -> None:
    recording = Recording()
    trainer_of(tmp_path, recording, selective=dict(ALIKE), select_every=4, realised_every=6, num_train_epochs=4).train()
    measured = [step["step"] for step in recording.steps if "realised_decrease" in step["metrics"]]
    assert [step["step"] for step in recording.steps] == list(range(1, 29, 4))
    assert measured == [9, 13, 21, 25], "of steps 6, 12, 18 and 24, those after"


def test_gradients_beside_the_optimizer_clip_nothing(tmp_path: Path) -> None:
    """A selection has none of parameters that are not updated."""

    def norms(every: int) -> list[float]:
        trainer = trainer_of(tmp_path / str(every), Recording(), selective=dict(ALIKE), select_every=every)
        updated = [parameter for name, parameter in trainer.model.named_parameters() if "layers.0" in name]
        trainer.optimizer = torch.optim.AdamW(updated, lr=1e-2)
        trainer.create_optimizer()
        trainer.train()
        return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]

    assert norms(3) == pytest.approx(norms(1), rel=1e-3)


def test_batches_without_token_ids_are_plain_too(tmp_path: Path) -> None:
    def embedded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = padded(rows)
        table = torch.randn(43, 16, generator=torch.Generator().manual_seed(0))
        return {"inputs_embeds": table[batch["input_ids"]], "labels": batch["labels"]}

    def of(every: int) -> SelectiveTrainer:
        trainer = trainer_of(tmp_path / str(every), Recording(), selective=dict(ALIKE), select_every=every)
        trainer.data_collator = embedded
        trainer.target_batches = replace(trainer.target_batches, collate=embedded)
        trainer._targets = replace(trainer._targets, guides=trainer.target_batches)
        trainer._log_columns.clear()
        trainer.train()
        return trainer

    close(of(3).model, of(1).model)


def test_stages_are_asked_once_in_a_window(tmp_path: Path) -> None:
    asked = []

    def condition() -> bool:
        asked.append(len(asked))
        return True

    stages = {"filter": FilterUnless(condition=condition), "weight": UniformWeights()}
    trainer = trainer_of(tmp_path, Recording(), selective=stages, select_every=100, num_train_epochs=1)
    trainer.train()
    assert len(asked) == trainer.state.global_step, "once by the first selection, and once for each plain step"
