"""The SFT trainer of TRL with selection: its own step where nothing is left out, and the oracle's elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from ftw_optim import GreedyFilter
from ftw_optim.integrations._trainers.micro_batch import IDS, SOURCES
from ftw_optim.integrations.trl.sft import FUSES, SelectiveSFTTrainer
from tests.support.grids import slow
from tests.support.releases import OLDER, named_here, resumes_in_first_epoch_alone
from tests.support.trainer_runs import (
    ALL,
    ARGUMENTS,
    HARD,
    Recording,
    Watch,
    check_a_killed_run_goes_on,
    check_against_samples_alone,
    examples,
    logged,
    model,
    numbered,
    tokenizer,
)

pytestmark = [
    # What TRL sets by default and PEFT asks of a model, under names that Transformers has changed.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    OLDER,
]
PACKED: dict[str, Any] = {"packing": True, "max_length": 16, "per_device_train_batch_size": 1}
FLAT: dict[str, Any] = {"padding_free": True, "max_length": None}


def lora(**options: Any) -> peft.LoraConfig:
    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, **options)


def trained(
    kind: Callable[..., SFTTrainer],
    path: Path,
    settings: dict[str, Any],
    *,
    net: nn.Module | None = None,
    rows: Any = None,
    callbacks: tuple[Any, ...] = (),
    start: Callable[[SFTTrainer], Any] = lambda trainer: trainer.train(),
    **options: Any,
) -> tuple[SFTTrainer, Watch]:
    watch = Watch()
    trainer = kind(
        model() if net is None else net,
        SFTConfig(str(path), **named_here({**ARGUMENTS, **HARD, **settings})),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list(examples(15) if rows is None else rows),
        callbacks=[watch, *callbacks],
        **options,
    )
    start(trainer)
    return trainer, watch


# ---------------------------------------------------------------------- nothing left out


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        slow({}, {}),
        (PACKED, {}),
        slow({**PACKED, "per_device_train_batch_size": 2}, {"selective": {**ALL, "combine": "graph"}}),
        slow(FLAT, {}),
        slow({**FLAT, "pad_to_multiple_of": 8}, {}),
        slow({"loss_type": "dft"}, {}),
        slow({"activation_checkpointing": False}, {"peft_config": lora(lora_dropout=0.2)}),
        slow(PACKED, {"peft_config": lora(lora_dropout=0.2)}),
        slow({**PACKED, "gradient_accumulation_steps": 1}, {"selective": {**ALL, "combine": "rerun"}}),
    ],
    ids=["rows", "packed", "packed, graph", "flat", "flat, padded", "dft", "lora", "lora, packed", "packed, rerun"],
)
def test_all_candidates_alike_are_the_trainers_own_run(
    settings: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """Step by step: parameters and all that is logged, with decay, clipping, a schedule, checkpointing, masks."""
    selective = {"selective": ALL, **options}
    shared = {name: value for name, value in options.items() if name != "selective"}
    own, watch = trained(SFTTrainer, tmp_path, settings, **shared)
    ours, seen = trained(
        SelectiveSFTTrainer, tmp_path, settings, target_dataset=Dataset.from_list(examples(5, seed=1)), **selective
    )
    assert len(watch.parameters) > 3
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)
    names = ["loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "mean_token_accuracy"]
    if FUSES:  # older releases take the mean entropy over all tokens, not over those with a label
        names.append("entropy")
    torch.testing.assert_close(logged(ours, *names), logged(own, *names), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- the oracle


class Collected:
    """A collator that keeps the documents of each batch that it makes."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator
        self.batches: list[list[dict[str, Any]]] = []

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collator(rows)
        documents: list[dict[str, Any]] = []
        for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
            for token, label, position in zip(ids.tolist(), labels.tolist(), positions.tolist(), strict=True):
                if position == 0:
                    documents.append({"input_ids": [], "labels": []})
                documents[-1]["input_ids"].append(token)
                documents[-1]["labels"].append(label)
        self.batches.append([one for one in documents if any(label != -100 for label in one["labels"][1:])])
        return batch


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["token_sum", "token_mean"])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (PACKED, {}),
        slow({**PACKED, "activation_checkpointing": False}, {"peft_config": lora()}),
        ({**FLAT, "pad_to_multiple_of": 8}, {"peft_config": lora()}),
    ],
    ids=["packed", "packed, lora", "flat, lora"],
)
def test_each_packed_document_is_a_candidate(
    settings: dict[str, Any], options: dict[str, Any], weighting: str, tmp_path: Path
) -> None:
    """``.grad`` is the weighted sum of the gradients of documents run alone, over several micro-batches."""
    recording, collected = Recording(), []

    def start(trainer: SFTTrainer) -> None:
        collected.append(Collected(trainer.data_collator))
        trainer.data_collator = collected[0]
        trainer.train()

    torch.manual_seed(3)
    targets = examples(5, seed=1)
    trainer, watch = trained(
        SelectiveSFTTrainer,
        tmp_path,
        {**settings, "max_grad_norm": 0.0, "learning_rate": 1e-3},
        net=model().double(),
        start=start,
        target_dataset=Dataset.from_list(targets),
        target_batch_size=5,
        selective={"filter": GreedyFilter(keep=2), "metric": "euclidean"},
        sample_weighting=weighting,
        selection_log=recording,
        **options,
    )
    size = trainer.args.gradient_accumulation_steps
    batches, per_epoch = collected[0].batches, math.ceil(len(collected[0].batches) / 2)
    epochs = [batches[:per_epoch], batches[per_epoch:]]
    windows = [
        [row for batch in epoch[at : at + size] for row in batch]
        for epoch in epochs
        for at in range(0, len(epoch), size)
    ]
    rows = {
        f"{step}.{number}": row for step, window in enumerate(windows, start=1) for number, row in enumerate(window)
    }
    assert [len(step["ids"]) for step in recording.steps] == list(map(len, windows))
    assert max(map(len, windows)) > 3

    torch.manual_seed(0)
    before = model().double()
    if options:
        torch.manual_seed(trainer.args.seed)  # as the trainer does before it adds the adapter
        before = peft.get_peft_model(before, options["peft_config"])
    check_against_samples_alone(
        before.eval(),
        watch,
        recording,
        lambda ids: [rows[number] for number in ids],
        lambda _: targets,
        weighting,
        tolerance=1e-5,  # of norms and of a fused output layer that always compute in float32
    )


