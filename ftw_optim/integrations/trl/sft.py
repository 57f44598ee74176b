"""Selection in the supervised fine-tuning of TRL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from trl.trainer import sft_trainer
from trl.trainer.sft_trainer import SFTTrainer

from ftw_optim._private_names import TRL, check_private_names
from ftw_optim._step.losses import IGNORED, shifted_labels
from ftw_optim.integrations.transformers import SelectiveTrainerMixin
from ftw_optim.integrations.trl.internals import TRLInternals

check_private_names(TRL)

FUSES = hasattr(sft_trainer, "add_fused_lm_head")
"""Whether this release of TRL gives models an output layer that is fused with the loss."""


class SelectiveSFTTrainer(TRLInternals, SelectiveTrainerMixin, SFTTrainer):
    """The SFT trainer of TRL with selection; see :class:`SelectiveTrainerMixin`.

    ``target_dataset`` is prepared like ``train_dataset``, but never packed. With ``packing=True`` (``"bfd"``) or
    ``padding_free=True`` each document is a candidate. Where the output layer is not trained, as under LoRA, it runs
    fused with the loss; where it is trained, it must be captured, and the logits of positions with labels are formed.
    """

    def position_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See :meth:`SelectiveTrainerMixin.position_losses`."""
        inputs["use_cache"] = False
        tokens = inputs.get("attention_mask")
        seen = inputs["input_ids"].numel() if tokens is None else tokens.sum()
        head = self.model.get_output_embeddings()  # type: ignore[operator, union-attr]
        trained = any(p.requires_grad for p in head.parameters())
        forward = self._by_logits if trained or not FUSES else self._fused
        losses, counted, entropy, correct = forward(model, inputs)
        if self.args.loss_type == "dft":  # type: ignore[attr-defined]
            losses = losses * (-losses).exp().detach()
        self._last_tokens = (counted.sum(), entropy, correct, seen)
        return losses, counted

    def _fused(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shifted = inputs.get("shift_labels") is not None
        with self.compute_loss_context_manager():
            output = model(**inputs, fused_lm_head=True)

        def grid(values: Tensor) -> Tensor:  # the last position predicts nothing
            return values if shifted else functional.pad(values, (0, 1))

        return grid(-output.log_probs), grid(output.label_mask), output.entropy.detach().sum(), output.is_top1.sum()

    def _by_logits(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels, targets = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        targets = shifted_labels(labels) if targets is None else targets
        found = self._label_logits(model, inputs, targets)
        losses, counted = found.losses()
        with torch.no_grad():
            entropy, correct = _entropy_and_hits(found.logits.detach(), found.targets)
        return losses, counted, entropy, correct

    def _note_batch(self) -> None:
        """Note the metrics of a micro-batch, with no more synchronisations than TRL's trainer makes."""
        *sums, seen = self._last_tokens
        valid, bits, hits = torch.stack([one.double() for one in sums]).tolist()
        self._note_metrics(
            {"entropy": bits / valid if valid else 0.0, "mean_token_accuracy": hits / valid if valid else 0.0},
            tokens=int(seen),
        )

    def _trainers_loss(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor | None) -> Tensor:
        with self._metrics_kept():
            return super()._trainers_loss(model, inputs, tokens)

    def _prepared_targets(self, dataset: Any) -> Any:
        return super()._prepared_targets(self._prepared(dataset))


def _entropy_and_hits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the positions with a target: the entropy of the prediction, and the hits of its most likely token."""
    entropy, hits = torch.zeros((), device=logits.device), torch.zeros((), device=logits.device)
    for row, wanted in zip(logits, targets, strict=True):  # row by row: no second copy of all logits
        row, wanted = row[wanted != IGNORED].float(), wanted[wanted != IGNORED]
        log_probabilities = row.log_softmax(dim=-1)
        entropy += -(log_probabilities.exp() * log_probabilities).sum()
        hits += (row.argmax(dim=-1) == wanted).sum()
    return entropy, hits
