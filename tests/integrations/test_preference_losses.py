"""Losses of pairs beside TRL's own, and the settings under which a pair has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw_optim.integrations._trainers.micro_batch import MicroBatch
from ftw_optim.integrations._trainers.preference_losses import COUPLED, LOSSES, SCORES, shared_length_weights
from tests.support.preference_runs import KINDS
from tests.support.releases import knows_pairs

pytestmark = [
    knows_pairs,
    pytest.mark.filterwarnings(
        "ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning",
        "ignore:.*padding_free=True.*",
    ),
]


def built(path: Path, changes: dict[str, Any], *, name: str = "dpo", **options: Any) -> Any:
    """A trainer that has not trained."""
    kind = KINDS[name]
    trainer, _ = kind.trained(
        kind.selective, path, changes, start=lambda trainer: None, target_dataset=kind.pairs(3, seed=1), **options
    )
    return trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("dpo"), {"use_weighting": True}, peft_config=KINDS["dpo"].lora())


@pytest.fixture
def restored(trainer: Any) -> Iterator[Any]:
    held = dict(vars(trainer.args)), trainer.loss_types, trainer.loss_weights
    yield trainer
    vars(trainer.args).update(held[0])
    trainer.loss_types, trainer.loss_weights = held[1:]
    for name in ("label_smoothing", "beta", "f_divergence_type", "ld_alpha", "use_weighting"):
        setattr(trainer, name, held[0][name])


COMBINATIONS: list[dict[str, Any]] = [
    *({"loss_type": [kind], "label_smoothing": 0.2, "beta": 0.7} for kind in LOSSES),
    *(
        {"loss_type": [kind], "f_divergence_type": score}
        for kind in ("sigmoid", "ipo")
        for score in SCORES
        if score != "reverse_kl"
    ),
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    {"loss_type": ["hinge", "apo_zero"], "use_weighting": True},
]


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda one: "-".join(map(str, one.values())))
def test_the_mean_over_pairs_is_trls_own_loss(restored: Any, changes: dict[str, Any]) -> None:
    trainer = restored
    changes = {"use_weighting": False, "loss_weights": None, **changes}
    for name, value in changes.items():
        setattr(trainer.args, name, value)
        setattr(trainer, {"loss_type": "loss_types"}.get(name, name), value)
    trainer.loss_weights = changes["loss_weights"] or [1.0] * len(changes["loss_type"])
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[number] for number in range(7)]))
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, dict(batch))
        pairs = trainer._prepared_micro_batch(batch)
        losses = trainer.candidate_losses(trainer.model, dict(pairs.inputs))
        some = trainer.candidate_losses(trainer.model, pairs.rows(torch.tensor([4, 1])))
    assert losses.shape == (7,)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some, losses[[4, 1]], rtol=1e-5, atol=1e-6)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_tokens_behind_the_shared_length_count_less(lengths: list[tuple[int, int]], alpha: float) -> None:
    sizes = [first for first, _ in lengths] + [second for _, second in lengths]
    starts = [number % 3 for number in range(len(sizes))]
    mask = torch.zeros(len(sizes), 9, dtype=torch.int64)
    for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        mask[row, start : start + size] = 1
    found = shared_length_weights(mask, alpha) * mask
    for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        shared = min(lengths[row % len(lengths)])
        expected = [1.0] * shared + [alpha] * (size - shared)
        torch.testing.assert_close(found[row, start : start + size], torch.tensor(expected), check_dtype=False)
    assert bool((shared_length_weights(mask, None) == 1).all())


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"loss_type": [kind]}, f'loss_type="{kind}" sorts the log-ratios') for kind in COUPLED),
        ({"loss_type": ["sigmoid", "unheard"]}, 'loss_type="unheard" is not known: use one of sigmoid'),
        ({"padding_free": True}, "padding_free=True is not known for pairs"),
        ({"sync_ref_model": True}, "sync_ref_model changes the reference"),
        ({"activation_offloading": True}, "activation_offloading does not know"),
        ({"padding_free": True, "sync_ref_model": True}, "padding_free.*; sync_ref_model"),
    ],
)
def test_settings_of_trl_that_pairs_do_not_allow(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=message):
        built(tmp_path, changes)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("changes", "selective", "message"),
    [
        ({}, {"proposal": "similarity"}, "a proposal reads input_ids, which pairs do not have"),
        ({"gradient_accumulation_steps": 2}, {"combine": "rerun"}, "which cannot be told apart in the one batch"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor is not known"),
    ],
)
def test_options_that_pairs_do_not_allow(
    name: str, changes: dict[str, Any], selective: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        built(tmp_path, changes, name=name, selective=selective)


def test_virtual_tokens_in_front_of_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="puts 3 virtual tokens in front of each row"):
        built(tmp_path, {}, peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def test_batches_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_ids of shape \(2 b, t\).*got \(3, 4\)"):
        MicroBatch.of_pairs({"input_ids": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"got the keys \['labels'\]"):
        MicroBatch.of_pairs({"labels": torch.zeros(4, 4)})
