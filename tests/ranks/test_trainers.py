"""Trainers on two processes: the step is that of a single process with the batches of both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from ftw_optim import GreedyFilter, KeepAll, UniformWeights
from ftw_optim.integrations.transformers import SelectiveTrainer
from ftw_optim.integrations.trl import SelectiveSFTTrainer
from tests.support.processes import Failure, Processes
from tests.support.trainer_runs import ARGUMENTS, HARD, Recording, Watch, examples, model, numbered, padded, tokenizer

pytestmark = [
    pytest.mark.slow,  # two processes import all frameworks
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]
ROWS = numbered(examples(24))
SFT = {"packing": False, "max_length": None}


def trained(directory: str, kind: str, settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A job: one run of a trainer; what it saw, and what it logged."""
    recording, watch = Recording(), Watch()
    several = dist.is_initialized()
    directory = f"{directory}/{dist.get_rank() if several else 'alone'}"
    options = copy.deepcopy(options)
    if kind != "plain":
        own = several and dist.get_rank() == 1
        options |= {"target_dataset": examples(5, seed=1), "selection_log": None if own else recording}
        options |= {"sample_id_column": "number", "source_column": "origin"}
    if kind == "SFT":
        options["target_dataset"] = Dataset.from_list(options["target_dataset"])
        trainer: Trainer = SelectiveSFTTrainer(
            model().double(),
            SFTConfig(directory, **{**ARGUMENTS, **HARD, **SFT, **settings}),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list(ROWS),
            callbacks=[watch],
            **options,
        )
    else:
        made = {"plain": Trainer, "Trainer": SelectiveTrainer}[kind]
        trainer = made(
            model().double(),
            TrainingArguments(directory, **{**ARGUMENTS, **HARD, **settings}),
            train_dataset=ROWS,
            data_collator=padded,
            callbacks=[watch],
            **options,
        )
    trainer.train()
    return {
        "parameters": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "realised": [line.get("selection/realised_decrease") for line in trainer.state.log_history if "loss" in line],
        "steps": recording.steps,
    }


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Trainer": ("Trainer", {}, {"realised_every": 1}),
    "token mean": ("Trainer", {}, {"sample_weighting": "token_mean"}),
    "graph": ("Trainer", {}, {"selective": {"combine": "graph"}}),
    "target rows": ("Trainer", {}, {"selective": {"train_on_target": True}}),
    "guides apart": ("Trainer", {}, {"guide_share": 0.5}),
    "held out": ("Trainer", {}, {"held_out_dataset": examples(5, seed=4), "held_out_every": 2}),
    "one target row": ("Trainer", {}, {"target_batch_size": 1}),
    "SFT": ("SFT", {}, {}),
    "uniform": ("Trainer", {"num_train_epochs": 2}, {"selective": {"proposal": "uniform", "read_ahead": 8}}),
    "learned": ("Trainer", {"num_train_epochs": 2}, {"selective": {"proposal": "learned", "passed_over": "keep"}}),
    "SFT, tested": ("SFT", {}, {"selective": {"proposal": "tested"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_is_that_of_one_with_both_batches(
    name: str, two_processes: Processes, tmp_path: Path
) -> None:
    kind, settings, options = CASES[name]
    settings = {"gradient_accumulation_steps": 1, "num_train_epochs": 1, **settings}
    options = {"target_batch_size": 4, **options}
    options["selective"] = {"filter": GreedyFilter(keep=0.5), **options.get("selective", {})}
    ranks = two_processes.run(trained, str(tmp_path), kind, {**settings, "per_device_train_batch_size": 3}, options)
    whole = trained(str(tmp_path), kind, {**settings, "per_device_train_batch_size": 6}, options)
    for key, value in whole["parameters"].items():
        assert torch.equal(ranks[0]["parameters"][key], ranks[1]["parameters"][key])
        torch.testing.assert_close(ranks[0]["parameters"][key], value, rtol=1e-9, atol=1e-10)
    assert ranks[0]["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert not ranks[1]["steps"]
    assert len(whole["steps"]) == len(ranks[0]["steps"]) >= 4
    for one, other in zip(ranks[0]["steps"], whole["steps"], strict=True):
        for column in ("step", "ids", "sources"):
            assert one[column] == other[column], column
        assert one["selection"].kept.tolist() == other["selection"].kept.tolist()
        assert one["selection"].held_out_loss == pytest.approx(other["selection"].held_out_loss, nan_ok=True)
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-6)


@pytest.mark.parametrize(("kind", "every"), [("Trainer", 1), ("Trainer", 3), ("SFT", 1), ("SFT", 3)])
def test_with_all_kept_alike_it_is_the_trainers_own_run_on_two_processes(
    kind: str, every: int, two_processes: Processes, tmp_path: Path
) -> None:
    """With accumulation, clipping, decay, and a last window that is not complete; also where few steps select."""
    options = {"selective": {"filter": KeepAll(), "weight": UniformWeights()}, "select_every": every}
    found = two_processes.run(trained, str(tmp_path), kind, {}, options)[0]
    own = two_processes.run(trained, str(tmp_path), "plain", {}, {})[0]
    for key, value in own["parameters"].items():
        # The trainer's own loss is computed in float32.
        torch.testing.assert_close(found["parameters"][key], value, rtol=1e-4, atol=1e-6)
    assert found["losses"] == pytest.approx(own["losses"], rel=1e-5)
    assert [step["step"] for step in found["steps"]] == list(range(1, len(own["losses"]) + 1, every))


def test_proposed_rows_are_the_same_on_two_processes_where_few_steps_select(
    two_processes: Processes, tmp_path: Path
) -> None:
    alike = {"filter": KeepAll(), "weight": UniformWeights(), "proposal": "similarity", "read_ahead": 12}
    settings = {"gradient_accumulation_steps": 1, "num_train_epochs": 2, "per_device_train_batch_size": 3}
    every, some = (
        two_processes.run(trained, str(tmp_path), "Trainer", settings, {"selective": alike, "select_every": number})[0]
        for number in (1, 3)
    )
    ids = {step["step"]: step["ids"] for step in every["steps"]}
    assert len(ids) == 4
    assert [(step["step"], step["ids"]) for step in some["steps"]] == [(1, ids[1]), (4, ids[4])]
    for key, value in every["parameters"].items():
        torch.testing.assert_close(some["parameters"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "settings", "kind", "said"),
    [
        (
            {"selective": {"proposal": "similarity"}},
            {"accelerator_config": {"split_batches": True}},
            "NotImplementedError",
            "leave split_batches out",
        ),
        (
            {"selective": {"proposal": "similarity"}},
            {"per_device_train_batch_size": 5},
            "ValueError",
            "or dataloader_drop_last=True with a proposal",
        ),
        ({}, {"average_tokens_across_devices": False}, "NotImplementedError", "average_tokens_across_devices=False"),
        (
            {"selective": {"train_on_target": True}, "target_batch_size": 1},
            {},
            "ValueError",
            "a target example for each of 2 processes",
        ),
    ],
)
def test_what_several_processes_do_not_have_is_refused(
    options: dict[str, Any], settings: dict[str, Any], kind: str, said: str, two_processes: Processes, tmp_path: Path
) -> None:
    for one in two_processes.outcomes(trained, str(tmp_path), "Trainer", settings, options):
        assert isinstance(one, Failure)
        assert one.kind == kind
        assert said in one.text


def proposed(directory: str, resume: bool) -> dict[str, Any]:
    """A job: a run with windows of two batches and a learned proposal, that saves, or goes on from what was saved."""
    several = dist.is_initialized()
    recording = Recording()
    settings = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2 if several else 4,
        "num_train_epochs": 2,
        "dataloader_drop_last": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = SelectiveTrainer(
        model().double(),
        TrainingArguments(directory, **{**ARGUMENTS, **HARD, **settings}),
        train_dataset=ROWS[:22],
        data_collator=padded,
        target_dataset=examples(5, seed=1),
        target_batch_size=4,
        selective={"proposal": "learned", "filter": GreedyFilter(keep=0.5)},
        selection_log=recording,
        sample_id_column="number",
    )
    trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-2" if resume else None)
    sampler = trainer.proposed_sampler
    assert sampler is not None
    return {
        "parameters": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "ids": [sorted(step["ids"]) for step in recording.steps],
        "learned": sampler.proposal.state_dict()["learned"],
    }


def test_all_processes_propose_alike_and_learn_from_all_scores(two_processes: Processes, tmp_path: Path) -> None:
    """The same records as one process proposes, with windows of several batches; a run that was cut short goes on."""
    one, other = two_processes.run(proposed, str(tmp_path / "two"), False)
    whole = proposed(str(tmp_path / "one"), False)
    assert len(whole["ids"]) == 6
    assert one["ids"] == whole["ids"]
    for name, value in one["learned"].items():
        torch.testing.assert_close(torch.as_tensor(other["learned"][name]), torch.as_tensor(value), rtol=0, atol=0)
        torch.testing.assert_close(torch.as_tensor(whole["learned"][name]), torch.as_tensor(value))
    resumed = two_processes.run(proposed, str(tmp_path / "two"), True)[0]
    assert resumed["ids"] == one["ids"][2:]
    for name, value in one["parameters"].items():
        torch.testing.assert_close(whole["parameters"][name], value, rtol=1e-9, atol=1e-10)
        assert torch.equal(resumed["parameters"][name], value)
