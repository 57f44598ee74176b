"""Selection in the trainer of Transformers.

::

    -trainer = Trainer(model, args, train_dataset=mixed, data_collator=collator)
    +trainer = SelectiveTrainer(model, args, train_dataset=mixed, data_collator=collator, target_dataset=task,
    +                           selective={"filter": GreedyFilter(keep=0.25)})
     trainer.train()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ftw_optim._private_names import TRANSFORMERS, check_private_names
from ftw_optim._step.label_head import LabelLogits, label_logits, logits_of
from ftw_optim._step.losses import shifted_labels
from ftw_optim._step.optimizer import SelectiveOptimizer
from ftw_optim._step.target import TargetGradient
from ftw_optim.integrations._trainers.around_step import AroundStep
from ftw_optim.integrations._trainers.metrics import Metrics
from ftw_optim.integrations._trainers.micro_batch import COLUMNS
from ftw_optim.integrations._trainers.overrides import of_framework, refuse_overrides
from ftw_optim.integrations._trainers.own_loss import LossComparison
from ftw_optim.integrations._trainers.plain_steps import PlainSteps, usable_gradients
from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.integrations._trainers.proposing import Proposing
from ftw_optim.integrations._trainers.realised import RealisedDecrease
from ftw_optim.integrations._trainers.refusals import check_guides, checked_options, refuse, refuse_settings
from ftw_optim.integrations._trainers.run import RunMixin
from ftw_optim.integrations._trainers.sampling import Sampling
from ftw_optim.integrations._trainers.target_losses import TargetLosses
from ftw_optim.integrations._trainers.targets import TargetBatches
from ftw_optim.integrations._trainers.window import Recorder
from ftw_optim.integrations._trainers.window_losses import WindowLossesMixin
from ftw_optim.proposals import ProposedSampler

check_private_names(TRANSFORMERS)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SelectiveTrainerMixin(RunMixin, WindowLossesMixin, _Base):
    """Makes a trainer select among the candidates of each accumulation window.

    Name it before a trainer class: ``class SelectiveSFTTrainer(SelectiveTrainerMixin, SFTTrainer)``. All
    ``per_device_train_batch_size * gradient_accumulation_steps`` samples of a window are compared with the target; the
    combined gradient of the kept ones is in ``.grad`` when the trainer clips it, logs its norm and steps. The optimizer
    is the one that the training arguments ask for, or the one given as ``optimizers``.

    Args:
        *args: positional arguments of the trainer.
        target_dataset: examples of the task to train for, prepared like the training data; with a length, and found by
            number.
        selective: options of :class:`SelectiveOptimizer`: ``filter``, ``weight``, ``metric``, ``train_on_target``,
            ``combine``, ``scored``, ``gram``, ``memory_limit``, ``self_check``, ``seed`` (by default that of the
            training arguments). With a ``proposal`` the training data are sampled by it, see
            :class:`~ftw_optim.proposals.ProposedSampler`, which has ``read_ahead`` and ``passed_over``: ``"tested"``,
            ``"vetted"``, ``"similarity"``, ``"learned"``, ``"uniform"``, or one of :mod:`ftw_optim.proposals`. It is in
            the checkpoints. ``"tested"`` takes its candidates as they are while scores bear out that likeness helps;
            filter and weights choose among them while they do not.
        sample_weighting: how a candidate's loss is formed. ``"token_sum"``: ``n`` times the sum over its labels,
            divided by the number of labels in the window, so that equal weights make the trainer's own step and long
            answers count more; ``"token_mean"``: the mean over its labels. Target losses are formed alike.
        target_batch_size: number of target examples in a step; None: ``per_device_train_batch_size``.
        guide_share: share of the target examples that only guide; the others take part in every step, weighed by what
            the guides ask for. 0: all guide, and take part where ``selective`` has ``train_on_target``. Which is which
            is decided by the seed.
        target_refresh_every: number of steps from one evaluation of the target gradient to the next; with more than 1
            every step makes a selection.
        guide_until: share of the run's steps in which the target examples only guide; after them they take part, and
            the guide stays what it was. What is trained on is memorised, and guides to what it knows already. 0: as
            ``selective`` says.
        held_out_dataset: examples of the same task that nothing is trained on, prepared alike: ``selection.blind`` then
            tells whether the target examples are memorised, and a learned proposal learns nothing from such a guide.
            All of them run, without gradients, at every look: a few dozen are enough.
        held_out_every: number of selections from one look to the next.
        realised_every: number of steps from one measurement of the realised decrease of the target loss to the next
            (two evaluations of the target batch, a copy of parameters and optimizer state); 0: never. Where that step
            makes no selection, the next one that does is measured.
        select_every: number of steps from one selection to the next where all candidates would be kept alike, as while
            a tested proposal trusts likeness: the steps between are the trainer's own. None: 4 with such a proposal,
            where these are the same as with equal weights; else 1. A step whose gradient is not finite makes a
            selection all the same, which rejects the candidates at fault.
        selection_log: takes every step's selection, under the step's number in the trainer's log. Its state is saved
            and resumed with checkpoints; you close it.
        sample_id_column: column of the training data with the ids of samples for the log; None: step and number.
        source_column: column of the training data with their sources for the log.
        text_column: column of the training data with their texts for the log.
        **kwargs: keyword arguments of the trainer.

    Raises:
        ValueError: an option is not one of those above.
        NotImplementedError: the trainer has a setting that selection does not support.

    The trainer's log gets averages over the steps since it was last written: ``selection/kept_share``,
    ``effective_size``, ``residual``, ``cosine``, ``predicted_decrease``, ``realised_decrease``, ``rejected`` and
    ``skipped`` (see :class:`Selection`), where target examples take part also ``target_share`` of the weight and
    ``target_loss``, with held-out examples ``guide_loss``, ``held_out_loss`` and ``blind``, and its milliseconds by
    phase, ``selection/ms_target`` and so on. With a proposal it gets the numbers of records of the epoch that were
    ``read`` and ``passed_over``, and ``trusts_likeness`` where it tests that. The logged loss is the mean loss of a
    token under the weights. The end of a run tells what selection cost in the steps that made one: measured
    ``selection/seconds``, and as estimated by :class:`~ftw_optim.selection_log.Cost` ``plain_seconds``,
    ``cost_seconds`` and, with a proposal, ``saved_seconds`` (of the last epoch).
    """

    _compares_again = False  # the losses with the trainer's own, beside those of overrides

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_overrides(cls, SelectiveTrainerMixin)

    def __init__(
        self,
        *args: Any,
        target_dataset: Any,
        selective: Mapping[str, Any] | None = None,
        sample_weighting: str = "token_sum",
        target_batch_size: int | None = None,
        guide_share: float = 0.0,
        target_refresh_every: int = 1,
        guide_until: float = 0.0,
        held_out_dataset: Any = None,
        held_out_every: int = 10,
        realised_every: int = 0,
        select_every: int | None = None,
        selection_log: Recorder | None = None,
        sample_id_column: str | None = None,
        source_column: str | None = None,
        text_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._options = checked_options(selective, sample_weighting, realised_every)
        self._sampling = Sampling(Proposing.of(self._options))
        self._options |= self._sampling.stages(self._options)
        self._refuse_settings(
            next((one for one in (*args, *kwargs.values()) if isinstance(one, TrainingArguments)), None)
        )
        super().__init__(*args, **kwargs)
        own = type(self).position_losses is not SelectiveTrainerMixin.position_losses
        refuse(self, self._options, own_losses=own, proposes=self._sampling.proposes)
        self._options.setdefault("seed", self.args.seed)
        self._processes = Processes(self.accelerator)
        self.sample_weighting, self.realised_every = sample_weighting, realised_every
        self.selection_log = selection_log
        names = zip(COLUMNS, (sample_id_column, source_column, text_column), strict=True)
        self._log_columns = {key: name for key, name in names if name is not None}
        self.target_batches = TargetBatches(
            dataset=self._prepared_targets(target_dataset),
            collate=self._target_collator(target_dataset),
            size=self.args.per_device_train_batch_size if target_batch_size is None else target_batch_size,
            seed=self._options["seed"],
            refresh_every=target_refresh_every,
        )
        self.guide_until = guide_until
        check_guides(self._options, guide_until=guide_until, guide_share=guide_share)
        self._until_known = False  # of this run
        self._held_out_every = held_out_every
        held_out: TargetBatches | None = None
        if held_out_dataset is not None:
            collate, held_out_rows = self._target_collator(held_out_dataset), self._prepared_targets(held_out_dataset)
            held_out = replace(self.target_batches, dataset=held_out_rows, collate=collate)
        self.trained_batches: TargetBatches | None = None
        self._target_examples = self.target_batches.dataset
        if guide_share:
            self.target_batches, self.trained_batches = self.target_batches.parted(guide_share)
        self._targets = TargetLosses(
            guides=self.target_batches,
            trained=self.trained_batches,
            held_out=held_out,
            window=lambda batch: self._window(self.model_wrapped, [self._prepare_inputs(batch)]),
            step=lambda: self.state.global_step,
            processes=self._processes,
            device=self.args.device,
        )
        self._targets.check_shares(trains=bool(self._options.get("train_on_target")))
        own_position_losses = not inspect.unwrap(type(self).position_losses).__module__.startswith("ftw_optim.")
        self._plain_steps = PlainSteps.of(
            select_every,
            self._options,
            {
                'sample_weighting="token_mean"': sample_weighting != "token_sum",
                "target examples that take part": bool(self._options.get("train_on_target") or guide_share),
                f"target_refresh_every={target_refresh_every}": target_refresh_every > 1,
                "position_losses of your own and no self_check": own_position_losses
                and self._options.get("self_check") is False,
            },
        )
        self._plain = False  # whether the present window is the trainer's own step
        self.selective_optimizer: SelectiveOptimizer | None = None
        self._micro_batches: list[Mapping[str, Any]] = []
        self._metrics_of_selection = Metrics(selection_log, self._processes)  # TRL has a _metrics of its own
        self._own_step = type(self).training_step is not SelectiveTrainerMixin.training_step
        self._loss_comparison = LossComparison(
            self._options.get("self_check", 100),
            again=self._compares_again or self._own_step or not of_framework(type(self).compute_loss),
        )
        self._selected = False  # since the last step
        self.add_callback(AroundStep(self._check_selected, self._metrics_of_selection.record))

    @property
    def proposed_sampler(self) -> ProposedSampler | None:
        """The sampler by which a proposal chooses the candidates; None without one, and before the first run."""
        return self._sampling.sampler

    def _refuse_settings(self, args: TrainingArguments | None) -> None:
        """Refuse settings that take effect while the trainer is constructed."""
        refuse_settings(args)

    # ------------------------------------------------------------------ one step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Wait for the last micro-batch of the window, then select among all of them.

        Returns:
            The mean loss of a token under the weights, at the last micro-batch of the window; zero before, so that the
            trainer's sum is the loss. In a step that makes no selection, what the trainer returns.
        """
        if not self._micro_batches:
            self._plain = self._plain_steps.at(self.state.global_step, self.selective_optimizer, self._processes)
        self._micro_batches.append(inputs)
        loss = torch.zeros((), device=self.args.device)
        if self._plain:
            own = {key: value for key, value in inputs.items() if key not in COLUMNS}
            loss = super().training_step(model, own, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss
        given, self._micro_batches = self._micro_batches, []
        self._selected = True
        if self._plain and self._pass_over(given):
            return loss
        batches = [self._prepare_inputs(dict(batch)) for batch in given]
        if self.selective_optimizer is None:
            raise RuntimeError(
                f"Expected {type(self).create_optimizer.__qualname__} to call super().create_optimizer, which wraps "
                "the optimizer: pass one of your own as optimizers=(optimizer, scheduler), or set self.optimizer and "
                "then call it."
            )
        model.train()
        self.selective_optimizer.train()
        if self._loss_comparison.due():
            self._compare_losses(model, batches, num_items_in_batch)
        loss = self._select(self.selective_optimizer, model, batches)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss.to(self.args.device)

    def _pass_over(self, batches: Sequence[Mapping[str, Any]]) -> bool:
        """Count the candidates of a plain step as taken; False where it cannot be made, so that some are rejected."""
        assert self.selective_optimizer is not None
        assert self.model is not None
        if not usable_gradients(self.model, self.selective_optimizer, self._processes):
            return False
        rows = self._sampling.rows_of(batches)
        self._check_rows(batches, rows)
        self._sampling.skip(rows * self._processes.count)
        return True

    def _select(self, optimizer: SelectiveOptimizer, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        window = self._window(
            model, batches, joined=optimizer.combine == "rerun", passed=self._note_batch, processes=self._processes
        )
        self._check_rows(batches, sum(map(len, window.batches)))
        if not window.batches and self._processes.count == 1:
            return torch.zeros(())
        scaler = self.accelerator.scaler  # float16 on a GPU
        self._decide_until(optimizer)
        # A fresh scaler makes its scale at its first call.
        scale = 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=self.args.device)))
        optimizer.backward(
            window.closure(),
            grad_scale=scale,
            sample_ids=window.sample_ids(),
            target_sample_ids=self._target_sample_ids(),
        )
        selection = optimizer.selection
        assert selection is not None
        self._metrics_of_selection.note(selection, window)
        self._sampling.observe(selection)
        return window.token_loss(selection, self._processes)

    def _check_rows(self, batches: Sequence[Mapping[str, Any]], candidates: int) -> None:
        """Check that the candidates of a window are those that a proposal chose."""
        self._sampling.check(
            batches,
            candidates=candidates,
            step=self.state.global_step,
            batch_size=self._train_batch_size,
            windows=self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
            processes=self._processes,
        )

    def _decide_until(self, optimizer: SelectiveOptimizer) -> None:
        """Decide, at the first step of a run, when the target examples guide no more."""
        if not self.guide_until or self._until_known:
            return
        self._until_known = True
        left = round(self.guide_until * self.state.max_steps) - self.state.global_step
        optimizer.target = replace(optimizer.target, until=max(1, optimizer.selections + left))

    def _check_selected(self) -> None:
        """Before a step: a training step of one's own may have hidden the selective one.

        Raises:
            RuntimeError: nothing was selected for this step.
        """
        if not self._selected:
            raise RuntimeError(
                f"Expected {type(self).training_step.__qualname__} to call super().training_step, which selects: the "
                "step that was about to be made is of all candidates alike."
            )
        self._selected = False

    def position_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of each position, and which positions count; override it for another loss than the next-token loss.

        Args:
            model: the model to call.
            inputs: a batch with labels, on the device, without the columns for the log.

        Returns:
            The losses, zero where a position does not count, and a bool mask of the positions that count; both
            ``(b, t)`` as the labels, or ``(b, 1)`` where rows have one label each.
        """
        labels, targets = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        targets = shifted_labels(labels) if targets is None else targets
        return self._label_logits(model, inputs, targets).losses()

    def _label_logits(self, model: nn.Module, inputs: dict[str, Any], targets: Tensor) -> LabelLogits:
        """The logits at the positions with a target, or at all where the model does not allow that."""
        with self.compute_loss_context_manager():
            found = label_logits(model, lambda: logits_of(model(**inputs)), targets)
        if found.logits.shape[:-1] != found.targets.shape:
            raise ValueError(
                f"Expected logits (n, t, vocabulary) for labels of shape {tuple(targets.shape)}, got "
                f"{tuple(found.logits.shape)}; models that add positions of their own, such as virtual tokens, are not "
                "known."
            )
        return found

    # ------------------------------------------------------------------ the target

    def _target_sample_ids(self) -> Tensor | None:
        """The target example of each row of this process, where one is several rows."""
        return None

    def _prepared_targets(self, dataset: Any) -> Any:
        """The target examples, ready to be collated."""
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns") and hasattr(dataset, "__len__"):
            return self._remove_unused_columns(dataset, description="target")
        return dataset

    def _target_collator(self, dataset: Any) -> Callable[[list[Any]], Any]:
        return self._get_collator_with_removed_columns(self.data_collator, description="target")

    # ------------------------------------------------------------------ what the trainer asks for

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the trainer's optimizer, wrapped in a :class:`SelectiveOptimizer`."""
        self._micro_batches = []  # of a run that was stopped within a window
        optimizer = super().create_optimizer(*(() if model is None else (model,)))  # older releases take none
        bare = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        if isinstance(bare, SelectiveOptimizer):
            if bare is not self.selective_optimizer:
                raise ValueError(
                    "Expected the optimizer that should take the steps, got a SelectiveOptimizer: pass the one inside "
                    "of it, its options as selective and its target as target_dataset."
                )
            return optimizer
        if bare is not optimizer:
            raise ValueError(
                "Expected an optimizer as it was constructed, got one that accelerate has prepared: the trainer "
                "prepares it."
            )
        assert self.model is not None
        options = dict(self._options)
        if self.trained_batches is not None:
            options["train_on_target"] = self._targets.of_trained
        self.selective_optimizer = made = SelectiveOptimizer(
            optimizer,
            self.model,
            TargetGradient(
                self._targets.of_guides,
                refresh_every=self.target_batches.refresh_every,
                held_out=None if self._targets.held_out is None else self._targets.of_held_out,
                held_out_every=self._held_out_every,
            ),
            **options,
        )
        RealisedDecrease(
            made,
            self._targets.of_guides,
            due=lambda: self._plain_steps.due(self.state.global_step, self.realised_every, made),
            note=self._metrics_of_selection.note_realised,
            processes=self._processes,
        )
        self.optimizer = made
        return made


class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
    """The trainer of Transformers with selection, for causal language models; see :class:`SelectiveTrainerMixin`."""
