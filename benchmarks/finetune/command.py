"""The command line of ``finetune.py``, and the comparison that it asks for."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import transformers
from machine import hardware
from tqdm import tqdm

from .arms import ARMS, Options, Run, Task
from .corpus import build_corpus
from .models import load_model, small_gpt
from .records import (
    Records,
    encoder,
    first_examples,
    halves,
    in_random_order,
    open_records,
    shuffled_examples,
)
from .report import Report, print_table, write_picture, write_results

LEARNING_RATES = {"small": [1e-4, 3e-4, 1e-3], "full": [1e-5, 3e-5, 1e-4], "lora": [1e-4, 3e-4, 1e-3]}
EMBEDDED_TARGET_RECORDS = 160
VALIDATION_SHARE = 0.25
QUICK = {
    "steps": 8,
    "eval_every": 4,
    "lrs": [1e-3, 2e-3],
    "test_records": 64,
    "warm_up_steps": 40,
    "out": Path("runs/finetune-quick"),
}


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """The command line, with defaults that depend on one another filled in."""
    parser = argparse.ArgumentParser(description=description)
    data = parser.add_argument_group("data", "JSON-lines files (gzip too) or data sets, NAME[:CONFIG][:SPLIT]")
    data.add_argument("--pool", help="the stream's records; default: docstrings of this Python installation")
    data.add_argument("--target", help="examples of the target, a quarter of them for choosing learning rates")
    data.add_argument("--test", help="held-out examples of the target")
    data.add_argument("--test-records", type=int, default=256, help="how many of them are used (%(default)s)")
    data.add_argument("--max-length", type=int, default=64, help="tokens of a record (%(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="directory or hub name; default: a small GPT, warmed up on the mixture")
    model.add_argument("--lora", type=int, default=0, metavar="RANK", help="train LoRA adapters only")
    model.add_argument("--device", default="cpu", help="for example cuda (%(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--candidates", type=int, default=16, metavar="N", help="per step (%(default)s)")
    method.add_argument("--keep", type=int, default=4, metavar="K", help="of them (%(default)s)")
    method.add_argument("--target-batch", type=int, default=8, help="per target gradient (%(default)s)")
    method.add_argument("--anchor", type=float, default=0.1, help="of the arm that keeps all (%(default)s)")
    method.add_argument("--refresh-every", type=int, default=4, help="its target gradient (%(default)s steps)")
    runs = parser.add_argument_group("runs")
    runs.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    runs.add_argument("--eval-every", type=int, default=10, help="steps (%(default)s)")
    runs.add_argument("--lrs", type=float, nargs="+", help="grid of learning rates")
    runs.add_argument("--seeds", type=int, default=2, help="how many (%(default)s)")
    runs.add_argument("--seed", type=int, default=0, help="the first of them (%(default)s)")
    runs.add_argument("--warm-up-steps", type=int, default=300, help="of the small GPT (%(default)s)")
    runs.add_argument("--sequential", action="store_true", help="one arm after the other, for a large model")
    runs.add_argument("--quick", action="store_true", help="a shortened form; its figures mean nothing")
    runs.add_argument("--cache", type=Path, default=Path("runs/cache"), help="warmed-up models (%(default)s)")
    runs.add_argument("--out", type=Path, default=Path("runs/finetune"), help="results (%(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    if len({options.pool is None, options.target is None, options.test is None}) == 2:
        parser.error("--pool, --target and --test go together")
    if options.keep > options.candidates:
        parser.error(f"--keep {options.keep} exceeds --candidates {options.candidates}")
    if options.lrs is None:
        options.lrs = LEARNING_RATES["small" if options.model is None else "lora" if options.lora else "full"]
    options.lrs.sort()
    return options


def open_data(options: argparse.Namespace) -> tuple[Records, Records, Records]:
    """Pool, target and test records."""
    if options.pool is None:
        return build_corpus(EMBEDDED_TARGET_RECORDS, options.test_records)
    return open_records(options.pool), open_records(options.target), open_records(options.test)


def choose_learning_rates(task: Task, lrs: Sequence[float], seed: int, progress: tqdm) -> dict[str, dict[float, float]]:
    """Each arm's loss after a whole run at each learning rate; infinite where it diverged."""
    losses: dict[str, dict[float, float]] = {arm: {} for arm in ARMS}
    for arm in ARMS:
        for lr in lrs:
            run = Run(arm=arm, lr=lr, seed=seed)
            task.perform([run], progress)
            losses[arm][lr] = run.losses[-1] if math.isfinite(run.losses[-1]) else math.inf
    return losses


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> Report:
    """Runs the comparison, prints the table, and writes ``results.json`` and the picture."""
    options = parse_arguments(arguments, description=description)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    pool, target_records, test_records = open_data(options)
    name = options.model
    if name is None:
        mixture, pool = halves(pool)
        name = small_gpt(mixture, options.cache, steps=options.warm_up_steps)
    model, tokenizer = load_model(str(name), lora=options.lora, device=options.device)

    encode = encoder(tokenizer, options.max_length)
    given, skipped = first_examples(in_random_order(target_records, seed=0), encode, sys.maxsize)
    test, test_skipped = first_examples(in_random_order(test_records, seed=0), encode, options.test_records)
    held_back = math.ceil(VALIDATION_SHARE * len(given))
    validation, target = given[:held_back], given[held_back:]
    if not target or not test:
        raise ValueError("The target needs two records or more with a response within --max-length, the test one.")
    streams = {}
    for seed in range(options.seed, options.seed + options.seeds):
        count = options.steps * options.candidates
        stream, stream_skipped = shuffled_examples(pool, encode, count, seed=seed)
        streams[seed] = [stream[at : at + options.candidates] for at in range(0, count, options.candidates)]
        skipped += stream_skipped

    common = Options(
        candidates=options.candidates,
        keep=options.keep,
        target_batch=options.target_batch,
        anchor=options.anchor,
        refresh_every=options.refresh_every,
        device=options.device,
    )
    steps_in_all = (options.steps + 1) * len(ARMS) * (len(options.lrs) + options.seeds)
    with tqdm(total=steps_in_all, unit="step") as progress:
        progress.set_description("learning rates")
        tuning = Task(
            model=model,
            stream=streams[options.seed],
            target=target,
            evaluation=validation,
            evaluated_at=[options.steps],
            options=common,
        )
        validation_losses = choose_learning_rates(tuning, options.lrs, options.seed, progress)
        best = {arm: min(losses, key=losses.__getitem__) for arm, losses in validation_losses.items()}
        progress.set_description("runs")
        runs = []
        for seed, stream in streams.items():
            task = replace(
                tuning,
                stream=stream,
                evaluation=test,
                evaluated_at=sorted({*range(0, options.steps, options.eval_every), options.steps}),
            )
            started = [Run(arm=arm, lr=best[arm], seed=seed) for arm in ARMS]
            for group in [[run] for run in started] if options.sequential else [started]:
                task.perform(group, progress)
            runs += started

    report = Report(
        arguments={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        hardware=hardware(options.device),
        sizes={
            "parameters": sum(param.numel() for param in model.parameters()),
            "trained": sum(param.numel() for param in model.parameters() if param.requires_grad),
            "target": len(target),
            "validation": len(validation),
            "test": len(test),
            "skipped": skipped + test_skipped,
        },
        options=common,
        validation_losses=validation_losses,
        runs=runs,
        offered={
            seed: [Counter(example.source for example in batch) for batch in stream] for seed, stream in streams.items()
        },
    )
    print_table(report)
    write_results(report, options.out)
    write_picture(report, options.out)
    return report
