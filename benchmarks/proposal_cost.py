"""What a proposal costs, beside a step: to choose among 256 records read, and among 100,000 found by number.

    python benchmarks/proposal_cost.py            # about three minutes

The records are docstrings of this Python installation, at most 128 tokens each. A step is AdamW's, plain or selective,
of SmolLM2-135M-Instruct with LoRA on every linear layer and 12 candidates; 4 target rows guide. In every round each
proposal chooses 12 of the same 256 records and is told the scores of a step, and the steps run between. Features are
computed anew each time for records that are read, and once for those that are found by number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from finetune.corpus import build_corpus
from machine import hardware
from pays.records import encoder, shuffled_examples
from peft import LoraConfig, get_peft_model
from pretrained import pretrained
from tqdm import tqdm

from ftw_optim import GreedyFilter, SelectiveOptimizer, token_losses
from ftw_optim.integrations.streaming import pad
from ftw_optim.proposals import (
    LearnedProposal,
    ProposedSampler,
    SimilarityProposal,
    UniformProposal,
    VettedProposal,
)

Rows = list[dict[str, Any]]
CANDIDATES, TARGET_ROWS, MAX_LENGTH = 12, 4, 128


def proposals(target: Rows) -> dict[str, Callable[[], Any]]:
    """The proposals by name, each made anew when it is called."""
    return {
        "uniform": UniformProposal,
        "likeness": lambda: SimilarityProposal(target),
        "learned": lambda: LearnedProposal(target),
        "vetted": lambda: VettedProposal(target),
        "tested": lambda: VettedProposal(target, order="tested"),
    }


def records(tokenizer: Any, count: int) -> tuple[Rows, Rows]:
    """Encoded docstrings of the pool, and target rows."""
    corpus, encode = build_corpus(TARGET_ROWS, 1), encoder(tokenizer, MAX_LENGTH)
    rows = [
        [
            {
                "input_ids": torch.tensor(one.tokens),
                "labels": torch.tensor([-100] * one.prompt_length + one.tokens[one.prompt_length :]),
                "source": one.source,
            }
            for one in shuffled_examples(part, encode, number, seed=0)[0]
        ]
        for part, number in ((corpus.pool, count), (corpus.target, TARGET_ROWS))
    ]
    return rows[0], rows[1]


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """The time of one call, and what it returned."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def beside_steps(model: Any, pool: Rows, target: Rows, *, read: int, rounds: int) -> None:
    """Print what each proposal takes of a step."""
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def losses(rows: Rows) -> torch.Tensor:
        tensors = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        return token_losses(model, pad(tensors))

    def plain(rows: Rows) -> None:
        adamw.zero_grad()
        losses(rows).mean().backward()
        adamw.step()

    selective = SelectiveOptimizer(adamw, model, lambda: losses(target), filter=GreedyFilter(keep=4))
    made = {name: make() for name, make in proposals(target).items()}
    spent: dict[str, list[float]] = {name: [] for name in ("plain", "selective", *made)}
    for turn in tqdm(range(rounds + 1), unit="round", desc="steps"):
        offered = pool[turn * read : (turn + 1) * read]
        took = {}
        for name, proposal in made.items():
            took[name], _ = seconds(lambda: proposal.propose(offered, CANDIDATES))  # noqa: B023
        rows = offered[:CANDIDATES]
        took["plain"], _ = seconds(lambda: plain(rows))  # noqa: B023
        took["selective"], _ = seconds(lambda: selective.step(lambda: losses(rows)))  # noqa: B023
        for name, proposal in made.items():
            took[name] += seconds(lambda: proposal.observe(rows, selective.selection))[0]  # noqa: B023
        if turn:  # the first one is to get warm
            for name, one in took.items():
                spent[name].append(one)
    print(f"\nAmong {read} records read: median of {rounds} rounds (least and greatest)\n")
    print("                     ms                    of a plain step   of a selective one")
    for name, times in spent.items():
        shares = [
            statistics.median(a / b for a, b in zip(times, spent[step], strict=True))
            for step in spent
            if step in ("plain", "selective")
        ]
        low, middle, high = (1e3 * one for one in (min(times), statistics.median(times), max(times)))
        print(f"{name:12} {middle:9.1f} ({low:7.1f} {high:7.1f})  {100 * shares[0]:14.2f} %  {100 * shares[1]:16.2f} %")


def by_number(pool: Rows, target: Rows, *, count: int, batches: int) -> None:
    """Print what each proposal takes where it chooses among all records of a data set."""
    data = [pool[i % len(pool)] for i in range(count)]
    print(f"\nAmong all {count:,} records of a data set, found by number\n")
    print("             first batch, with all features, s    later ones, ms: median (least and greatest)")
    for name, make in proposals(target).items():
        numbers = iter(ProposedSampler(data, make(), count=CANDIDATES))
        first, later = seconds(lambda: [next(numbers) for _ in range(CANDIDATES)])[0], []  # noqa: B023
        for _ in range(batches):
            later.append(1e3 * seconds(lambda: [next(numbers) for _ in range(CANDIDATES)])[0])  # noqa: B023
        print(f"{name:12} {first:34.1f}    {statistics.median(later):8.1f} ({min(later):.1f} {max(later):.1f})")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or name of a causal language model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--read", type=int, default=256, help="records read for a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--records", type=int, default=100_000, help="of the data set (%(default)s)")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in hardware("cpu").items()))
    model, tokenizer = pretrained(options.model)
    pool, target = records(tokenizer, (options.rounds + 1) * options.read)
    beside_steps(model, pool, target, read=options.read, rounds=options.rounds)
    by_number(pool, target, count=options.records, batches=5)


if __name__ == "__main__":
    main()
