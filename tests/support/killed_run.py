"""A training run that can be killed at any moment and started again: python killed_run.py DIRECTORY STEPS EVERY.

Candidates come from damaged JSON lines, a list and a ``datasets`` stream, shuffled; each step is logged in both
formats, and the whole state is saved every few steps. Once DIRECTORY holds a file ``may_end``, it ends, and leaves
``weights.pt`` and ``order.txt`` there.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from ftw_optim import GreedyFilter, SelectiveOptimizer, TargetGradient, token_losses
from ftw_optim.integrations.streaming import CandidateStream, TargetCycle, pad
from ftw_optim.selection_log import SelectionLog

VOCABULARY = 12
FORMATS = ("jsonl", "parquet")


def records(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {"name": f"{name}{i}", "tokens": [(i * k + 1) % VOCABULARY for k in range(2 + i % 5)]} for i in range(count)
    ]


def encode(record: Mapping[str, Any]) -> dict[str, Any]:
    tokens = record["tokens"]
    return {"input_ids": tokens, "labels": [-100, *tokens[1:]], "text": record["name"]}


def candidates(directory: Path) -> CandidateStream:
    lines = [json.dumps(record) for record in records("line", 23)]
    lines[3], lines[11] = "{broken", '{"name": "no tokens", "tokens": []}'
    path = directory / "lines.jsonl"
    path.write_text("\n".join(lines))
    stream = datasets.Dataset.from_list(records("stream", 17)).to_iterable_dataset(num_shards=3)
    return CandidateStream(
        {"lines": path, "list": records("list", 5), "stream": stream},
        encode,
        batch_size=6,
        seed=3,
        passes=None,
        probabilities={"lines": 2.0, "list": 1.0, "stream": 2.0},
        shuffle_buffer=7,
    )


def main(directory: Path, steps: int, every: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Dropout(0.1), nn.LayerNorm(8), nn.Linear(8, VOCABULARY))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(input_ids),)

    network = Logits()
    stream, targets = candidates(directory), TargetCycle(records("target", 7), encode, batch_size=3, seed=5)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(network.parameters(), lr=1e-2),
        network,
        target=TargetGradient(lambda: token_losses(network, pad(next(targets))), refresh_every=2),
        filter=GreedyFilter(keep=3),
    )
    checkpoint = directory / "checkpoint.pt"
    logs = [SelectionLog(directory / name, format=name, overwrite=not checkpoint.exists()) for name in FORMATS]
    order: list[str] = []
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stream.load_state_dict(state["stream"])
        targets.load_state_dict(state["targets"])
        for log, state_of_log in zip(logs, state["logs"], strict=True):
            log.load_state_dict(state_of_log)
        torch.set_rng_state(state["random"])
        order, step = state["order"], state["step"]
    for samples in stream:
        if step == steps:
            break
        step += 1
        batch = pad(samples)
        optimizer.step(lambda batch=batch: token_losses(network, batch))
        assert optimizer.selection is not None
        ids = [sample["sample_id"] for sample in samples]
        sources, texts = ([sample[key] for sample in samples] for key in ("source", "text"))
        for log in logs:
            log.record(step, optimizer.selection, ids=ids, sources=sources, texts=texts)
        order += ids
        (directory / "progress").write_text(str(step))
        if step % every == 0:
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "stream": stream.state_dict(),
                "targets": targets.state_dict(),
                "logs": [log.state_dict() for log in logs],
                "random": torch.get_rng_state(),
                "order": order,
                "step": step,
            }
            torch.save(state, directory / "unfinished.pt")
            (directory / "unfinished.pt").replace(checkpoint)
    for log in logs:
        log.close()
    while not (directory / "may_end").exists():  # a run that is to be killed must not end before
        time.sleep(0.01)
    torch.save(network.state_dict(), directory / "weights.pt")
    (directory / "order.txt").write_text("\n".join(order))
    (directory / "skipped.json").write_text(json.dumps(stream.skipped))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of a skipped record
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
