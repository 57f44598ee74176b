"""Tiny pairs, models and trainers of preferences and rewards, with their losses one pair at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from ftw_optim.integrations.trl import SelectiveDPOTrainer, SelectiveRewardTrainer
from tests.support.trainer_runs import ARGUMENTS, HARD, WORDS, Alone, Watch, model, tokenizer


def preferences(count: int, *, seed: int = 0, margins: bool = False) -> list[dict[str, Any]]:
    """Pairs of answers of different lengths to prompts, as texts."""
    generator = torch.Generator().manual_seed(seed)

    def text(least: int, most: int) -> str:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        words = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[number] for number in words)

    pairs: list[dict[str, Any]] = [
        {"prompt": text(1, 3), "chosen": " " + text(1, 6), "rejected": " " + text(1, 6)} for _ in range(count)
    ]
    if margins:
        pairs = [{**pair, "margin": 0.1 * number} for number, pair in enumerate(pairs)]
    return pairs


def tokens_of(pair: dict[str, Any], side: str) -> tuple[Tensor, int]:
    """The tokens of a prompt and an answer with its end, ``(1, t)``, and how many of them are the prompt's."""
    words = tokenizer()
    prompt = words(pair["prompt"])["input_ids"]
    ids = [*prompt, *words(pair[side])["input_ids"], words.eos_token_id]
    return torch.tensor([ids]), len(prompt)


def policy() -> nn.Module:
    return model("llama")


def reference() -> nn.Module:
    """A model that differs from the policy, so that losses do not begin at the same number."""
    net = policy()
    generator = torch.Generator().manual_seed(5)
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


def reward_model() -> nn.Module:
    config = policy().config
    settings = {**config.to_dict(), "num_labels": 1}  # type: ignore[operator, union-attr]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(  # type: ignore[no-any-return]
            AutoConfig.for_model(**settings)
        )


def answer_log_prob(net: nn.Module, pair: dict[str, Any], side: str) -> Tensor:
    """The log-probability of an answer, run by itself without padding."""
    ids, prompt = tokens_of(pair, side)
    log_probs = net(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    found: Tensor = log_probs.gather(1, ids[0, 1:, None])[prompt - 1 :].sum()
    return found


def dpo_loss(net: nn.Module, pair: dict[str, Any], beta: float = 0.1) -> Tensor:
    """The sigmoid loss of a pair; the reference is the model without its adapters, or :func:`reference`."""
    with torch.no_grad():
        if isinstance(net, peft.PeftModel):
            with net.disable_adapter():
                known = [answer_log_prob(net, pair, side) for side in ("chosen", "rejected")]
        else:
            other = reference().to(next(net.parameters()))
            known = [answer_log_prob(other, pair, side) for side in ("chosen", "rejected")]
    chosen, rejected = (answer_log_prob(net, pair, side) for side in ("chosen", "rejected"))
    return -functional.logsigmoid(beta * ((chosen - known[0]) - (rejected - known[1])))


def reward_loss(net: nn.Module, pair: dict[str, Any]) -> Tensor:
    chosen, rejected = (net(input_ids=tokens_of(pair, side)[0]).logits[0, 0] for side in ("chosen", "rejected"))
    return -functional.logsigmoid(chosen - rejected - pair.get("margin", 0.0))


def pairs_alone(loss: Callable[[nn.Module, dict[str, Any]], Tensor]) -> Callable[..., Alone]:
    """A function that gives losses and gradients one pair at a time."""

    def found(net: nn.Module, pairs: Sequence[dict[str, Any]]) -> Alone:
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        losses, gradients = [], []
        for pair in pairs:
            value = loss(net, pair)
            each = torch.autograd.grad(value, list(trained.values()), materialize_grads=True, allow_unused=True)
            losses.append(value.detach())
            gradients.append(dict(zip(trained, each, strict=True)))
        return torch.stack(losses), gradients

    return found


@dataclass(frozen=True)
class Kind:
    """A trainer of TRL, the same with selection, and what both are tested with."""

    own: Any
    selective: Any
    config: Any
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    margins: bool = False
    head: tuple[str, ...] = ()
    """Modules that are trained whole beside adapters."""

    def pairs(self, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
        return preferences(count, seed=seed, margins=self.margins)

    def lora(self, **options: Any) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            modules_to_save=list(self.head) or None,
            task_type="SEQ_CLS" if self.head else "CAUSAL_LM",
            **options,
        )

    def trained(
        self,
        kind: Any,
        path: Path,
        settings: dict[str, Any],
        *,
        net: nn.Module | None = None,
        rows: Any = None,
        callbacks: tuple[Any, ...] = (),
        start: Callable[[Any], Any] = lambda trainer: trainer.train(),
        **options: Any,
    ) -> tuple[Any, Watch]:
        """A trainer after its run, and what was seen of its steps."""
        watch = Watch()
        if self.own is DPOTrainer and not options.get("peft_config"):
            options = {"ref_model": reference(), **options}
        trainer = kind(
            self.build() if net is None else net,
            args=self.config(str(path), **{**ARGUMENTS, **HARD, **settings}),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list(self.pairs(15) if rows is None else rows),
            callbacks=[watch, *callbacks],
            **options,
        )
        start(trainer)
        return trainer, watch


KINDS = {
    "dpo": Kind(DPOTrainer, SelectiveDPOTrainer, DPOConfig, policy, dpo_loss),
    "reward": Kind(
        RewardTrainer, SelectiveRewardTrainer, RewardConfig, reward_model, reward_loss, margins=True, head=("score",)
    ),
}
