"""What the trainer of Transformers with selection refuses, and what it says then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from ftw_optim import SelectiveOptimizer
from ftw_optim.integrations.transformers import SelectiveTrainer
from tests.support.trainer_runs import Recording, arguments, examples, model, padded


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
    with pytest.raises(NotImplementedError, match="divided by each micro-batch's own labels"):
        refused(tmp_path, net=net, selective={"combine": "rerun"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens(kind: str, tmp_path: Path) -> None:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    net = peft.get_peft_model(model(), config)
    with pytest.raises(NotImplementedError, match="puts 2 virtual tokens in front of each row"):
        refused(tmp_path, net=net)


def test_another_loss_than_that_of_the_next_token(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model("qwen3", hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=43)
    net = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(NotImplementedError, match="override position_losses"):
        refused(tmp_path, net=net)


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
