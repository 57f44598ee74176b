"""The trainer of Transformers with selection: its own step where nothing is left out, and the oracle's elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, UniformWeights, last_blocks
from ftw_optim.integrations.streaming import CandidateStream
from ftw_optim.integrations.transformers import SelectiveTrainer, SelectiveTrainerMixin
from tests.support.models import with_lora
from tests.support.trainers import (
    ARGUMENTS,
    HARD,
    Recording,
    Stop,
    Watch,
    check_against_samples_alone,
    examples,
    model,
    numbered,
    padded,
)

ALL: dict[str, Any] = {"filter": KeepAll(), "weight": UniformWeights()}


def lora_model(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return with_lora(model(), target_modules=["q_proj", "v_proj", "down_proj"], **options)


def arguments(path: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(path), **{**ARGUMENTS, **HARD, **changes})


def trained(
    kind: Callable[..., Trainer], net: nn.Module, args: TrainingArguments, *, rows: Any = None, **options: Any
) -> tuple[Trainer, Watch]:
    watch = Watch()
    data = examples(15) if rows is None else rows
    trainer = kind(net, args, data_collator=padded, train_dataset=data, callbacks=[watch], **options)
    trainer.train()
    return trainer, watch


def logged(trainer: Trainer, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


# ---------------------------------------------------------------------- nothing left out


@pytest.mark.parametrize(
    ("build", "settings", "selective"),
    [
        (model, {}, {}),
        (lambda: model("llama", tie_word_embeddings=True), {}, {"combine": "graph"}),
        (lambda: model(attention_dropout=0.2), {"activation_checkpointing": True}, {}),
        (lambda: model(attention_dropout=0.2), {"optim": "sgd", "max_grad_norm": 0.0}, {"combine": "graph"}),
        (lambda: lora_model(lora_dropout=0.2), {}, {}),
        (lambda: lora_model(lora_dropout=0.2), {"activation_checkpointing": True}, {"combine": "graph"}),
        (model, {}, {"combine": "rerun"}),
        (model, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 5}, {}),
    ],
    ids=[
        "qwen3",
        "tied",
        "checkpoints",
        "sgd, unclipped",
        "lora",
        "lora, checkpoints",
        "rerun",
        "one batch",
    ],
)
def test_all_candidates_alike_are_the_trainers_own_run(
    build: Callable[[], nn.Module], settings: dict[str, Any], selective: dict[str, Any], tmp_path: Path
) -> None:
    """Step by step: parameters, loss and gradient norm, with ragged rows, masks, decay, clipping, a schedule."""
    own, watch = trained(Trainer, build(), arguments(tmp_path, **settings))
    ours, seen = trained(
        SelectiveTrainer,
        build(),
        arguments(tmp_path, **settings),
        target_dataset=examples(5, seed=1),
        selective={**ALL, **selective},
    )
    assert len(watch.parameters) == 6
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)
    names = ("loss", "grad_norm", "learning_rate", "epoch")
    torch.testing.assert_close(logged(ours, *names), logged(own, *names), rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_is_the_trainers_own_run(tmp_path: Path) -> None:
    settings = {"bf16": True, "learning_rate": 1e-3}
    own, watch = trained(Trainer, model(), arguments(tmp_path, **settings))
    ours, seen = trained(
        SelectiveTrainer,
        model(),
        arguments(tmp_path, **settings),
        target_dataset=examples(5, seed=1),
        selective=ALL,
    )
    # Adam's first steps turn a rounding error of a small gradient into a full step: the norms are compared.
    torch.testing.assert_close(logged(ours, "loss", "grad_norm"), logged(own, "loss", "grad_norm"), rtol=1e-2, atol=0)
    first = dict(model().named_parameters())
    for one, other in zip(seen.parameters, watch.parameters, strict=True):
        for name, value in one.items():
            assert (value - other[name]).norm() <= 0.1 * (other[name] - first[name]).norm() + 1e-7, name


def test_a_gradient_scaler_changes_nothing_but_an_overflow(tmp_path: Path) -> None:
    """As accelerate holds one for float16 on a GPU; here on the CPU. A step that overflows is left out."""

    def run(scaler: Any, **settings: Any) -> tuple[Trainer, Watch]:
        watch = Watch()
        trainer = SelectiveTrainer(
            model(),
            arguments(tmp_path, max_grad_norm=0.0, **settings),
            data_collator=padded,
            train_dataset=examples(15),
            callbacks=[watch],
            target_dataset=examples(5, seed=1),
        )
        trainer.accelerator.scaler = scaler
        trainer.train()
        return trainer, watch

    _, bare = run(None)
    _, scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    torch.testing.assert_close(scaled.parameters, bare.parameters, rtol=1e-5, atol=2e-6)
    _, overflowed = run(torch.amp.GradScaler("cpu", init_scale=2.0**127), warmup_steps=0)
    first = dict(model().named_parameters())
    for name, value in overflowed.parameters[0].items():
        assert torch.equal(value, first[name])


def test_a_model_that_averages_micro_batches_keeps_its_own_weights(tmp_path: Path) -> None:
    """A model that takes no token count divides by each micro-batch's own labels."""

    def build() -> nn.Module:
        net = model()
        net.accepts_loss_kwargs = False  # type: ignore[assignment]
        return net

    own, watch = trained(Trainer, build(), arguments(tmp_path))
    ours, seen = trained(
        SelectiveTrainer, build(), arguments(tmp_path), target_dataset=examples(5, seed=1), selective=ALL
    )
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logged(ours, "loss"), logged(own, "loss"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_is_the_trainers_own_run(tmp_path: Path) -> None:
    settings = {"num_train_epochs": 1}
    _, watch = trained(Trainer, model(num_hidden_layers=1), arguments(tmp_path, **settings))
    _, seen = trained(
        SelectiveTrainer,
        model(num_hidden_layers=1),
        arguments(tmp_path, **settings, torch_compile=True, torch_compile_backend="eager"),
        target_dataset=examples(3, seed=1),
        target_batch_size=3,
        selective=ALL,
    )
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)


