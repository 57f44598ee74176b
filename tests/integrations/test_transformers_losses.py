"""The trainer of Transformers with selection and a loss of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from ftw_optim.integrations.transformers import SelectiveTrainer
from tests.support.trainer_runs import ALL, Watch, arguments, examples, model, padded


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


@pytest.mark.slow
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
