"""Trainers whose candidates are proposed: which rows they are, what is learned of them, and a run that is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import SFTConfig

from ftw_optim import GreedyFilter, NonNegativeLeastSquares, UniformWeights
from ftw_optim.integrations.streaming import CandidateStream
from ftw_optim.integrations.transformers import SelectiveTrainer
from ftw_optim.integrations.trl import SelectiveSFTTrainer
from ftw_optim.proposals import FilterUnless, LearnedProposal, ProposedSampler, SimilarityProposal, VettedProposal
from tests.support.grids import slow
from tests.support.releases import resumes_in_first_epoch_alone
from tests.support.trainer_runs import (
    ARGUMENTS,
    HARD,
    PROPOSED_ROWS,
    TARGET_ROWS,
    Recording,
    Stop,
    examples,
    logged_trainer,
    model,
    numbered,
    padded,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings(
    # An SFTConfig of TRL sets an option of Transformers by its old name.
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning",
)


def trainer_of(
    path: Path, recording: Recording, *callbacks: Any, selective: dict[str, Any], rows: Any = None, **changes: Any
) -> SelectiveTrainer:
    options = {name: changes.pop(name) for name in ("select_every",) if name in changes}
    settings = {"save_strategy": "steps", "save_steps": 2, **changes}
    selective = {"filter": GreedyFilter(keep=3), **selective}
    return logged_trainer(path, recording, *callbacks, rows=rows, settings=settings, selective=selective, **options)


def sample(row: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": row["input_ids"], "labels": row["labels"], "source": row["origin"]}


@pytest.mark.parametrize("data", [list, slow(Dataset.from_list)])
@pytest.mark.parametrize("passed_over", ["drop", "keep"])
def test_candidates_are_the_rows_that_the_proposal_chooses_by_what_it_has_learned(
    passed_over: str, data: Callable[[Any], Any], tmp_path: Path
) -> None:
    recording = Recording()
    selective = {"proposal": "learned", "read_ahead": 14, "passed_over": passed_over}
    trainer = trainer_of(tmp_path, recording, selective=selective, rows=data(PROPOSED_ROWS))
    trainer.train()
    seed = trainer.args.seed
    other = ProposedSampler(
        PROPOSED_ROWS,
        LearnedProposal(TARGET_ROWS, seed=seed),
        count=6,
        read_ahead=14,
        passed_over=passed_over,  # type: ignore[arg-type]
        encode=sample,
        seed=seed,
    )
    rows_of_epoch = len(other)
    steps = -(-rows_of_epoch // 6)
    assert len(recording.steps) == 2 * steps == trainer.state.global_step
    for epoch in range(2):
        numbers = iter(other)
        # The loader reads one micro-batch of two rows ahead, and draws for six at a time.
        ahead = [next(numbers) for _ in range(6)]
        for step in recording.steps[epoch * steps : (epoch + 1) * steps]:
            ids = step["ids"]
            while len(ahead) < len(ids) + 2:
                if (number := next(numbers, None)) is None:
                    break
                ahead.append(number)
            assert ahead[: len(ids)] == ids
            del ahead[: len(ids)]
            other.observe(step["selection"])
        assert not ahead
    learned = trainer.proposed_sampler
    assert learned is not None
    told = [line for line in trainer.state.log_history if "loss" in line][-1]
    end = trainer.state.log_history[-1]
    assert end["selection/seconds"] > end["selection/plain_seconds"] > 0.0
    assert end["selection/cost_seconds"] == end["selection/seconds"] - end["selection/plain_seconds"]
    assert (end.get("selection/saved_seconds", 0.0) > 0.0) == (other.passed_over > 0)
    assert told["selection/read"] == other.read
    assert told["selection/passed_over"] == other.passed_over
    found, expected = (one.proposal.state_dict()["learned"] for one in (learned, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@resumes_in_first_epoch_alone
@pytest.mark.parametrize(
    ("read_ahead", "passed_over", "killed", "workers"),
    [(14, "drop", 5, 0), slow(14, "drop", 3, 2), slow(14, "keep", 9, 2), slow(None, None, 7, 0)],
)
def test_a_run_that_was_killed_goes_on_with_the_same_rows(
    read_ahead: int | None, passed_over: str | None, killed: int, workers: int, tmp_path: Path
) -> None:
    selective = {"proposal": "learned", "read_ahead": read_ahead, "passed_over": passed_over}
    options = {"selective": selective, "num_train_epochs": 3, "dataloader_num_workers": workers}
    recordings = [Recording(), Recording()]
    whole = trainer_of(tmp_path / "whole", recordings[0], **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "cut", recordings[1], Stop(killed), **options).train()
    resumed = trainer_of(tmp_path / "cut", recordings[1], **options)
    resumed.train(resume_from_checkpoint=True)
    one, other = ([(step["step"], step["ids"]) for step in recording.steps] for recording in recordings)
    assert one == other
    state = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(state[name], value), name


class _EndEpoch(TrainerCallback):
    """Ends the epoch at some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step == self.step


