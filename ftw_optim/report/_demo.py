"""A small run on generated data, for a first look at a page: sums, among which few are right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim._matching.filters import GreedyFilter
from ftw_optim._step.losses import token_losses
from ftw_optim._step.optimizer import SelectiveOptimizer
from ftw_optim._step.target import TargetGradient
from ftw_optim.selection_log import SelectionLog

DEMO = Path("runs", "demo")
"""The directory of the demonstration's log and page."""
STEPS, OFFERED, KEPT = 60, 16, 4
_WORDS = ("river", "lamp", "cloud", "seven", "garden", "paper", "slow", "north", "green", "often")
_SHARES = {"sums": 0.25, "sums, wrong": 0.25, "sums, no answer": 0.25, "words": 0.25}


def record_demo(directory: Path) -> None:
    """Train a model of single characters on the sums among other texts, and log which ones its optimizer picks.

    The target is a few right sums; of four texts that are offered, one is a right sum. It takes a few seconds, and is
    the same at each call but for the times. A log that ``directory`` holds is replaced.
    """
    draw = random.Random(0)
    pool = [(source, _text(source, draw)) for source in draw.choices([*_SHARES], [*_SHARES.values()], k=480)]
    target, held_out = (_batch([_text("sums", draw) for _ in range(count)]) for count in (32, 32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _NextCharacter()
        optimizer = SelectiveOptimizer(
            torch.optim.AdamW(model.parameters(), lr=2e-3),
            model,
            TargetGradient(lambda: token_losses(model, target), held_out=lambda: token_losses(model, held_out)),
            filter=GreedyFilter(keep=KEPT),
        )
        with SelectionLog(directory, overwrite=True) as log:
            for step in range(STEPS):
                _record_step(optimizer, model, log, step, draw.sample(range(len(pool)), OFFERED), pool, target)


def _record_step(
    optimizer: SelectiveOptimizer,
    model: nn.Module,
    log: SelectionLog,
    step: int,
    offered: Sequence[int],
    pool: Sequence[tuple[str, str]],
    target: dict[str, Tensor],
) -> None:
    sources, texts = zip(*(pool[number] for number in offered), strict=True)
    before = _mean_loss(model, target)
    optimizer.step(lambda: token_losses(model, _batch(texts)))
    assert optimizer.selection is not None
    log.record(
        step,
        optimizer.selection,
        ids=[f"text {number}" for number in offered],
        sources=sources,
        texts=texts,
        metrics={"realised_decrease": before - _mean_loss(model, target)},
    )


@final
class _NextCharacter(nn.Module):
    """Scores the next character by the four last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, 24)
        self.last = nn.Conv1d(24, 64, kernel_size=4)
        self.norm = nn.LayerNorm(64)
        self.next = nn.Linear(64, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of shape ``(n, t, 128)`` for ``(n, t)`` characters."""
        seen = self.last(functional.pad(self.characters(input_ids).mT, (3, 0)))
        scores: Tensor = self.next(self.norm(functional.gelu(seen.mT)))
        return scores


def _text(source: str, draw: random.Random) -> str:
    if source == "words":
        return " ".join(draw.choices(_WORDS, k=4))
    left, right = draw.randrange(10, 50), draw.randrange(10, 50)
    answers = {"sums": str(left + right), "sums, wrong": str(draw.randrange(100, 1000)), "sums, no answer": "?"}
    return f"{left} + {right} = {answers[source]}"


def _batch(texts: Sequence[str]) -> dict[str, Tensor]:
    """Characters as their codes, padded with zeros, of which no loss is counted."""
    rows = [torch.tensor([*text.encode(), 10]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


def _mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(token_losses(model, batch).mean())
