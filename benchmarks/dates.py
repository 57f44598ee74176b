"""Questions about dates, few of them with the right answer: what the quick starts train on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftw_optim.selection_log import SelectionLog, read_log

MIXED = ("right",) * 4 + ("missing",) * 6 + ("weekday",) * 6
"""What the answers of sixteen records of a noisy stream are."""


def questions(answers: Iterable[str], *, seed: int) -> list[dict[str, str]]:
    """One question about a random day for each of ``"right"``, ``"missing"`` and ``"weekday"``, answered so."""
    draw, asked = random.Random(seed), []
    for kind in answers:
        day = date.fromordinal(draw.randrange(700_000, 740_000))  # 1917 to 2027
        answer = {"right": day.isoformat(), "missing": "TODO", "weekday": f"{day:%A}"}[kind]
        asked.append({"prompt": f"{day:%d %B %Y}, in ISO format:", "completion": f" {answer}", "source": kind})
    return asked


def encoded(records: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The tokens of each record, with labels on its answer alone, beside its source."""
    rows = []
    for record in records:
        prompt, answer = (tokenizer(record[part])["input_ids"] for part in ("prompt", "completion"))
        labels = [-100] * len(prompt) + answer
        rows.append({"input_ids": prompt + answer, "labels": labels, "source": record["source"]})
    return rows


def shares(log: SelectionLog) -> str:
    """The share of each source in the weight of the candidates of a run, by its log, which is closed."""
    log.close()
    weights: Counter[str] = Counter()
    for row in read_log(log.directory).candidates():
        weights[row["source"]] += row["weight"]
    return said(weights)


def said(weights: Counter[str]) -> str:
    """Weights by source as shares, in percent."""
    return ", ".join(f"{source} {weight / weights.total():.0%}" for source, weight in weights.most_common())