@pytest.mark.slow
def test_a_checkpoint_of_another_place_is_refused(tmp_path: Path) -> None:
    """An epoch that a callback has ended early: by its steps the trainer would skip rows of another epoch."""
    options: dict[str, Any] = {"selective": {"proposal": "learned", "passed_over": "keep"}}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, Recording(), _EndEpoch(3), Stop(5), **options).train()
    with pytest.raises(ValueError, match=r"epoch 0 after 24 rows, as 4 steps.*of another place"):
        trainer_of(tmp_path, Recording(), _EndEpoch(3), **options).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_rows_that_a_collator_packs_or_drops_are_refused(tmp_path: Path) -> None:
    def without_the_last(rows: list[dict[str, Any]]) -> Any:
        return padded(rows[:-1])

    for collator in (without_the_last, _flattened):
        trainer = trainer_of(tmp_path, Recording(), selective={"proposal": "learned", "read_ahead": 14})
        trainer.data_collator = collator
        with pytest.raises(NotImplementedError, match="a collator that packs, drops or adds rows"):
            trainer.train()
        assert all(parameter.grad is None for parameter in trainer.model.parameters())


def _flattened(rows: list[dict[str, Any]]) -> Any:
    """As DataCollatorWithFlattening: one row, whose position ids tell where documents begin."""
    labels = [label for row in rows for label in [-100, *row["labels"][1:]]]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([[at for row in rows for at in range(len(row["input_ids"]))]]),
    }