def test_decay_groups_and_a_given_optimizer_are_kept(tmp_path: Path) -> None:
    def build(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    nets = [model(), model()]
    _, watch = trained(Trainer, nets[0], arguments(tmp_path), optimizers=(build(nets[0]), None))
    given = build(nets[1])
    trainer, seen = trained(
        SelectiveTrainer,
        nets[1],
        arguments(tmp_path),
        target_dataset=examples(5, seed=1),
        selective=ALL,
        optimizers=(given, None),
    )
    assert isinstance(trainer, SelectiveTrainerMixin)
    assert trainer.selective_optimizer is not None
    assert trainer.selective_optimizer.optimizer is given
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)
    built, _ = trained(SelectiveTrainer, model(), arguments(tmp_path), target_dataset=examples(5, seed=1))
    assert [group["weight_decay"] for group in built.optimizer.param_groups] == [0.1, 0.0]


# ---------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("weighting", ["token_sum", "token_mean"])
@pytest.mark.parametrize(
    ("build", "selective"),
    [
        (lambda: model(), {"combine": "factors"}),
        (lambda: model("llama", tie_word_embeddings=True), {}),
        (lambda: model(), {"combine": "rerun"}),
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


# ---------------------------------------------------------------------- resumed


@pytest.mark.parametrize("killed", [3, 4, 5])
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

    whole = trainer("whole", recordings[0])
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", recordings[1], Stop(killed)).train()
    resumed = trainer("cut", recordings[1])
    resumed.train(resume_from_checkpoint=True)

    state = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(state[name], value), name
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
@pytest.mark.parametrize("killed", [3, 5])
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

    whole = trainer("whole", recordings[0])
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", recordings[1], Stop(killed)).train()
    resumed = trainer("cut", recordings[1])
    resumed.train(resume_from_checkpoint=True)
    state = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(state[name], value), name
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


def test_a_second_run_of_one_trainer_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    trainer, _ = trained(SelectiveTrainer, model(), arguments(tmp_path), target_dataset=examples(5, seed=1))
    assert isinstance(trainer, SelectiveTrainer)
    wrapped = trainer.selective_optimizer
    trainer.train()
    assert trainer.selective_optimizer is wrapped
    assert int(trainer.selective_optimizer.state_dict()["selective"]["backwards"]) == 12  # type: ignore[union-attr]


# ---------------------------------------------------------------------- what is told


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


# ---------------------------------------------------------------------- refused


def refused(tmp_path: Path, *, net: nn.Module | None = None, args: dict[str, Any] | None = None, **options: Any) -> Any:
    return SelectiveTrainer(
        model() if net is None else net,
        arguments(tmp_path, **(args or {})),
        data_collator=padded,
        train_dataset=examples(4),
        **{"target_dataset": examples(2), **options},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selective": {"keep": 3}}, r"selective takes filter, weight, .*; got keep"),
        ({"selective": {"target": print}}, r"The target is target_dataset"),
        ({"sample_weighting": "sum"}, r"sample_weighting must be one of"),
        ({"realised_every": -1}, r"realised_every must be"),
        ({"target_batch_size": 0}, r"target_batch_size must be"),
        ({"target_refresh_every": 0}, r"target_refresh_every must be"),
        ({"target_dataset": []}, r"at least one target example"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        refused(tmp_path, **options)


def test_a_stream_of_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="found by number"):
        refused(tmp_path, target_dataset=iter(examples(2)))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor is not known"),
        ({}, {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func reduces"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel"),
    ],
)
def test_losses_that_are_not_known_for_single_candidates(
    args: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        refused(tmp_path, args=args, **options)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_deepspeed_enabled", True, "DeepSpeed builds its own optimizer"),
        ("is_fsdp_enabled", True, "FSDP keeps only shards"),
        ("accelerator.state.num_processes", 2, "there are 2 processes"),
        ("args._n_gpu", 2, "nn.DataParallel would copy"),
    ],
)
def test_more_than_one_process(
    attribute: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainer would find itself at the end of its constructor; no second process or GPU is here."""
    real = Trainer.__init__

    def pretended(self: Trainer, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        *path, last = attribute.split(".")
        owner: Any = self
        for part in path:
            owner = getattr(owner, part)
        if last == "num_processes":
            monkeypatch.setattr(type(self.accelerator), "num_processes", property(lambda _: value))
        else:
            monkeypatch.setattr(owner, last, value, raising=False)

    monkeypatch.setattr(Trainer, "__init__", pretended)
    with pytest.raises(NotImplementedError, match=message):
        refused(tmp_path)


def test_a_load_balancing_loss(tmp_path: Path) -> None:
    net = model("mixtral", num_local_experts=2, output_router_logits=True)
    with pytest.raises(NotImplementedError, match="load-balancing loss"):
        refused(tmp_path, net=net)


def test_micro_batches_that_are_averaged_cannot_be_put_together(tmp_path: Path) -> None:
    net = model()
    net.accepts_loss_kwargs = False  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="divides its loss by each micro-batch's own labels"):
        refused(tmp_path, net=net, selective={"combine": "rerun"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
def test_models_with_positions_of_their_own(tmp_path: Path) -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    net = peft.get_peft_model(model(), config)
    with pytest.raises(ValueError, match="such as virtual tokens, are not known"):
        refused(tmp_path, net=net).train()


def test_another_loss_than_that_of_the_next_token(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model("qwen3", hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=43)
    net = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(NotImplementedError, match="override position_losses"):
        refused(tmp_path, net=net)


class Classifying(SelectiveTrainer):
    """Rows with one label each."""

    def position_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = inputs.pop("labels")
        losses = nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="none")
        return losses[:, None], torch.ones(len(losses), 1, dtype=torch.bool)


class Masked(SelectiveTrainer):
    """Labels of the positions that they stand at."""

    def position_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = inputs.pop("labels")
        scores = model(**inputs).logits
        return nn.functional.cross_entropy(scores.mT, labels, reduction="none"), labels != -100


@pytest.mark.parametrize("kind", [Classifying, Masked])
def test_another_loss_of_ones_own(kind: type[SelectiveTrainer], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}

    def build() -> nn.Module:
        torch.manual_seed(0)
        if kind is Masked:
            still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=43, **size, **still))  # type: ignore[no-any-return]
        config = AutoConfig.for_model("qwen3", vocab_size=43, num_key_value_heads=1, pad_token_id=0, **size)
        return AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-any-return]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = padded(rows)
        return batch if kind is Masked else {**batch, "labels": batch["input_ids"][:, 0] % 2}

    def run(of: type[Trainer], **options: Any) -> Watch:
        watch = Watch()
        of(
            build(),
            # One batch a window: the classifiers of Transformers do not divide by those of a window.
            arguments(tmp_path, gradient_accumulation_steps=1, per_device_train_batch_size=6),
            data_collator=collate,
            train_dataset=examples(15),
            callbacks=[watch],
            **options,
        ).train()
        return watch

    watch, seen = run(Trainer), run(kind, target_dataset=examples(4, seed=1), selective=ALL)
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)


def test_a_loss_that_was_changed_is_noticed_before_the_first_step(tmp_path: Path) -> None:
    class Halved(SelectiveTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) / 2

    trainer = Halved(
        model(), arguments(tmp_path), data_collator=padded, train_dataset=examples(4), target_dataset=examples(2)
    )
    with pytest.raises(RuntimeError, match="trainer's own loss as their mean"):
        trainer.train()
    assert trainer.selective_optimizer is not None
    assert trainer.selective_optimizer.selection is None


def test_an_optimizer_that_is_wrapped_already(tmp_path: Path) -> None:
    net = model()
    wrapped = SelectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, lambda: torch.zeros(1))
    trainer = refused(tmp_path, net=net, optimizers=(wrapped, None))
    with pytest.raises(ValueError, match="pass the one inside"):
        trainer.train()


def test_targets_without_labels_are_an_error(tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in examples(3)]
    with pytest.raises(ValueError, match="Expected target examples with labels"):
        refused(tmp_path, target_dataset=rows).train()


def test_batches_without_labels_are_an_error(tmp_path: Path) -> None:
    trainer = refused(tmp_path)
    trainer.data_collator = lambda rows: {"input_ids": torch.tensor([rows[0]["input_ids"]])}
    with pytest.raises(ValueError, match="Expected batches with labels"):
        trainer.train()


def test_a_column_for_the_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="Expected a column 'number'"):
        refused(tmp_path, selection_log=Recording(), sample_id_column="number").train()
