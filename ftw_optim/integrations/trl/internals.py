"""What the trainers read of TRL's trainers under names that are not public; checked in the release 1.16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import trl
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer

from ftw_optim._layers.randomness import own_randomness

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def refuse_old_pairs() -> None:
    """Refuse releases of TRL whose trainers of pairs are others than those that were tested.

    Raises:
        NotImplementedError: it is such a release.
    """
    if not hasattr(DPOTrainer, "_precompute_ref_logps"):
        raise NotImplementedError(
            f"Expected TRL 1.16 or newer for selection among pairs, got {trl.__version__}, whose trainers of "
            "preferences and rewards are others. Install a newer one; SelectiveSFTTrainer works with this one."
        )


class TRLInternals(_Base):
    """Access to the metrics and to the preparation of data of a trainer of TRL; name it before the trainer class."""

    _metrics: dict[str, Any]
    _total_train_tokens: int
    _preparation: dict[str, Any] | None = None  # none where the settings say that the data are prepared already

    def _note_metrics(self, values: dict[str, float], *, tokens: int) -> None:
        """Add to the metrics that TRL's trainer logs of a micro-batch."""
        metrics = self._metrics["train"]
        for name, value in values.items():
            metrics[name].append(value)
        self._total_train_tokens += tokens
        metrics["num_tokens"] = [self._total_train_tokens]

    @contextmanager
    def _metrics_kept(self) -> Iterator[None]:
        """A block after which the metrics are what they were before."""
        metrics, total = copy.deepcopy(self._metrics), self._total_train_tokens
        try:
            yield
        finally:
            self._metrics, self._total_train_tokens = metrics, total

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """The prepared data; how the first data set, the training data, were prepared is how the target will be."""
        of_trl: Any = super()
        if self._preparation is None:
            given = signature(of_trl._prepare_dataset).bind(dataset, *args, **options).arguments
            self._preparation = {name: value for name, value in given.items() if name != "dataset"}
        return of_trl._prepare_dataset(dataset, *args, **options)

    def _prepared(self, dataset: Any) -> Any:
        """Target examples, prepared like the training data, with what is computed of these once; a list will do."""
        if isinstance(dataset, list):
            dataset = Dataset.from_list(dataset)
        if self._preparation is None:
            return dataset
        unpacked = {"packing": False} if "packing" in self._preparation else {}
        prepared = self._prepare_dataset(dataset, **{**self._preparation, **unpacked, "dataset_name": "target"})
        if not getattr(self, "precompute_ref_logps", False):
            return prepared
        of_trl: Any = self
        size = of_trl.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        with own_randomness(of_trl.model.parameters(), self.args.seed):  # the run's own draws stay what they are
            return of_trl._precompute_ref_logps(prepared, "target", size)