def test_texts_and_columns_for_the_log(tmp_path: Path) -> None:
    """Prompts do not count, ids and sources reach the log, and a list of records will do as the target."""
    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        return " ".join(f"w{number}" for number in torch.randint(0, 40, (words,), generator=generator).tolist())

    rows = [{"prompt": text(3), "completion": " " + text(2 + number % 4)} for number in range(12)]
    recording = Recording()
    trainer, _ = trained(
        SelectiveSFTTrainer,
        tmp_path,
        {},
        rows=numbered(rows),
        target_dataset=rows[:4],
        held_out_dataset=rows[4:],
        selection_log=recording,
        sample_id_column="number",
        source_column="origin",
    )
    assert sorted(number for step in recording.steps[:2] for number in step["ids"]) == list(range(12))
    for step in recording.steps:
        assert step["sources"] == [f"source {number % 3}" for number in step["ids"]]
        assert step["metrics"] == {}
        assert len(step["selection"].losses) == 6
        assert math.isfinite(step["selection"].held_out_loss)
    # Beside the end of the sequence, the completion alone: 2 to 5 words.
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask", IDS, SOURCES}
    counted = (batch["labels"] != -100).sum(dim=1).tolist()
    assert counted == [2 + number % 4 + 1 for number in batch[IDS]]


# ---------------------------------------------------------------------- resumed


@resumes_in_first_epoch_alone
@pytest.mark.parametrize("settings", [slow({}), slow({**PACKED, "max_length": 11})], ids=["rows", "packed"])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(settings: dict[str, Any], tmp_path: Path) -> None:
    def run(name: str, recording: Recording, **options: Any) -> SFTTrainer:
        return trained(
            SelectiveSFTTrainer,
            tmp_path / name,
            {**settings, "save_strategy": "steps", "save_steps": 2},
            target_dataset=Dataset.from_list(examples(5, seed=1)),
            target_batch_size=2,
            selective={"filter": GreedyFilter(keep=2)},
            peft_config=lora(lora_dropout=0.2),
            selection_log=recording,
            **options,
        )[0]

    check_a_killed_run_goes_on(run)


# ---------------------------------------------------------------------- refused


def test_packing_without_boundaries_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match='packing_strategy="wrapped" cuts documents'):
        trained(
            SelectiveSFTTrainer,
            tmp_path,
            {**PACKED, "packing_strategy": "wrapped"},
            target_dataset=Dataset.from_list(examples(2)),
        )


def test_offloaded_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="activation_offloading"):
        trained(
            SelectiveSFTTrainer,
            tmp_path,
            {"activation_offloading": True},
            target_dataset=Dataset.from_list(examples(2)),
        )


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="puts 3 virtual tokens in front of each row"):
        trained(
            SelectiveSFTTrainer,
            tmp_path,
            {},
            target_dataset=Dataset.from_list(examples(2)),
            peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        )


def test_packed_rows_are_not_run_again_together(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="packed rows cannot be put together"):
        trained(
            SelectiveSFTTrainer,
            tmp_path,
            PACKED,
            target_dataset=Dataset.from_list(examples(2)),
            selective={"combine": "rerun"},
        )


def test_columns_of_packed_data_that_are_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="Expected a column 'number'"):
        trained(
            SelectiveSFTTrainer,
            tmp_path,
            PACKED,
            rows=numbered(examples(15)),
            target_dataset=Dataset.from_list(examples(2)),
            selection_log=Recording(),
            sample_id_column="number",
        )
