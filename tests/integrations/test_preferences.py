"""The DPO and reward trainers of TRL with selection: their own runs where nothing is left out, and the oracle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset

from ftw_optim import GreedyFilter, KeepAll, NonNegativeLeastSquares
from tests.support.grids import slow
from tests.support.models import precision
from tests.support.preference_runs import KINDS, pairs_alone, reference
from tests.support.releases import knows_pairs
from tests.support.trainer_runs import (
    ALL,
    Recording,
    check_a_killed_run_goes_on,
    check_against_samples_alone,
    logged,
    numbered,
)

pytestmark = [
    knows_pairs,
    # What TRL sets by default and PEFT asks of a model, under names that Transformers has changed.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning"),
]
METRICS = {
    "dpo": [
        "entropy",
        "mean_token_accuracy",
        *(f"{name}/{side}" for name in ("logits", "logps", "rewards") for side in ("chosen", "rejected")),
        "rewards/accuracies",
        "rewards/margins",
    ],
    "reward": ["min_reward", "mean_reward", "max_reward", "accuracy", "margin"],
}


@pytest.mark.parametrize(
    ("name", "settings", "options", "lora"),
    [
        ("dpo", {}, {}, True),
        slow("dpo", {}, {}, False),
        slow("dpo", {"gradient_accumulation_steps": 1}, {"selective": {**ALL, "combine": "rerun"}}, False),
        slow("dpo", {}, {"selective": {**ALL, "combine": "graph"}}, True),
        slow("dpo", {"precompute_ref_log_probs": True}, {}, False),
        slow("dpo", {"precompute_ref_log_probs": True}, {}, True),
        slow("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {}, True),
        slow("dpo", {"use_weighting": True, "ld_alpha": 0.3, "f_divergence_type": "js_divergence"}, {}, False),
        slow("dpo", {"use_weighting": True, "activation_checkpointing": False}, {}, True),
        slow("reward", {}, {}, False),
        slow("reward", {"center_rewards_coefficient": 0.1}, {}, True),
    ],
)
def test_all_pairs_alike_are_the_trainers_own_run(
    name: str, settings: dict[str, Any], options: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    """Step by step: parameters and all that is logged, with decay, clipping, a schedule, checkpointing, short ends."""
    kind = KINDS[name]
    shared = {"peft_config": kind.lora()} if lora else {}
    own, watch = kind.trained(kind.own, tmp_path, settings, **shared)
    ours, seen = kind.trained(
        kind.selective,
        tmp_path,
        settings,
        target_dataset=kind.pairs(5, seed=1),
        **shared,
        **{"selective": ALL, **options},
    )
    assert len(watch.parameters) > 3
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)
    names = ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens", *METRICS[name])
    torch.testing.assert_close(logged(ours, *names), logged(own, *names), rtol=2e-5, atol=2e-6)
    assert set(own.state.log_history[0]) == {*names, "step"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"precompute_ref_log_probs": True, "disable_dropout": False}],
    ids=["each step", "computed before, with dropout"],
)
def test_adapters_that_a_run_begins_with_are_its_reference(settings: dict[str, Any], tmp_path: Path) -> None:
    """TRL keeps a copy of them beside the trained ones, and switches to it for the reference."""
    kind, found = KINDS["dpo"], []

    def adapted() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return peft.get_peft_model(kind.build(), kind.lora(lora_dropout=0.2))  # type: ignore[arg-type]

    changes = {"activation_checkpointing": False, **settings}
    for one, options in ((kind.own, {}), (kind.selective, {"selective": ALL, "target_dataset": kind.pairs(5, seed=1)})):
        trainer, watch = kind.trained(one, tmp_path, changes, net=adapted(), ref_model=None, **options)
        found.append(([row["loss"] for row in trainer.state.log_history if "loss" in row], watch.parameters))
        assert "ref" in trainer.model.peft_config
    # With dropout in the reference the losses are still TRL's: they are compared in the run.
    dropped = {**changes, "disable_dropout": False, "max_steps": 2}
    kind.trained(kind.selective, tmp_path, dropped, net=adapted(), ref_model=None, target_dataset=kind.pairs(5, seed=1))
    (expected, parameters), (losses, seen) = found
    torch.testing.assert_close(seen, parameters, rtol=1e-5, atol=2e-6)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_evaluation_within_a_run_of_pairs_is_the_trainers_own(name: str, tmp_path: Path) -> None:
    kind, found = KINDS[name], []
    held = Dataset.from_list(kind.pairs(4, seed=3))
    for one, options in ((kind.own, {}), (kind.selective, {"selective": ALL, "target_dataset": kind.pairs(5, seed=1)})):
        trainer, _ = kind.trained(
            one,
            tmp_path,
            {"eval_strategy": "steps", "eval_steps": 2},
            eval_dataset=held,
            peft_config=kind.lora(),
            **options,
        )
        found.append([row for row in trainer.state.log_history if "eval_loss" in row])
        assert len(found[-1]) == 3
    for own, ours in zip(*found, strict=True):
        assert own.keys() == ours.keys()
        for key in own.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert ours[key] == pytest.approx(own[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("name", "selective", "lora"),
    [
        ("dpo", {}, False),
        slow("dpo", {"combine": "graph"}, False),
        slow("dpo", {}, True),
        slow("reward", {}, False),
        slow("reward", {"combine": "factors"}, True),
    ],
)
def test_the_trainer_sees_the_weighted_gradients_of_pairs_alone(
    name: str, selective: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    """Gram matrix, products with the target and ``.grad`` of several micro-batches, against pairs without padding."""
    kind, recording = KINDS[name], Recording()
    rows, targets = numbered(kind.pairs(10)), kind.pairs(4, seed=1)
    shared = {"peft_config": kind.lora()} if lora else {}
    with precision(torch.float64):
        options = {"ref_model": reference().double()} if name == "dpo" and not lora else {}
        trainer, watch = kind.trained(
            kind.selective,
            tmp_path,
            {
                "max_grad_norm": 0.0,
                "learning_rate": 1e-3,
                "num_train_epochs": 1,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 2,
                "activation_checkpointing": False,
            },
            net=kind.build().double(),
            rows=rows,
            target_dataset=targets,
            target_batch_size=4,
            selective={"filter": GreedyFilter(keep=2), "metric": "euclidean", **selective},
            sample_weighting="token_mean",
            selection_log=recording,
            sample_id_column="number",
            source_column="origin",
            **shared,
            **options,
        )
        before = kind.build().double()
        if lora:
            torch.manual_seed(trainer.args.seed)  # as the trainer does before it adds the adapter
            before = peft.get_peft_model(before, kind.lora())  # type: ignore[arg-type]
        check_against_samples_alone(
            before.eval(),
            watch,
            recording,
            lambda ids: [rows[number] for number in ids],
            lambda _: targets,
            pairs_alone(kind.loss),
            tolerance=1e-5 if lora and name == "dpo" else 1e-9,  # a fused output layer always computes in float32
        )
    assert [step["sources"] for step in recording.steps] == [
        [f"source {number % 3}" for number in step["ids"]] for step in recording.steps
    ]


@pytest.mark.parametrize("name", [slow("dpo"), slow("reward")])
def test_target_pairs_may_take_part(name: str, tmp_path: Path) -> None:
    """Some guide, others are trained on as pairs, and held-out ones are looked at."""
    kind, recording = KINDS[name], Recording()
    kind.trained(
        kind.selective,
        tmp_path,
        {},
        target_dataset=kind.pairs(6, seed=1),
        held_out_dataset=kind.pairs(5, seed=2),
        target_batch_size=3,
        guide_share=0.5,
        selective={"filter": KeepAll(), "weight": NonNegativeLeastSquares(anchor=0.3)},
        selection_log=recording,
        peft_config=kind.lora(),
    )
    selections = [step["selection"] for step in recording.steps]
    assert all(len(one.target_losses) == 3 for one in selections)
    assert any(one.target_weights.any() for one in selections)
    assert all(torch.isfinite(torch.tensor(one.held_out_loss)) for one in selections)


@pytest.mark.parametrize("name", [slow("dpo"), slow("reward")])
def test_a_run_of_pairs_that_was_killed_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]

    def run(folder: str, recording: Recording, **options: Any) -> Any:
        return kind.trained(
            kind.selective,
            tmp_path / folder,
            {"save_strategy": "steps", "save_steps": 2, "disable_dropout": False},
            target_dataset=kind.pairs(5, seed=1),
            target_batch_size=2,
            selective={"filter": GreedyFilter(keep=2)},
            peft_config=kind.lora(lora_dropout=0.2),
            selection_log=recording,
            **options,
        )[0]

    check_a_killed_run_goes_on(run)
