"""What a trainer with selection does around its steps: the data of a run, its log, and its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftw_optim.integrations._trainers.columns import WithColumns
from ftw_optim.integrations._trainers.log_state import load_log, save_log
from ftw_optim.integrations._trainers.metrics import PREFIX, Metrics
from ftw_optim.integrations._trainers.micro_batch import SOURCES
from ftw_optim.integrations._trainers.processes import Processes
from ftw_optim.integrations._trainers.sampling import Sampling
from ftw_optim.integrations._trainers.window import Recorder

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class RunMixin(_Base):
    """The part of :class:`SelectiveTrainerMixin` that steps do not see; it sets all attributes."""

    selection_log: Recorder | None
    _log_columns: dict[str, str]
    _metrics_of_selection: Metrics
    _options: dict[str, Any]
    _processes: Processes
    _sampling: Sampling
    _target_examples: Any
    _until_known: bool

    # ------------------------------------------------------------------ its data

    def get_train_dataloader(self) -> Any:
        """The trainer's data loader; its batches also hold the columns for the selection log."""
        if not self._metrics_of_selection.logs or not self._log_columns:
            return super().get_train_dataloader()
        if self._processes.count > 1 and not hasattr(self.train_dataset, "__len__"):
            raise NotImplementedError(
                "Expected data with a length, got a stream, whose batches accelerate deals out to several processes "
                "as tensors alone: leave the columns for the log out, or read the data by number."
            )
        collator, signature = self.data_collator, self._signature_columns
        dealing = self.accelerator.dataloader_config
        dispatches = dealing.dispatch_batches
        self._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        try:
            self.data_collator = WithColumns(collator, self._log_columns)
            if self._processes.count == 1:
                dealing.dispatch_batches = False  # older accelerate puts even a single batch together, of tensors alone
            self._signature_columns = [*known, *self._log_columns.values()]  # type: ignore[assignment]
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, signature
            dealing.dispatch_batches = dispatches

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._sampling.proposes:
            return super()._get_train_sampler(train_dataset)
        at_once = self._train_batch_size * self._processes.count
        return self._sampling.sampler_for(
            self.train_dataset,  # with all of its columns
            self._target_examples,
            count=at_once * self.args.gradient_accumulation_steps,
            whole=1 if self._processes.count == 1 or self.args.dataloader_drop_last else at_once,
            seed=self._options["seed"],
            source=self._log_columns.get(SOURCES),
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the trainer does."""
        self._sampling.start()
        self._until_known = False
        return super().train(*args, **kwargs)

    # ------------------------------------------------------------------ what it tells

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages of the selections since the last training log; at the end of the run, what all cost."""
        if "loss" in logs:
            logs.update(self._metrics_of_selection.averages())
            logs.update({PREFIX + name: value for name, value in self._sampling.numbers().items()})
        if "train_runtime" in logs:
            cost = self._metrics_of_selection.cost
            cost.passed_over = int(self._sampling.numbers().get("passed_over", 0.0))
            logs.update({PREFIX + name: value for name, value in cost.numbers().items()})
        super().log(logs, start_time)

    # ------------------------------------------------------------------ checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._sampling.save(output_dir)
            save_log(self.selection_log, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._sampling.load(checkpoint)
        load_log(self.selection_log, checkpoint)
