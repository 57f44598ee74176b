"""The order of the work: the metric, the rows of the pool's records, the rows of the target, the ranking."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from ftw_optim.integrations.streaming import pad
from ftw_optim.integrations.streaming._screening import Sample
from ftw_optim.score._gradients import GradientRows
from ftw_optim.score._metric import FixedMetric, state_file, warmed_up
from ftw_optim.score._model import digest, trained
from ftw_optim.score._ranking import COMPARED, RANKED_BY, Ranking, rank_records
from ftw_optim.score._records import Records, count_records, encoder
from ftw_optim.score._store import Store

SCORED = "scored.jsonl"


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a scored pool; all but the last four belong to its rows.

    Attributes:
        max_length: tokens after which a record is cut.
        limit: records of the pool that are read; None: all.
        dim: numbers of a record's sketch; None: whole gradients.
        learning_rate: of the AdamW, where its state is not given.
        warm_up: batches of records that tell the metric.
        batch_size: records of a pass.
        block: records after which a run that is killed goes on.
        seed: of the sketch, new adapters and the records that tell the metric.
        optimizer_state: a file with an AdamW's state; None: none.
        target_rows: rows of the target, from the first on; None: all.
        compared: best-ranked records that redundancy is measured against.
        rank_by: ``"score"`` or ``"cosine"``.
        say: takes lines of text.
    """

    max_length: int = 512
    limit: int | None = None
    dim: int | None = 4096
    learning_rate: float = 2e-4
    warm_up: int = 16
    batch_size: int = 8
    block: int = 64
    seed: int = 0
    optimizer_state: Path | None = None
    target_rows: int | None = None
    compared: int = COMPARED
    rank_by: str = "score"
    say: Callable[[str], object] = print

    def __post_init__(self) -> None:
        for name in ("max_length", "limit", "warm_up", "batch_size", "block", "target_rows", "compared"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.rank_by not in RANKED_BY:
            raise ValueError(f"rank_by must be one of {', '.join(map(repr, RANKED_BY))}, got {self.rank_by!r}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")

    def of_rows(self) -> dict[str, Any]:
        """The options that the rows depend on, as JSON values."""
        own = asdict(self)
        for name in ("target_rows", "compared", "rank_by", "say"):
            del own[name]
        return own | {"optimizer_state": _file_digest(self.optimizer_state)}


def score_pool(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pool: Path,
    target: Path,
    folder: Path,
    *,
    options: Options | None = None,
) -> tuple[Path, Ranking]:
    """Score every record of a pool towards a target, and write ``folder/NAME/scored.jsonl``.

    NAME is that of the target's file. What lies in the folder of an earlier call with the same settings is used: the
    rows of the pool's records, as far as they go.

    Args:
        model: a causal language model in evaluation mode; what requires a gradient is compared.
        tokenizer: its tokenizer.
        pool: JSON lines, plain or gzip, with prompt and response.
        target: examples of what is trained for, in the same form.
        folder: everything that is kept.
        options: None: the defaults of :class:`Options`.

    Returns:
        The file, and what is shown of it; see :func:`rank_records` for its lines.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has no record that can be scored, an option is not valid, or the folder was made with other
            settings.
        NotImplementedError: a trained parameter cannot be captured.
    """
    options = Options() if options is None else options
    if count_records(target, 1) == 0 or count_records(pool, 1) == 0:
        raise ValueError(f"Expected records in {target} and {pool}, but one of them is empty.")
    parameters = trained(model)
    if not parameters:
        raise ValueError("Expected a model of which something requires a gradient, which is what is compared.")
    encode = encoder(tokenizer, options.max_length)
    of_target = _target_samples(Records(target, encode, limit=options.target_rows))
    settings = {
        "model": digest(model),
        "trained": [len(parameters), sum(parameter.numel() for parameter in parameters.values())],
        "dtype": str(next(iter(parameters.values())).dtype),
        "pool": [pool.name, _file_digest(pool)],
        **options.of_rows(),
    }
    store = Store(folder, settings)
    metric = _metric(store, model, Records(pool, encode, limit=options.limit), options)
    gradients = GradientRows(model, metric.maps(), dim=options.dim, seed=options.seed)
    rows = store.rows(width=gradients.width, dtype=gradients.dtype)
    place = store.place
    kind = "gradients" if options.dim is None else "sketches"
    if place is not None and place["done"]:
        options.say(f"{place['count']:,} {kind} found in {folder}: only the target's rows are run.")
    else:
        if place is not None:
            options.say(f"{place['count']:,} {kind} found in {folder}: going on from there.")
        _fill(store, gradients, Records(pool, encode, limit=options.limit), options)
    with _bar(len(of_target), "target", "records") as bar:
        of_rows = _in_batches(gradients, of_target, options, bar.update)[1]
    out = folder / target.name.partition(".")[0] / SCORED
    out.parent.mkdir(exist_ok=True)
    error = 0.0 if options.dim is None else (2 / options.dim) ** 0.5
    found = rank_records(
        rows,
        store.records(),
        of_rows,
        out,
        sketch_error=error,
        compared=options.compared,
        by=options.rank_by,
    )
    return out, found


def _target_samples(records: Records) -> list[Sample]:
    samples: list[Sample] = []
    while block := records.block(1024):
        samples += block
    if not samples:
        raise records.nothing()
    return samples


def _metric(store: Store, model: nn.Module, records: Records, options: Options) -> FixedMetric:
    """The metric that the folder holds, or a new one, which it holds from now on."""
    parameters = trained(model)
    kept = store.metric()
    if kept is not None:
        return FixedMetric.restored(kept, parameters)
    samples = records.drawn(options.warm_up * options.batch_size, seed=options.seed)
    if not samples:
        raise records.nothing()
    batches = [
        _padded(model, samples[at : at + options.batch_size]) for at in range(0, len(samples), options.batch_size)
    ]
    with _bar(len(batches), "metric", "batches") as bar:
        metric = warmed_up(
            model,
            parameters,
            batches,
            learning_rate=options.learning_rate,
            given=options.optimizer_state,
            tick=bar.update,
        )
    store.keep_metric(metric.state_dict())
    return metric


def _fill(store: Store, gradients: GradientRows, records: Records, options: Options) -> None:
    """Add the rows of all records that are not there yet, a block at a time."""
    rows, place = store.rows(width=gradients.width, dtype=gradients.dtype), store.place
    store.begin(rows)
    if place is not None:
        records.go_on_from(place["position"])
    with _bar(count_records(records.path, options.limit), "pool", "records", done=records.read) as bar:
        while samples := records.block(options.block):
            losses, found = _in_batches(gradients, samples, options, bar.update)
            described = [
                {
                    "id": sample["sample_id"],
                    "source": sample["source"],
                    "loss": loss if math.isfinite(loss) else None,
                    "begins": sample["begins"],
                }
                for sample, loss in zip(samples, losses.tolist(), strict=True)
            ]
            store.add(rows, found, described, records.position())
            bar.update(records.read - bar.n)
    if not len(rows):
        raise records.nothing()
    store.end(records.position())
    if records.skipped:
        options.say(f"{records.skipped:,} records cannot be scored:\n{records.why_skipped()}")


def _in_batches(
    gradients: GradientRows, samples: Sequence[Sample], options: Options, tick: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """The losses and rows of samples, which are run in batches of similar lengths."""
    order = sorted(range(len(samples)), key=lambda at: len(samples[at]["input_ids"]))
    losses = torch.empty(len(samples), dtype=torch.float64)
    found = torch.empty(len(samples), gradients.width, dtype=gradients.dtype)
    for at in range(0, len(order), options.batch_size):
        some = order[at : at + options.batch_size]
        batch_losses, rows = gradients.of(_padded(gradients.model, [samples[one] for one in some]))
        losses[some], found[some] = batch_losses.double(), rows
        tick(len(some))
    return losses, found


def _padded(model: nn.Module, samples: Sequence[Sample]) -> dict[str, Tensor]:
    return pad(samples, device=next(model.parameters()).device)


def _bar(total: int, what: str, unit: str, *, done: int = 0) -> Any:
    return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", mininterval=1.0)


def _file_digest(path: Path | None) -> str | None:
    """A number that differs where the contents of a state's file do."""
    if path is None:
        return None
    found = hashlib.blake2b(digest_size=8)
    with state_file(path).open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()
