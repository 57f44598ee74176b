"""Trainers with a training step or a loss of their own, with selection: honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from ftw_optim.integrations.transformers import SelectiveTrainer, SelectiveTrainerMixin
from ftw_optim.integrations.trl import SelectiveSFTTrainer
from tests.support.trainer_runs import ALL, Watch, arguments, examples, model, padded


class Counting(Trainer):
    """A training step around the trainer's own."""

    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        return super().training_step(*args, **kwargs)


class Alone(Trainer):
    """A training step that knows nothing of another."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any) -> torch.Tensor:
        loss: torch.Tensor = model(**inputs).loss
        loss.backward()
        return loss.detach()


def run(kind: type[Trainer], path: Path, net: nn.Module | None = None, **options: Any) -> tuple[Trainer, Watch]:
    watch = Watch()
    more = {"target_dataset": examples(4, seed=1), "selective": ALL} if issubclass(kind, SelectiveTrainerMixin) else {}
    trainer = kind(
        model() if net is None else net,
        arguments(path),
        data_collator=padded,
        train_dataset=examples(15),
        callbacks=[watch],
        **{**more, **options},
    )
    trainer.train()
    return trainer, watch


# ---------------------------------------------------------------------- training steps


@pytest.mark.slow
def test_a_training_step_around_the_selective_one_is_called(tmp_path: Path) -> None:
    class Ours(Counting, SelectiveTrainer):
        pass

    (own, watch), (ours, seen) = run(Counting, tmp_path), run(Ours, tmp_path)
    assert isinstance(own, Counting)
    assert isinstance(ours, Counting)
    assert ours.steps == own.steps > len(watch.parameters)
    torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("base", [Counting, Alone])
def test_a_training_step_that_the_selective_one_hides(base: type[Trainer]) -> None:
    with pytest.raises(TypeError, match=rf"Ours would never call {base.__name__}\.training_step"):
        type("Ours", (SelectiveTrainerMixin, base), {})


@pytest.mark.parametrize("bases", [(Alone, SelectiveTrainer), (Trainer, SelectiveTrainerMixin)])
def test_a_training_step_that_hides_the_selective_one(bases: tuple[type, ...]) -> None:
    with pytest.raises(TypeError, match=rf"{bases[0].__name__}\.training_step hides it"):
        type("Ours", bases, {})


@pytest.mark.parametrize("kind", [SelectiveTrainer, SelectiveSFTTrainer])
def test_a_training_step_in_the_class_itself(kind: type) -> None:
    with pytest.raises(TypeError, match=r"Ours\.training_step hides it"):
        type("Ours", (kind,), {"training_step": Alone.__dict__["training_step"]})


def test_a_training_step_that_only_mentions_the_selective_one_is_noticed_before_the_first_step(tmp_path: Path) -> None:
    class Ours(SelectiveTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
            if not inputs:
                return super().training_step(model, inputs, *args)
            loss: torch.Tensor = model(**inputs).loss
            loss.backward()
            return loss.detach()

    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Ours\.training_step to call super\(\)\.training_step"):
        run(Ours, tmp_path, net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def _without_a_name(step: Any) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, *args, **kwargs)

    return wrapper


@pytest.mark.slow
def test_a_training_step_that_goes_on_by_a_detour_is_taken(tmp_path: Path) -> None:
    class Decorated(SelectiveTrainer):
        @_without_a_name
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().training_step(*args, **kwargs)

    class Delegating(SelectiveTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self._go(*args, **kwargs)

        def _go(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().training_step(*args, **kwargs)

    _, watch = run(Trainer, tmp_path)
    for kind in (Decorated, Delegating):
        _, seen = run(kind, tmp_path)
        torch.testing.assert_close(seen.parameters, watch.parameters, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("change", ["left out", "doubled", "labels masked"])
def test_a_training_step_that_changes_what_is_counted(change: str, tmp_path: Path) -> None:
    class Ours(SelectiveTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], number: Any = None) -> torch.Tensor:
            if change == "left out":
                return super().training_step(model, inputs)
            if change == "doubled":
                return super().training_step(model, inputs, 2 * number)
            labels = inputs["labels"].clone()
            labels[:, :3] = -100
            return super().training_step(model, {**inputs, "labels": labels}, number)

    with pytest.raises(RuntimeError, match="to be called with num_items_in_batch="):
        run(Ours, tmp_path)


def test_an_optimizer_that_the_trainer_never_wraps(tmp_path: Path) -> None:
    class Ours(SelectiveTrainer):
        def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
            assert self.model is not None
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
            return self.optimizer

    with pytest.raises(RuntimeError, match=r"Ours\.create_optimizer to call super\(\)\.create_optimizer"):
        run(Ours, tmp_path)


def test_other_trainers_of_the_framework_are_taken() -> None:
    type("Ours", (SelectiveTrainerMixin, Seq2SeqTrainer), {})


# ---------------------------------------------------------------------- losses


def _adding(term: float, *, when: Any) -> type[SelectiveTrainer]:
    class Adding(SelectiveTrainer):
        calls = 0

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + term if when(self, model) else loss

    return Adding


@pytest.mark.parametrize("mode", [True, False])
def test_a_term_that_the_loss_has_in_one_mode_alone(mode: bool, tmp_path: Path) -> None:
    kind = _adding(0.01, when=lambda trainer, model: model.training is mode)
    message = "in training mode, " if mode else r"as their mean, \d"
    with pytest.raises(RuntimeError, match=message):
        run(kind, tmp_path)


def test_a_term_that_the_model_adds_in_training(tmp_path: Path) -> None:
    net = model()

    def penalised(module: nn.Module, args: Any, output: Any) -> Any:
        if module.training and output.loss is not None:
            output.loss = output.loss + 0.01 + output.logits.square().mean()
        return output

    net.register_forward_hook(penalised)
    with pytest.raises(RuntimeError, match="in training mode, "):
        run(SelectiveTrainer, tmp_path, net)


@pytest.mark.slow
def test_a_loss_that_does_not_hand_on_the_number_of_labels(tmp_path: Path) -> None:
    """The trainer's own step is then that of the means of micro-batches, and not that of all tokens."""

    class Ours(SelectiveTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs)

    with pytest.raises(RuntimeError, match="to divide by num_items_in_batch"):
        run(Ours, tmp_path)


