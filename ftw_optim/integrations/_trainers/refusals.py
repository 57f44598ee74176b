"""Checks of a trainer's settings: those that selection does not support are refused before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ftw_optim._step.optimizer import SelectiveOptimizer
from ftw_optim.integrations._trainers.proposing import OPTIONS as PROPOSING
from ftw_optim.integrations._trainers.releases import loss_shifts_labels, own_order
from ftw_optim.integrations._trainers.weighting import WEIGHTINGS
from ftw_optim.proposals import Proposal, SimilarityProposal, UniformProposal

if TYPE_CHECKING:
    from transformers import Trainer

OPTIONS = (
    *(
        name
        for name, parameter in inspect.signature(SelectiveOptimizer.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ),
    *PROPOSING,
)
"""The options that a trainer takes as ``selective``: those of :class:`SelectiveOptimizer`, and those of a proposal."""


def checked_options(selective: Mapping[str, Any] | None, weighting: str, realised_every: int) -> dict[str, Any]:
    """The checked options of the :class:`SelectiveOptimizer` and of a proposal.

    Raises:
        ValueError: an option is not known, or a value is out of range.
    """
    options = dict(selective or {})
    if unknown := sorted(options.keys() - set(OPTIONS)):
        hint = " The target is target_dataset." if "target" in unknown else ""
        raise ValueError(f"selective takes {', '.join(OPTIONS)}; got {', '.join(unknown)}.{hint}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"sample_weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
    if isinstance(realised_every, bool) or not isinstance(realised_every, int) or realised_every < 0:
        raise ValueError(f"realised_every must be a number of steps, or 0 for never, got {realised_every!r}.")
    return options


def check_guides(options: dict[str, Any], *, guide_until: float, guide_share: float) -> None:
    """Check which target examples guide and for how long; where any is trained on later, the options say so after it.

    Raises:
        ValueError: a share is out of range, or the options contradict it.
    """
    if not 0.0 <= guide_until < 1.0 or (guide_until and guide_share):
        raise ValueError(
            f"guide_until must be in [0, 1), and 0 beside a guide_share, got {guide_until!r} and {guide_share!r}: "
            "0.5 lets the target examples guide in the first half of the steps, and trains on them in the second."
        )
    if guide_until and options.setdefault("train_on_target", True) is not True:
        raise ValueError(f"guide_until={guide_until} trains on the target: leave train_on_target out of selective.")
    if guide_share and options.setdefault("train_on_target", True) is not True:
        raise ValueError(
            f"guide_share={guide_share} trains on the target examples that do not guide: leave train_on_target out of "
            "selective."
        )


def refuse_settings(args: Any) -> None:
    """Refuse settings that take effect while the trainer is constructed.

    Raises:
        NotImplementedError: rows are packed in a way that does not keep documents apart, activations are offloaded, or
            layers are replaced.
    """
    if getattr(args, "packing", False) and getattr(args, "packing_strategy", None) == "wrapped":
        raise NotImplementedError(
            'packing_strategy="wrapped" cuts documents and lets them attend across their ends, so that none has a '
            'gradient of its own: use packing_strategy="bfd", whose batches tell where documents begin, or '
            "packing=False."
        )
    if getattr(args, "activation_offloading", False):
        raise NotImplementedError(
            "activation_offloading does not know of the inputs that are captured for selection: leave it out."
        )
    if getattr(args, "use_liger_kernel", False):
        raise NotImplementedError(
            "use_liger_kernel puts layers and a fused loss in place that cannot be captured: leave it out."
        )


def refuse(trainer: Trainer, options: Mapping[str, Any], *, own_losses: bool, proposes: bool) -> None:
    """Refuse a trainer with settings that selection does not support.

    Args:
        trainer: the constructed trainer.
        options: the options of the :class:`SelectiveOptimizer`.
        own_losses: whether the trainer's class defines the losses of positions itself.
        proposes: whether a proposal samples the training data.

    Raises:
        NotImplementedError: there is such a setting; the message lists all of them.
    """
    reasons = [*_processes(trainer), *_losses(trainer, options, own_losses=own_losses), *_streams(trainer)]
    if proposes:
        reasons += _proposals(trainer)
    if reasons:
        raise NotImplementedError(f"{type(trainer).__name__} cannot be used like this: " + "; ".join(reasons) + ".")


def _processes(trainer: Trainer) -> Iterator[str]:
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_deepspeed_enabled:
        yield "DeepSpeed builds its own optimizer around ours: train without it"
    if args.fsdp or trainer.is_fsdp_enabled:
        yield "FSDP keeps only shards of the parameters in each process: train in one process without it"
    if accelerator.num_processes > 1 and not _is_ddp(accelerator):
        yield (
            f"there are {accelerator.num_processes} processes that do not train by DistributedDataParallel: start them "
            "by torchrun without FSDP, DeepSpeed or parallelism within the model"
        )
    by_window = trainer._divides_by_window  # type: ignore[attr-defined]
    if accelerator.num_processes > 1 and by_window and not args.average_tokens_across_devices:
        yield (
            "average_tokens_across_devices=False divides each process's loss by its own labels, while there is one "
            "selection over all: leave it True"
        )
    if args.n_gpu > 1:
        yield (
            f"nn.DataParallel would copy the model to {args.n_gpu} GPUs, where its layers cannot be captured: make one "
            "visible with CUDA_VISIBLE_DEVICES=0"
        )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        yield "the model was loaded in shards (distributed_config): load it whole"


def _is_ddp(accelerator: Any) -> bool:
    return accelerator.distributed_type.value in ("MULTI_GPU", "MULTI_CPU", "MULTI_NPU", "MULTI_XPU") and (
        getattr(accelerator, "parallelism_config", None) is None
    )


def _losses(trainer: Trainer, options: Mapping[str, Any], *, own_losses: bool) -> Iterator[str]:
    args = trainer.args
    if trainer.compute_loss_func is not None:
        yield (
            "compute_loss_func reduces the losses of all candidates to one: override position_losses, which returns "
            "them position by position"
        )
    if args.label_smoothing_factor:
        yield "label_smoothing_factor is not known for single candidates: leave it 0"
    if getattr(trainer, "_is_vision_dataset", False):
        yield "images are not known to belong to single candidates: train on text"
    config: Any = getattr(trainer.model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    routers = getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0.0)
    if routers or getattr(trainer, "aux_loss_enabled", False):
        yield (
            "the load-balancing loss of the experts is not a sum over candidates: set "
            "model.config.output_router_logits=False (for TRL's trainers router_aux_loss_coef=0.0 in the arguments)"
        )
    if virtual := _virtual_tokens(trainer.model):
        losses_here = inspect.unwrap(type(trainer).position_losses).__module__  # type: ignore[attr-defined]
        if losses_here.startswith("ftw_optim."):
            yield (
                f"the adapter puts {virtual} virtual tokens in front of each row, whose positions have no labels here: "
                "adapt by LoRA or by prefix tuning, or override position_losses, which returns the losses of the "
                "labels' positions"
            )
    if not own_losses and not loss_shifts_labels(trainer):
        yield (
            f"{type(trainer.model).__name__} is not trained by the next-token loss of Transformers: override "
            "position_losses, which returns the losses of its positions"
        )
    if options.get("combine") != "rerun" or args.gradient_accumulation_steps == 1:
        return
    if getattr(trainer, "padding_free", False):
        yield (
            'combine="rerun" takes one batch, and packed rows cannot be put together: use "factors" or "graph", or '
            "gradient_accumulation_steps=1"
        )
    if not trainer._divides_by_window:  # type: ignore[attr-defined]
        yield (
            "the loss is divided by each micro-batch's own labels or pairs, which cannot be told apart in the one "
            'batch of combine="rerun": use "factors" or "graph"'
        )


def _proposals(trainer: Trainer) -> Iterator[str]:
    args = trainer.args
    if not hasattr(trainer.train_dataset, "__len__"):
        yield (
            "a proposal samples data with a length: for a stream pass a SimilarityProposal to CandidateStream, or any "
            "proposal to a CandidateStream in a loop of your own"
        )
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    if "chosen_ids" in columns and "input_ids" not in columns:
        yield "a proposal reads input_ids, which pairs do not have: leave it out, and let the filter choose among pairs"
    if getattr(args, "packing", False) or getattr(trainer, "padding_free", False):
        yield "a proposal chooses rows, which are no candidates where documents are packed: leave packing out"
    if trainer.accelerator.num_processes > 1 and trainer.accelerator.split_batches:
        yield "batches that a proposal chose are dealt out whole: leave split_batches out"
    if args.ignore_data_skip:
        yield "what a proposal has given out is skipped when a run is resumed: leave ignore_data_skip out"
    if order := own_order(args):
        yield f"the proposal decides the order: leave {order} out"


def _streams(trainer: Trainer) -> Iterator[str]:
    proposal = getattr(trainer.train_dataset, "proposal", None)
    if isinstance(proposal, Proposal) and not isinstance(proposal, SimilarityProposal | UniformProposal):
        yield (
            f"a stream has a {type(proposal).__name__}, to which the trainer tells nothing: give the trainer data with "
            'a length and selective={"proposal": ...}, or the stream a SimilarityProposal'
        )


_WITHOUT_POSITIONS = ("PREFIX_TUNING", "CARTRIDGE")
"""The adapters among those that learn prompts which add keys and values, and no positions."""


def _virtual_tokens(model: Any) -> int:
    """The number of positions that an adapter of PEFT adds to each row, as prompt tuning and P-tuning do."""
    config = getattr(model, "active_peft_config", None)
    kind = getattr(config, "peft_type", None)
    if not getattr(config, "is_prompt_learning", False) or getattr(kind, "value", kind) in _WITHOUT_POSITIONS:
        return 0
    return int(getattr(config, "num_virtual_tokens", 0) or 0)