@pytest.mark.slow
def test_another_loader_and_a_second_run_leave_the_sampler_in_its_place(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(iter(trainer.get_train_dataloader()))

    selective = {"proposal": "learned", "read_ahead": 14}
    recordings = [Recording(), Recording()]
    trainer_of(tmp_path / "alone", recordings[0], selective=selective).train()
    trainer = trainer_of(tmp_path, recordings[1], Look(), selective=selective)
    trainer.train()
    alone, looked_at = ([step["ids"] for step in recording.steps] for recording in recordings)
    assert looked_at == alone
    sampler = trainer.proposed_sampler
    assert sampler is not None
    assert sampler.taken == len(sampler)
    learned = sampler.proposal
    trainer.train()
    assert trainer.proposed_sampler is not sampler
    assert trainer.proposed_sampler is not None
    assert trainer.proposed_sampler.proposal is learned


@pytest.mark.slow
def test_data_with_a_transform_of_its_own_are_read_through_it(tmp_path: Path) -> None:
    numbers = Dataset.from_list([{"row": number} for number in range(len(PROPOSED_ROWS))])

    def transform(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [PROPOSED_ROWS[number] for number in batch["row"]]
        return {key: [row[key] for row in found] for key in ("input_ids", "labels", "number", "origin")}

    recording = Recording()
    trainer = trainer_of(
        tmp_path,
        recording,
        selective={"proposal": "similarity", "read_ahead": 14},
        rows=numbers.with_transform(transform),
        remove_unused_columns=False,
    )
    trainer._log_columns.pop("selection_sources")
    trainer.train()
    assert trainer.proposed_sampler is not None
    assert trainer.proposed_sampler.taken == len(trainer.proposed_sampler)


def test_similar_rows_come_first_where_all_are_on_offer(tmp_path: Path) -> None:
    rows, recording = numbered([*examples(30), *TARGET_ROWS]), Recording()
    selective = {"proposal": SimilarityProposal(TARGET_ROWS)}
    trainer = trainer_of(tmp_path, recording, selective=selective, rows=rows, num_train_epochs=1)
    trainer.train()
    assert {30, 31, 32, 33, 34} <= {*recording.steps[0]["ids"], *recording.steps[1]["ids"]}
    assert sorted(number for step in recording.steps for number in step["ids"]) == list(range(35))


def test_a_tested_proposal_leaves_the_choice_to_the_filter_unless_likeness_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proposal of the present run decides, and after a resume that of its checkpoint."""
    # So few scores of an untrained model bear nothing out: here it goes by the calls, which are in the state as well.
    monkeypatch.setattr(VettedProposal, "trusts_likeness", lambda proposal: proposal._calls // 3 % 2 == 1)
    options: dict[str, Any] = {
        "selective": {"proposal": "tested", "read_ahead": 14},
        "select_every": 1,
        "num_train_epochs": 6,
    }
    recordings = [Recording(), Recording()]
    whole = trainer_of(tmp_path / "whole", recordings[0], **options)
    trusts = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            trusts.append(whole.proposed_sampler.proposal.trusts_likeness())  # type: ignore[union-attr]

    whole.add_callback(Look())
    whole.train()
    kept = [len(step["selection"].kept) for step in recordings[0].steps]
    offered = [len(step["ids"]) for step in recordings[0].steps]
    assert all(count == n if trusted else count <= 3 for count, n, trusted in zip(kept, offered, trusts, strict=True))
    assert {True, False} == set(trusts)
    assert {line["selection/trusts_likeness"] for line in whole.state.log_history if "loss" in line} == {0.0, 1.0}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "cut", recordings[1], Stop(5), **options).train()
    resumed = trainer_of(tmp_path / "cut", recordings[1], **options)
    resumed.train(resume_from_checkpoint=True)
    assert [len(step["selection"].kept) for step in recordings[1].steps] == kept


@pytest.mark.parametrize(
    "proposal", ["tested", VettedProposal(TARGET_ROWS, order="tested")], ids=["named", "one's own"]
)
def test_a_tested_proposal_brings_its_stages_along(proposal: Any, tmp_path: Path) -> None:
    options = trainer_of(tmp_path, Recording(), selective={"proposal": proposal, "filter": None})._options
    assert options["filter"].filter == GreedyFilter()
    assert options["weight"].weight == NonNegativeLeastSquares()
    own = {"filter": FilterUnless(condition=lambda: True), "weight": UniformWeights()}
    options = trainer_of(tmp_path, Recording(), selective={"proposal": proposal, **own})._options
    assert own.items() <= options.items()
    assert "weight" not in trainer_of(tmp_path, Recording(), selective={"proposal": "vetted"})._options


def test_the_sft_trainer_proposes_among_its_tokenized_rows(tmp_path: Path) -> None:
    words = [" ".join(f"w{(start * 7 + step) % 40}" for step in range(5)) for start in range(24)]
    rows = Dataset.from_list([{"prompt": text, "completion": f" {text[:2]}", "origin": "a"} for text in words])
    trainer = SelectiveSFTTrainer(
        model(),
        SFTConfig(str(tmp_path), **{**ARGUMENTS, **HARD, "num_train_epochs": 1}),
        train_dataset=rows,
        processing_class=tokenizer(),
        target_dataset=rows.select([3, 4, 5, 6]),
        selective={"filter": GreedyFilter(keep=3), "proposal": "learned", "read_ahead": 12},
    )
    trainer.train()
    sampler = trainer.proposed_sampler
    assert sampler is not None
    assert sampler.taken == 12
    assert trainer.state.global_step == 2
    state = sampler.proposal.state_dict()["learned"]
    assert state["rows"] > 10


@pytest.mark.slow
def test_a_checkpoint_of_a_run_with_a_proposal_is_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, Recording(), Stop(3), selective={"proposal": "learned", "read_ahead": 12}).train()
    with pytest.raises(ValueError, match="Expected the proposal in selective"):
        trainer_of(tmp_path, Recording(), selective={}).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_a_run_without_a_proposal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, Recording(), Stop(3), selective={}).train()
    other = trainer_of(tmp_path, Recording(), selective={"proposal": "learned", "read_ahead": 12})
    with pytest.raises(ValueError, match=r"Expected proposal.pt in .*, got none"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("selective", "error", "message"),
    [
        ({"proposal": "best"}, ValueError, "one of 'learned', 'similarity', 'tested', 'uniform', 'vetted', got 'best'"),
        ({"proposal": 3}, TypeError, "got int"),
        ({"read_ahead": 8}, ValueError, "Expected a proposal beside read_ahead"),
        ({"proposal": None, "passed_over": "keep"}, ValueError, "Expected a proposal beside passed_over"),
    ],
)
def test_options_that_fit_no_proposal_are_refused(
    selective: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, Recording(), selective=selective)


def test_too_few_records_read_ahead_are_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Recording(), selective={"proposal": "similarity", "read_ahead": 5})
    with pytest.raises(ValueError, match="count=6 and read_ahead=5"):
        trainer.train()


def test_settings_that_a_proposal_cannot_have_are_refused(tmp_path: Path) -> None:
    selective = {"proposal": "learned", "read_ahead": 8}
    with pytest.raises(NotImplementedError, match=r"the proposal decides the order: leave .*group_by_length"):
        trainer_of(tmp_path, Recording(), selective=selective, train_sampling_strategy="group_by_length")
    with pytest.raises(NotImplementedError, match="leave ignore_data_skip out"):
        trainer_of(tmp_path, Recording(), selective=selective, ignore_data_skip=True)
    with pytest.raises(NotImplementedError, match="samples data with a length"):
        trainer_of(tmp_path, Recording(), selective=selective, rows=_stream(), max_steps=3)
    rows = Dataset.from_list([{"text": "w1 w2 w3"}] * 8)
    with pytest.raises(NotImplementedError, match="where documents are packed"):
        SelectiveSFTTrainer(
            model(),
            SFTConfig(str(tmp_path), packing=True, max_length=16, **ARGUMENTS),
            train_dataset=rows,
            processing_class=tokenizer(),
            target_dataset=rows,
            selective=selective,
        )


def test_a_stream_whose_proposal_would_learn_nothing_is_refused(tmp_path: Path) -> None:
    stream = _stream(proposal=LearnedProposal(dim=4), read_ahead=4)
    with pytest.raises(NotImplementedError, match="a stream has a LearnedProposal, to which the trainer tells nothing"):
        trainer_of(tmp_path, Recording(), selective={}, rows=stream, max_steps=3)
    allowed = _stream(proposal=SimilarityProposal(TARGET_ROWS), read_ahead=4)
    assert isinstance(trainer_of(tmp_path, Recording(), selective={}, rows=allowed, max_steps=3), Trainer)


def _stream(**options: Any) -> CandidateStream:
    return CandidateStream({"all": PROPOSED_ROWS}, dict, batch_size=None, **options)
