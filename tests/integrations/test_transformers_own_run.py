"""The trainer of Transformers where nothing is left out: its own run, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from ftw_optim.integrations.transformers import SelectiveTrainer, SelectiveTrainerMixin
from tests.support.grids import slow
from tests.support.releases import OLDER
from tests.support.trainer_runs import ALL, Watch, arguments, examples, logged, lora_model, model, padded, trained


@OLDER
@pytest.mark.parametrize(
    ("build", "settings", "selective"),
    [
        slow(model, {}, {}),
        slow(lambda: model("llama", tie_word_embeddings=True), {}, {"combine": "graph"}),
        slow(lambda: model(attention_dropout=0.2), {"activation_checkpointing": True}, {}),
        slow(lambda: model(attention_dropout=0.2), {"optim": "sgd", "max_grad_norm": 0.0}, {"combine": "graph"}),
        slow(lambda: lora_model(lora_dropout=0.2), {}, {}),
        (lambda: lora_model(lora_dropout=0.2), {"activation_checkpointing": True}, {"combine": "graph"}),
        slow(model, {}, {"combine": "rerun"}),
        slow(model, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 5}, {}),
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
