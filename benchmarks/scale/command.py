"""The command line of ``scale.py``, and what it measures under ``torchrun``."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from machine import hardware
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from ftw_optim import GreedyFilter, SelectiveOptimizer, token_losses

from .counted import counted
from .model import Speeds, table

COUNTED = (8, 64, 1024)


def main(arguments: Sequence[str] | None = None, *, description: str | None = None) -> None:
    """Measures, or counts and predicts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="count bytes and predict times, in one process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the model (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--candidates", type=int, default=4, help="of each rank (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of a candidate (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    parser.add_argument("--training", type=float, default=400, help="TFLOP/s of the model (%(default)s)")
    parser.add_argument("--inside", type=float, default=300, help="GB/s within a node (%(default)s)")
    parser.add_argument("--across", type=float, default=40, help="GB/s beyond it (%(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.layers, options.tokens, options.rounds = 32, 2, 16, 3
    if options.simulate:
        simulate(options)
    else:
        measure(options)


def simulate(options: argparse.Namespace) -> None:
    """Prints the counted bytes beside the formulas, and the predictions."""
    for shards in (False, True):
        name = "FSDP2" if shards else "DDP"
        print(
            f"{name:6}{'ranks':>6}{'exchange':>12}{'formula':>12}{'sums':>14}{'formula':>14}{'objects':>12}   "
            "bytes that a rank sends"
        )
        for ranks in COUNTED[:2] if options.quick else COUNTED:
            found = counted(ranks, shards=shards)
            print(
                f"{'':6}{ranks:>6}{found.sent['exchange']:>12,}{found.expected['exchange']:>12,}"
                f"{found.sent['sums']:>14,}{found.expected['sums']:>14,}{found.sent['objects']:>12,}"
            )
    speeds = Speeds(training=1e12 * options.training, inside=1e9 * options.inside, across=1e9 * options.across)
    print(f"\n{table((8, 64) if options.quick else (8, 64, 512, 1024), speeds)}")


def measure(options: argparse.Namespace) -> None:
    """Times steps of this run's processes, and prints them on the first rank."""
    on_gpu = options.device == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank % torch.cuda.device_count()}" if on_gpu else "cpu"
    torch.set_num_threads(1)
    plain, _, _ = arm(options, device, selective=False)
    ours, optimizer, model = arm(options, device, selective=True)
    times: dict[str, list[float]] = {"plain": [], "selective": []}
    phases: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):
        for name, step in (("plain", plain), ("selective", ours)):
            dist.barrier()
            start = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize(device)
            if number:  # the first meets cold caches
                times[name].append(time.perf_counter() - start)
        if number and optimizer is not None and optimizer.selection is not None:
            for name, value in optimizer.selection.milliseconds.items():
                phases.setdefault(name, []).append(value)
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    everywhere = [torch.empty_like(sums) for _ in range(ranks)]
    dist.all_gather(everywhere, sums)
    if rank == 0:
        same = all(torch.equal(everywhere[0], other) for other in everywhere)
        ratios = sorted(b / a for a, b in zip(times["plain"], times["selective"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        print(", ".join(f"{key} {value}" for key, value in hardware(device).items()))
        print(
            f"{ranks} ranks, each with {options.candidates} candidates of {options.tokens} tokens; {options.layers} "
            f"layers of width {options.width}, all parameters; parameters equal on all ranks: {same}"
        )
        print(f"plain DDP {1e3 * statistics.median(times['plain']):.0f} ms a step")
        print(f"selective / plain {statistics.median(ratios):.2f} ({quartiles[0]:.2f} - {quartiles[2]:.2f})")
        print("milliseconds: " + ", ".join(f"{name} {statistics.median(own):.1f}" for name, own in phases.items()))
    dist.destroy_process_group()


def arm(
    options: argparse.Namespace, device: str, *, selective: bool
) -> tuple[Callable[[], None], SelectiveOptimizer | None, torch.nn.Module]:
    """A function that makes a step, its optimizer and its model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max(64, options.tokens),
        use_cache=False,
    )
    model = DistributedDataParallel(LlamaForCausalLM(config).to(device))
    generator = torch.Generator().manual_seed(dist.get_rank())

    def batch(rows: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 512, (rows, options.tokens), generator=generator).to(device)
        return {"input_ids": tokens, "labels": tokens}

    inner = torch.optim.AdamW(model.parameters(), lr=1e-4)
    candidates, targets = batch(options.candidates), batch(max(1, options.candidates // 4))
    if not selective:

        def plain() -> None:
            inner.zero_grad()
            token_losses(model, candidates).mean().backward()
            inner.step()

        return plain, None, model
    optimizer = SelectiveOptimizer(
        inner,
        model,
        lambda: token_losses(model, targets),
        filter=GreedyFilter(keep=0.25),
        self_check=False,
    )
    return lambda: optimizer.step(lambda: token_losses(model, candidates)), optimizer, model
