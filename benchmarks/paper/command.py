"""The command line of ``paper.py``, the arms of the paper's tables, and the table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from machine import hardware
from pays import command as pays
from pays.arms import ARMS
from pays.records import Record, in_random_order
from pays.report import paired_difference
from pays.runs import Run
from pays.tiny import generated_records, generated_target, tiny_model
from pretrained import pretrained

from .scoring import SHOTS, scorer
from .sources import LETTERS, pool_records, task_records

TABLE = [
    *("adamw-n", "adamw-k", "gradmatch", "tracin", "less", "greats", "ftw"),
    *("target-n", "target+random", "target+similarity", "target+learned"),
]
"""The arms of the paper's tables, and those that they leave out."""
BASELINE = "adamw-k"
QUICK = {
    "steps": 4,
    "candidates": 20,
    "target_rows": 8,
    "questions": 6,
    "lora": 2,
    "seeds": 2,
    "test_rows": 6,
    "pool_rows": 6,
    "max_length": 64,
    "longest_prompt": 96,
    "read_ahead": 40,
}


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """The command line, checked; what it shares with ``pays.py`` has the same names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", choices=sorted(SHOTS), default="mmlu", help="(%(default)s)")
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B", help="directory or hub name (%(default)s)")
    parser.add_argument("--pool", help="JSON lines with prompt and response; default: a mixture on the hub")
    parser.add_argument("--pool-records", type=int, default=100_000, help="read of that mixture (%(default)s)")
    parser.add_argument("--target", help="examples of the task, of local questions")
    parser.add_argument("--test", help="test questions; for MMLU with the fields choices and answer")
    parser.add_argument("--target-rows", type=int, default=285, help="used, a quarter for validation (%(default)s)")
    parser.add_argument("--questions", type=int, default=2000, help="that are scored (%(default)s)")
    parser.add_argument("--test-rows", type=int, default=128, help="whose loss is followed (%(default)s)")
    parser.add_argument("--pool-rows", type=int, default=64, help="of the pool, whose loss is followed (%(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer records are left out (%(default)s)")
    parser.add_argument("--longest-prompt", type=int, default=2048, help="tokens of a scored question (%(default)s)")
    parser.add_argument("--score-batch", type=int, default=16, help="questions scored at a time (%(default)s)")
    parser.add_argument("--budget", type=float, default=0.05, help="share of the stream that is kept (%(default)s)")
    parser.add_argument("--candidates", type=int, default=80, metavar="N", help="records of a step (%(default)s)")
    parser.add_argument("--target-batch", type=int, default=8, metavar="M", help="target rows of a step (%(default)s)")
    parser.add_argument("--read-ahead", type=int, default=1024, help="records a proposal reads (%(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="(%(default)s)")
    parser.add_argument("--lora", type=int, default=128, metavar="RANK", help="on all layers (%(default)s)")
    parser.add_argument("--lr", nargs="+", default=[], metavar="FAMILY=LR", help="default: 2e-5 for each family")
    parser.add_argument("--arms", nargs="+", default=TABLE, metavar="ARM", help=f"default: {' '.join(TABLE)}")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="for example cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny random model on generated records")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; what is there is not run again")
    options = parser.parse_args(arguments)
    if options.quick:
        pays.make_quick(options, parser, QUICK)
    if (options.target is None) != (options.test is None):
        parser.error("--target and --test go together")
    options.keep = round(options.budget * options.candidates)
    if options.keep < 1:
        parser.error(f"--budget {options.budget} of --candidates {options.candidates} keeps nothing: raise one of them")
    return options


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> str:
    """Runs the comparison, or what is missing of it; prints the table, writes it, and returns it."""
    options = parse_arguments(arguments, description=description)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    if options.quick:
        model, tokenizer = tiny_model()
        pool, (target, test) = generated_records(400, seed=0), _generated_task(options.task)
    else:
        model, tokenizer = pretrained(options.model)
        pool = pool_records(options.pool, options.pool_records)
        target, test = task_records(options.task, options.target, options.test)
    shared = _for_pays(options, blocks=len(model.model.layers))
    lab, store = pays.prepare(shared, [pool, target, test], model, tokenizer)
    lab.keep_states = False  # the trunk is the embedding alone
    questions = in_random_order(test, seed=1)[: options.questions]
    lab.score = scorer(
        options.task,
        model,  # the top shares its layers, and LoRA
        tokenizer,
        target,
        questions,
        batch=options.score_batch,
        longest=options.longest_prompt,
    )
    store.once("hardware", lambda: hardware(options.device))
    store.once("calibration", lab.calibration)
    store.once("zero-shot", lab.zero_shot)
    before = store.once("zero-shot-scores", lambda: _untrained(lab))
    runs = [
        Run(arm=arm, steps=options.steps, lr=shared.rates[ARMS[arm].family], seed=seed)
        for seed in range(options.seeds)
        for arm in options.arms
    ]
    pays.perform(lab, store, runs)
    text = table([store.load(run) for run in runs], before, task=options.task)
    text = (
        f"{json.dumps(store.once('hardware', dict))}\n{options.model if not options.quick else 'tiny model'}\n\n{text}"
    )
    print(f"\n{text}")
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    return text


def _untrained(lab: pays.Lab) -> list[float]:
    lab.top.reset(0)
    assert lab.score is not None
    return lab.score()


def _for_pays(options: argparse.Namespace, *, blocks: int) -> argparse.Namespace:
    """The options of ``pays.py`` for this set-up."""
    arguments = ["--pool", "", "--target", "", "--test", "", "--out", str(options.out), "--lr"]
    arguments += options.lr or ["guide=2e-5", "target=2e-5"]
    shared = pays.parse_arguments([*arguments, "--arms", *options.arms])
    for name, value in vars(options).items():
        if hasattr(shared, name) and name not in ("arms", "lr"):
            setattr(shared, name, value)
    shared.blocks = blocks
    return shared


def table(runs: Sequence[Run], before: Sequence[float], *, task: str) -> str:
    """Scores in per cent, means over questions and seeds, with the difference to random records and its interval."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    scores: Mapping[str, torch.Tensor] = {
        arm: 100 * torch.tensor([run.scores for run in of_arm], dtype=torch.float64) for arm, of_arm in by_arm.items()
    }
    name = "accuracy" if task == "mmlu" else "F1"
    lines = [f"{'':24}{name:>9}   beside {ARMS[BASELINE].label}", f"{'zero-shot':24}{100 * _mean(before):>9.2f}"]
    for arm, found in scores.items():
        line = f"{ARMS[arm].label:24}{float(found.mean()):>9.2f}"
        if arm != BASELINE and BASELINE in scores:
            mean, low, high = paired_difference(found, scores[BASELINE])
            line += f"   {mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _generated_task(task: str) -> tuple[list[Record], list[Record]]:
    """Examples and questions about sums, by letter or in words."""
    target, test = generated_target(40, seed=1), generated_target(40, seed=2)
    if task == "tydiqa":
        return target, test
    return tuple(
        [
            {**record, "response": LETTERS[at % 4], "choices": [str(at + one) for one in range(4)], "answer": at % 4}
            for at, record in enumerate(records)
        ]
        for records in (target, test)
    )
