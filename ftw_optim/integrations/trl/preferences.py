"""What the trainers of preference data share: a candidate is a pair of a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ftw_optim.integrations._trainers.micro_batch import MicroBatch
from ftw_optim.integrations.transformers import SelectiveTrainerMixin
from ftw_optim.integrations.trl.internals import TRLInternals, refuse_old_pairs


class PreferenceTrainerMixin(TRLInternals, SelectiveTrainerMixin):
    """Makes a trainer of TRL whose batches are ``b`` chosen rows and then ``b`` rejected ones select among the pairs.

    Name it before a trainer class whose own loss is the mean of the losses of pairs. A candidate has one loss, which
    counts as one token where others have many: with ``sample_weighting="token_sum"`` equal weights make the trainer's
    own step, whose loss is the mean of the means of micro-batches.
    """

    _compares_again = True  # at the first step a policy may equal its reference, where losses of all kinds are the same

    def candidate_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of each pair.

        Args:
            model: the model to call.
            inputs: a batch on the device, without the columns for the log; may be changed.

        Returns:
            Shape ``(b,)``, with their graph.
        """
        raise NotImplementedError(f"Expected {type(self).__name__} to define candidate_losses(model, inputs) -> (b,).")

    def position_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The losses of pairs as those of one position each; see :meth:`candidate_losses`."""
        losses = self.candidate_losses(model, inputs)[:, None]
        return losses, torch.ones_like(losses, dtype=torch.bool)

    def _micro_batch(self, batch: Mapping[str, Any]) -> MicroBatch:
        return MicroBatch.of_pairs(batch)

    def _target_sample_ids(self) -> Tensor:
        batches = self.target_batches if self.trained_batches is None else self.trained_batches
        count = min(batches.size, len(batches.dataset))
        own = self._processes.rows(count)
        return torch.arange(count if own is None else len(own)).repeat(2)

    def _refuse_settings(self, args: TrainingArguments | None) -> None:
        refuse_old_pairs()
        super()._refuse_settings(args)

    def _trainers_loss(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor | None) -> Tensor:
        with self._metrics_kept():
            return super()._trainers_loss(model, inputs, tokens)

    def _prepared_targets(self, dataset: Any) -> Any:
        return super()._prepared_targets(self._prepared(dataset))