@pytest.mark.slow
def test_a_term_that_is_nothing_at_first(tmp_path: Path) -> None:
    """A distance from where the model began: by default it is seen at the second window."""

    class Anchored(SelectiveTrainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            weight = model.get_input_embeddings().weight  # type: ignore[operator]
            if not hasattr(self, "start"):
                self.start = weight.detach().clone()
            return super().compute_loss(model, *args, **kwargs) + 10 * (weight - self.start).square().sum()

    with pytest.raises(RuntimeError, match="as their mean"):
        run(Anchored, tmp_path)


@pytest.mark.slow
def test_a_term_that_comes_in_mid_run(tmp_path: Path) -> None:
    """By the same rhythm as the self-check; without a loss of one's own nothing is compared again."""
    late = _adding(0.01, when=lambda trainer, model: trainer.state.global_step >= 3)
    with pytest.raises(RuntimeError, match="as their mean"):
        run(late, tmp_path, selective={**ALL, "self_check": 2})
    run(late, tmp_path, selective={**ALL, "self_check": "first"})
    run(late, tmp_path, selective={**ALL, "self_check": False})


@pytest.mark.slow
@pytest.mark.parametrize("check", ["first", 2, False])
def test_how_often_a_loss_of_ones_own_is_compared(check: int | str, tmp_path: Path) -> None:
    kind = _adding(0.0, when=lambda trainer, model: False)
    trainer, watch = run(kind, tmp_path, selective={**ALL, "self_check": check})
    assert len(watch.parameters) == 6
    # At the first window; the second, third and fifth: by doubling, and by every second.
    compared = {"first": 1, 2: 4, False: 0}[check]
    assert trainer.calls == 4 * compared  # type: ignore[attr-defined]  # both modes, and whether the number counts


@pytest.mark.slow
def test_dropout_and_counters_do_not_disturb_the_comparison(tmp_path: Path) -> None:
    """The same masks for both losses; what a model counts in training is as without the comparison."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))
            self.passes: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.passes += 1
            return nn.functional.dropout(x, 0.3, self.training)

    def build() -> nn.Module:
        net = model(attention_dropout=0.2)
        net.model.norm = nn.Sequential(net.model.norm, Counter())  # type: ignore[union-attr, assignment]
        return net

    counts = []
    for check in ("first", False):
        net = build()
        run(SelectiveTrainer, tmp_path, net, selective={**ALL, "self_check": check})
        counts.append(float(net.model.norm[1].passes))  # type: ignore[index, union-attr, arg-type]
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_a_model_that_cannot_be_repeated_is_compared_in_evaluation_alone(tmp_path: Path) -> None:
    net, passes = model(), []

    def noisy(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return output * (1 + 0.1 * len(passes)) if module.training else output

    net.model.norm.register_forward_hook(noisy)  # type: ignore[union-attr, operator]
    run(SelectiveTrainer, tmp_path, net, selective={**ALL, "self_check": "first"})
