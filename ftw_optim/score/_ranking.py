"""Scores, standard errors, ranks and redundancy of all records, from two passes over their rows."""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nlargest, nsmallest
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ftw_optim.score._store import Rows
from ftw_optim.selection_log._whole_file import whole_file

RANKED_BY = ("score", "cosine")
COMPARED = 4096
"""Best-ranked records that redundancy is measured against, unless the user asks for another number."""
SHOWN = 10


@final
@dataclass(kw_only=True)
class SourceScores:
    """Sums over the records of one source."""

    records: int = 0
    ranked: int = 0
    ranks: float = 0.0
    scores: float = 0.0
    in_front: int = 0


@final
@dataclass(kw_only=True)
class Ranking:
    """What is shown of a ranking.

    Attributes:
        records: number of records.
        ranked: those whose score is finite.
        target_rows: number of rows of the target.
        sketch_error: the standard error of an inner product that stems from the sketch, relative to the norms of its
            two gradients, at most; 0 where there is no sketch.
        front: number of records that count as in front: a tenth.
        best: the best, from the best on.
        worst: the worst, from the worst on.
        sources: sums by source.
    """

    records: int
    ranked: int
    target_rows: int
    sketch_error: float
    front: int
    best: list[dict[str, Any]] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, SourceScores] = field(default_factory=lambda: defaultdict(SourceScores))


def rank_records(
    rows: Rows,
    records: Iterable[Mapping[str, Any]],
    target: Tensor,
    out: Path,
    *,
    sketch_error: float,
    compared: int = COMPARED,
    by: str = "score",
) -> Ranking:
    """Write ``out``, one line of JSON for each record in the order of the pool, and return what is shown of it.

    Each line has ``id`` and ``source``; ``score``, the mean inner product with the target's rows; ``standard_error`` of
    that mean, over these rows (null for a single one); ``sketch_error``, the standard error of the score that stems
    from the sketch, at most; ``cosine`` to the target's mean gradient; ``redundancy``, the largest cosine, 0 at least,
    with any of the ``compared`` best-ranked records that rank above it; ``rank``, 1 for the highest; ``loss``. A record
    whose loss or gradient is not finite has nulls, and no rank.

    Two passes over the rows: memory holds the rows of the target, the ``compared`` best ones and a few of the pool, and
    20 bytes for each record.

    Args:
        rows: a row of each record, ``P^(1/2) g`` or a sketch of it.
        records: ``id``, ``source``, ``loss`` and ``begins`` of each record, in the same order.
        target: rows of the target, shape ``(m, width)``.
        out: the file, replaced as a whole.
        sketch_error: the largest relative standard error of the rows' inner products.
        compared: number of best-ranked records that redundancy is measured against.
        by: what ranks: ``"score"``, or ``"cosine"``, in which records with large gradients do not come first.

    Raises:
        ValueError: a row of the target is not finite, or ``by`` is neither.
    """
    if by not in RANKED_BY:
        raise ValueError(f"by must be one of {', '.join(map(repr, RANKED_BY))}, got {by!r}.")
    if not bool(target.isfinite().all()):
        raise ValueError("Expected finite gradients of the target's rows, but one is not: leave such rows out.")
    target = target.to(rows.dtype)
    scores, keys = array("d"), array("d")
    for chunk in rows.chunks():
        products = (chunk @ target.mean(dim=0)).double().nan_to_num(math.nan, math.nan, math.nan)
        scores.extend(products.tolist())
        if by == "cosine":
            norms = torch.linalg.vector_norm(chunk, dim=1).double()
            products = torch.where(norms > 0, products / norms, products)
        keys.extend(products.tolist())
    of_all, ranked_by = (torch.frombuffer(one, dtype=torch.float64) for one in (scores, keys))
    order = torch.where(ranked_by.isnan(), -math.inf, ranked_by).argsort(descending=True, stable=True)
    ranks = torch.empty(len(order), dtype=torch.int32)
    ranks[order] = torch.arange(1, len(order) + 1, dtype=torch.int32)
    ranked = int(of_all.isfinite().sum())
    front = order[: min(compared, ranked)]
    best = _directions(rows.some(front.tolist()))
    found = Ranking(
        records=len(scores),
        ranked=ranked,
        target_rows=len(target),
        sketch_error=sketch_error,
        front=max(1, ranked // 10),
    )
    with whole_file(out) as path, path.open("w", encoding="utf-8") as file:
        for one, numbers in zip(records, _numbers(rows, target, ranks, best, sketch_error, of_all), strict=True):
            line = {"id": one["id"], "source": one["source"], **numbers, "loss": one["loss"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            _note(found, {**line, "begins": one["begins"]})
    return found


def _numbers(
    rows: Rows, target: Tensor, ranks: Tensor, best: Tensor, sketch_error: float, scores: Tensor
) -> Iterator[dict[str, Any]]:
    """The numbers of one record after another."""
    m = len(target)
    length = float(torch.linalg.vector_norm(target.mean(dim=0)))
    above = torch.arange(1, len(best) + 1)
    done = 0
    for chunk in rows.chunks():
        own = ranks[done : done + len(chunk)]
        errors = (chunk @ target.T).double().std(dim=1) / m**0.5 if m > 1 else None
        norms = torch.linalg.vector_norm(chunk, dim=1).double()
        cosines = _directions(chunk) @ best.T
        redundancy = torch.where(above < own[:, None], cosines, 0.0).amax(dim=1) if len(best) else norms * 0.0
        for at, norm in enumerate(norms.tolist()):
            score = float(scores[done + at])
            if not math.isfinite(score):
                yield dict.fromkeys(("score", "standard_error", "sketch_error", "cosine", "redundancy", "rank"))
                continue
            yield {
                "score": score,
                "standard_error": None if errors is None else float(errors[at]),
                "sketch_error": sketch_error * norm * length,
                "cosine": score / (norm * length) if norm * length else 0.0,
                "redundancy": min(1.0, max(0.0, float(redundancy[at]))),
                "rank": int(own[at]),
            }
        done += len(chunk)


def _directions(rows: Tensor) -> Tensor:
    """The rows, scaled to length one; zero where they are zero or not finite."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where((norms > 0) & norms.isfinite(), rows / norms, 0.0)


def _note(found: Ranking, line: dict[str, Any]) -> None:
    rank = line["rank"]
    of_source = found.sources[line["source"]]
    of_source.records += 1
    if rank is None:
        return
    of_source.ranked += 1
    of_source.ranks += rank
    of_source.scores += line["score"]
    of_source.in_front += rank <= found.front
    if rank <= SHOWN:
        found.best = nsmallest(SHOWN, [*found.best, line], key=lambda one: one["rank"])
    if rank > found.ranked - SHOWN:
        found.worst = nlargest(SHOWN, [*found.worst, line], key=lambda one: one["rank"])
