"""Selection in the preference training (DPO) of TRL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from trl.trainer.dpo_trainer import DPOTrainer

from ftw_optim._step.losses import IGNORED, shifted_labels
from ftw_optim.integrations._trainers.micro_batch import MicroBatch
from ftw_optim.integrations._trainers.preference_losses import preference_losses, shared_length_weights
from ftw_optim.integrations._trainers.preference_refusals import refuse_preference_settings
from ftw_optim.integrations.trl.preferences import PreferenceTrainerMixin
from ftw_optim.integrations.trl.token_values import TokenValues

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
"""Keys of the log-probabilities under the reference, ``(b,)``, as TRL's collator writes them."""
MEAN_TOKENS = "chosen_tokens"
"""Key of the mean number of tokens of the chosen answers of a batch, ``(b,)``, where what is computed once is known."""


class SelectiveDPOTrainer(PreferenceTrainerMixin, DPOTrainer):
    """The DPO trainer of TRL with selection; see :class:`SelectiveTrainerMixin`.

    A candidate is a pair, and so is a target example: ``target_dataset`` is prepared like ``train_dataset``, with its
    log-probabilities under the reference where ``precompute_ref_log_probs`` asks for these. The reference is TRL's: a
    model, the adapters that a run began with, or the model without its adapters. Its log-probabilities are computed
    once for each micro-batch, before the pairs pass through the model.

    Where the output layer is not trained, as under LoRA, it runs fused with the loss; where it is trained, it must be
    captured, and the logits of the answers' positions are formed.
    """

    def candidate_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """See :meth:`PreferenceTrainerMixin.candidate_losses`."""
        settings: Any = self.args
        # Where nothing was prepared, losses are compared with TRL's: its reference runs after the policy, in its mode.
        given, is_prepared = dict(inputs), MEAN_TOKENS in inputs
        mask, known = inputs.pop("completion_mask"), [inputs.pop(key, None) for key in REFERENCE]
        tokens = inputs.pop(MEAN_TOKENS, _mean_tokens(mask))
        labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED)
        inputs["use_cache"] = False
        seen = inputs["attention_mask"].sum()
        values, counted = self._token_values(model, inputs, labels), mask[:, 1:]
        each = values.log_probs * shared_length_weights(counted, settings.ld_alpha)
        log_probs = each.sum(dim=1)
        reference = known if is_prepared or self.precompute_ref_logps else self._reference(given)
        chosen, rejected = (log_probs - torch.cat(reference).to(log_probs)).chunk(2)
        first, second = mask.sum(dim=1).chunk(2)
        losses = preference_losses(
            chosen,
            rejected,
            lengths=(first, second),
            chosen_nll=-values.log_probs.chunk(2)[0].sum(dim=1) / tokens,
            settings=settings,
        )
        if settings.use_weighting:
            losses = losses * torch.stack(values.likelihoods(counted).chunk(2)).prod(0)
        self._last_batch = (values.detached(), counted, log_probs.detach(), chosen.detach(), rejected.detach(), seen)
        return losses

    def _token_values(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> TokenValues:
        head = self.model.get_output_embeddings()  # type: ignore[operator, union-attr]
        if any(parameter.requires_grad for parameter in head.parameters()):
            found = self._label_logits(model, inputs, shifted_labels(labels))
            return TokenValues.of_logits(found, squares=self.use_weighting)
        with self.compute_loss_context_manager():
            return TokenValues.of_fused(model(**inputs, labels=labels, fused_lm_head=True), labels.shape[1] - 1)

    def _reference(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The log-probabilities of the chosen and of the rejected answers under the reference, ``(b,)`` each."""
        model = self.model if self.ref_model is None else self.ref_model
        return list(self.compute_ref_log_probs(model, inputs))  # type: ignore[no-untyped-call]

    def _prepared_micro_batch(self, batch: Mapping[str, Any]) -> MicroBatch:
        """See :meth:`SelectiveTrainerMixin._prepared_micro_batch`; with the log-probabilities under the reference."""
        found = self._micro_batch(batch)
        inputs = {**found.inputs, MEAN_TOKENS: _mean_tokens(found.inputs["completion_mask"])}
        if not self.precompute_ref_logps:
            inputs |= zip(REFERENCE, self._reference(found.inputs), strict=True)
        return replace(found, inputs=inputs)

    def _note_batch(self) -> None:
        """Note the metrics of a micro-batch, with one synchronisation."""
        values, counted, log_probs, chosen, rejected, seen = self._last_batch
        sums = {"seen": seen, **values.sums(counted)}
        rewards = self.beta * torch.stack([chosen, rejected])
        means = {
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/accuracies": (rewards[0] > rewards[1]).double().mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": log_probs.chunk(2)[0].mean(),
            "logps/rejected": log_probs.chunk(2)[1].mean(),
        }
        told = torch.stack([one.double() for one in (*sums.values(), *means.values())]).tolist()
        found = dict(zip((*sums, *means), told, strict=True))
        self._note_metrics(
            {**TokenValues.means(found), **{name: found[name] for name in means}}, tokens=int(found["seen"])
        )

    def _refuse_settings(self, args: TrainingArguments | None) -> None:
        super()._refuse_settings(args)
        refuse_preference_settings(args)


def _mean_tokens(mask: Tensor) -> Tensor:
    """The mean number of tokens that are predicted of the chosen answers of ``b`` pairs, for each of them, ``(b,)``."""
    pairs = len(mask) // 2
    return (mask[:pairs, 1:].sum() / pairs).clamp(min=1 / pairs).expand(pairs)
