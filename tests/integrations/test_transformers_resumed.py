"""The trainer of Transformers with selection, killed or run a second time: it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ftw_optim import GreedyFilter
from ftw_optim.integrations.streaming import CandidateStream
from ftw_optim.integrations.transformers import SelectiveTrainer
from tests.support.grids import slow
from tests.support.releases import OLDER, resumes_in_first_epoch_alone
from tests.support.trainer_runs import (
    Recording,
    Stop,
    arguments,
    examples,
    lora_model,
    model,
    numbered,
    padded,
    trained,
)


def _whole_and_resumed(
    trainer: Callable[..., SelectiveTrainer], recordings: Sequence[Recording], killed: int
) -> tuple[SelectiveTrainer, SelectiveTrainer]:
    """A whole run, and one that was killed at this step and resumed, which ends with the same weights."""
    whole = trainer("whole", recordings[0])
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", recordings[1], Stop(killed)).train()
    resumed = trainer("cut", recordings[1])
    resumed.train(resume_from_checkpoint=True)
    state = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(state[name], value), name
    return whole, resumed


@OLDER
@resumes_in_first_epoch_alone
@pytest.mark.parametrize("killed", [slow(3), slow(4), 5])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(killed: int, tmp_path: Path) -> None:
    """Weights, data order, dropout, target batches, metrics and selection log, bit by bit."""
    rows, recordings = numbered(examples(15)), [Recording(), Recording()]

    def trainer(name: str, recording: Recording, *callbacks: Any) -> SelectiveTrainer:
        return SelectiveTrainer(
            lora_model(lora_dropout=0.2),
            arguments(tmp_path / name, save_strategy="steps", save_steps=2),
            data_collator=padded,
            train_dataset=rows,
            callbacks=list(callbacks),
            target_dataset=examples(5, seed=1),
            target_batch_size=2,
            target_refresh_every=3,
            realised_every=2,
            selective={"filter": GreedyFilter(keep=3)},
            selection_log=recording,
            sample_id_column="number",
        )

    whole, resumed = _whole_and_resumed(trainer, recordings, killed)
    assert whole.selective_optimizer is not None
    assert resumed.selective_optimizer is not None
    torch.testing.assert_close(
        resumed.selective_optimizer.state_dict(), whole.selective_optimizer.state_dict(), rtol=0, atol=0
    )
    one, other = ([_comparable(step) for step in recording.steps] for recording in recordings)
    assert len(one) == 6
    assert one == other
    assert [_untimed(row) for row in whole.state.log_history[:-1]] == [
        _untimed(row) for row in resumed.state.log_history[:-1]
    ]


@pytest.mark.filterwarnings("ignore:Skipped a record")
@pytest.mark.parametrize("killed", [slow(3), slow(5)])
def test_a_run_on_streams_that_was_killed_goes_on_with_their_next_candidates(killed: int, tmp_path: Path) -> None:
    """Two files of records, one with a damaged line, shuffled and interleaved; the trainer skips what it has seen."""
    for source in range(2):
        lines = [json.dumps(row) for row in numbered(examples(30, seed=source))]
        (tmp_path / f"{source}.jsonl").write_text("\n".join([*lines[:7], "{damaged", *lines[7:]]) + "\n")
    recordings = [Recording(), Recording()]

    def trainer(name: str, recording: Recording, *callbacks: Any) -> SelectiveTrainer:
        files = {str(source): tmp_path / f"{source}.jsonl" for source in range(2)}
        return SelectiveTrainer(
            model(),
            arguments(tmp_path / name, save_strategy="steps", save_steps=2, max_steps=7),
            data_collator=padded,
            train_dataset=CandidateStream(files, dict, batch_size=None, passes=None, shuffle_buffer=8, seed=3),
            callbacks=list(callbacks),
            target_dataset=examples(5, seed=1),
            selective={"filter": GreedyFilter(keep=3)},
            selection_log=recording,
            sample_id_column="sample_id",
            source_column="source",
        )

    _whole_and_resumed(trainer, recordings, killed)
    one, other = ([_comparable(step) for step in recording.steps] for recording in recordings)
    assert one == other
    ids = [number for step in recordings[0].steps for number in step["ids"]]
    assert len(ids) == len(set(ids)) == 7 * 6
    assert {source for step in recordings[0].steps for source in step["sources"]} == {"0", "1"}


def _comparable(step: dict[str, Any]) -> tuple[Any, ...]:
    selection = step["selection"]
    return step["step"], step["ids"], selection.kept.tolist(), selection.weights.tolist(), selection.losses.tolist()


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("selection/ms")}


@pytest.mark.slow
def test_a_second_run_of_one_trainer_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    trainer, _ = trained(SelectiveTrainer, model(), arguments(tmp_path), target_dataset=examples(5, seed=1))
    assert isinstance(trainer, SelectiveTrainer)
    wrapped = trainer.selective_optimizer
    trainer.train()
    assert trainer.selective_optimizer is wrapped
    assert int(trainer.selective_optimizer.state_dict()["selective"]["backwards"]) == 12  # type: ignore[union-attr]
