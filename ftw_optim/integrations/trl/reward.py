"""Selection in the training of reward models of TRL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from trl.trainer.reward_trainer import RewardTrainer

from ftw_optim.integrations.trl.preferences import PreferenceTrainerMixin


class SelectiveRewardTrainer(PreferenceTrainerMixin, RewardTrainer):
    """The reward trainer of TRL with selection; see :class:`SelectiveTrainerMixin`.

    A candidate is a pair, and so is a target example: ``target_dataset`` is prepared like ``train_dataset``.
    """

    def candidate_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """See :meth:`PreferenceTrainerMixin.candidate_losses`."""
        settings: Any = self.args
        margin = inputs.pop("margin", None)
        inputs["use_cache"] = False
        with self.compute_loss_context_manager():
            rewards = model(**inputs).logits.squeeze(-1)
        chosen, rejected = rewards.chunk(2)
        losses = functional.softplus(rejected - chosen + (0 if margin is None else margin))
        if settings.center_rewards_coefficient is not None:
            losses = losses + settings.center_rewards_coefficient * (chosen + rejected).square()
        self._last_batch = (rewards.detach(), inputs["attention_mask"].sum())
        return losses

    def _note_batch(self) -> None:
        """Note the metrics of a micro-batch, with one synchronisation."""
        rewards, seen = self._last_batch
        chosen, rejected = rewards.chunk(2)
        found = {
            "min_reward": rewards.min(),
            "mean_reward": rewards.mean(),
            "max_reward": rewards.max(),
            "accuracy": (chosen > rejected).double().mean(),
            "margin": (chosen - rejected).mean(),
        }
        *told, tokens = torch.stack([one.double() for one in (*found.values(), seen)]).tolist()
        self._note_metrics(dict(zip(found, told, strict=True)), tokens=int(tokens))
