"""What a selective step costs beside a plain AdamW step on the same candidates, and where the time goes.

    python benchmarks/step_cost.py                 # the points with a goal, about 15 minutes on 2 cores
    python benchmarks/step_cost.py --grid          # over n, t, width, LoRA rank and scored share
    python benchmarks/step_cost.py --quick         # one small point, seconds

All arms of a point run interleaved in one process, each on its own copy of the same model; reported are medians and
quartiles of ratios, step by step, to the plain step. The floor is arithmetic that no implementation of the method can
leave out, at the usual thirds (forward, input gradient, weight gradient): see the README. The Gram matrix is compared
with that of gradients formed one candidate at a time in float64. Peak memory is of a process of its own for each arm.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, TargetGradient, last_blocks, token_losses

VOCABULARY = 512


@dataclass(frozen=True)
class Point:
    """One configuration: a Llama of ``layers`` layers, ``n`` candidates and ``m`` targets of ``t`` tokens."""

    name: str
    width: int = 384
    layers: int = 4
    t: int = 512
    n: int = 16
    k: int = 4
    m: int = 4
    r: int = 1
    update: str = "factors"
    scored: int = 0  # last blocks; 0: all
    lora: int = 0
    dtype: str = "float32"

    @property
    def share(self) -> float:
        """Of the model's work, at and after the first scored layer."""
        return self.scored / self.layers if self.scored else 1.0

    def floor(self) -> float:
        """Cost beside a plain step."""
        target = self.m / (self.r * self.n)
        if self.update == "graph":
            return 1 + 2 * self.share / 3 + (1 / 3 + 2 * self.share / 3) * target
        combine = {"factors": 0.0 if self.lora else self.k / (3 * self.n), "rerun": self.k / self.n}[self.update]
        return 1 + target + combine


GOALS = [
    Point("all scored, factors"),
    Point("last block scored, graph", layers=8, k=16, m=8, r=4, update="graph", scored=1),
    Point("t 256", t=256, n=16, layers=2),
    Point("t 512", t=512, n=8, k=2, m=2, layers=2),
    Point("t 1024", t=1024, n=4, k=1, m=1, layers=2),
    Point("LoRA rank 16, t 1024", t=1024, layers=2, lora=16),
]
MEMORY = [
    Point(f"memory, {update}", width=256, layers=8, t=512, n=16, update=update, scored=scored)
    for update, scored in (("factors", 0), ("graph", 1), ("rerun", 0))
]
QUICK = [Point("quick", width=64, layers=2, t=64, n=8, k=2, m=2)]
GRID = [
    replace(
        Point(f"width {width}, t {t}, n {n}, {update}{', LoRA 16' if lora else ''}"),
        width=width,
        layers=2,
        t=t,
        n=n,
        k=max(1, n // 4),
        m=max(1, n // 4),
        update=update,
        lora=lora,
    )
    for width in (128, 384)
    for t, n in ((64, 16), (256, 16), (1024, 4), (64, 64))
    for update, lora in (("factors", 0), ("graph", 0), ("rerun", 0), ("factors", 16))
]


def build_model(point: Point) -> nn.Module:
    """A random Llama, with LoRA adapters if asked for."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=point.width,
        intermediate_size=4 * point.width,
        num_hidden_layers=point.layers,
        num_attention_heads=max(1, point.width // 64),
        max_position_embeddings=point.t,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    if point.lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=point.lora, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return model.to(getattr(torch, point.dtype)).train()


def batch(count: int, t: int, seed: int, device: str) -> dict[str, Tensor]:
    """Tokens that are drawn at random."""
    ids = torch.randint(VOCABULARY, (count, t), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids}


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain_arm(point: Point, device: str) -> Callable[[int], None]:
    """One step of AdamW on all candidates."""
    model = build_model(point).to(device)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4)

    def step(number: int) -> None:
        optimizer.zero_grad()
        token_losses(model, batch(point.n, point.t, number, device)).mean().backward()
        optimizer.step()

    return step


def selective_arm(point: Point, device: str) -> tuple[Callable[[int], None], SelectiveOptimizer]:
    """One selective step."""
    model = build_model(point).to(device)
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(trained(model), lr=1e-4),
        model,
        TargetGradient(lambda: token_losses(model, batch(point.m, point.t, 10**6, device)), refresh_every=point.r),
        filter=KeepAll() if point.k == point.n else GreedyFilter(keep=point.k),
        update=point.update,
        scored=last_blocks(model, point.scored) if point.scored else None,
        self_check=False,
    )

    def step(number: int) -> None:
        candidates = batch(point.n, point.t, number, device)

        def losses(rows: Tensor | None = None) -> Tensor:
            some = candidates if rows is None else {key: value[rows] for key, value in candidates.items()}
            return token_losses(model, some)

        optimizer.step(losses)

    return step, optimizer


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(step: Callable[[int], None], numbers: list[int], device: str) -> float:
    """Of a step, over some steps."""
    wait(device)
    start = time.perf_counter()
    for number in numbers:
        step(number)
    wait(device)
    return (time.perf_counter() - start) / len(numbers)


PHASES = {
    "target": ("ftw_optim._target", "TargetGradient.gradients"),
    "capture (forward of the candidates included)": ("ftw_optim._capture", "Capture.__enter__"),
    "backward to the factors": ("ftw_optim._capture", "Capture.differentiate"),
    "Gram matrix": ("ftw_optim._gram", "GramSums.add"),
    "filter and weight": ("ftw_optim._decision", "select"),
    "combine": ("ftw_optim._decision", "combined_gradients"),
    "inner step": ("torch.optim.adamw", "AdamW.step"),
}


@contextmanager
def phase_clock(spent: dict[str, float], device: str) -> Iterator[None]:
    """Adds up the seconds spent in each phase; the forward pass is what is left of the step."""
    restored: list[tuple[Any, str, Any]] = []
    for label, (module, path) in PHASES.items():
        if "__enter__" in path:
            continue
        *owners, name = path.split(".")
        owner: Any = sys.modules[module]
        for part in owners:
            owner = getattr(owner, part)
        function = getattr(owner, name)
        restored.append((owner, name, function))

        def timed(*args: Any, _function: Any = function, _label: str = label, **kwargs: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            try:
                return _function(*args, **kwargs)
            finally:
                wait(device)
                spent[_label] = spent.get(_label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
    try:
        yield
    finally:
        for owner, name, function in restored:
            setattr(owner, name, function)


def measure(point: Point, repeats: int, device: str) -> dict[str, Any]:
    """Ratios to the plain step, phases, and the error of the Gram matrix."""
    plain = plain_arm(point, device)
    ours, optimizer = selective_arm(point, device)
    for number in range(2):
        plain(number)
        ours(number)
    ratios, base = [], []
    for repeat in range(repeats):
        numbers = [2 + repeat * point.r + i for i in range(point.r)]
        one = seconds(plain, numbers, device)
        two = seconds(ours, numbers, device)
        base.append(one)
        ratios.append(two / one)
    spent: dict[str, float] = {}
    with phase_clock(spent, device):
        total = seconds(ours, list(range(1000, 1000 + point.r)), device) * point.r
    spent["forward and the rest"] = total - sum(spent.values())
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "point": asdict(point),
        "plain_ms": 1e3 * statistics.median(base),
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "floor": point.floor(),
        "over_floor": statistics.median(ratios) / point.floor(),
        "phases_ms": {label: 1e3 * value / point.r for label, value in spent.items()},
        "update": None if optimizer.selection is None else optimizer.selection.update,
    }


# ---------------------------------------------------------------------- memory, each arm in a process of its own


def peak_bytes(point: Point, arm: str, device: str) -> int:
    """Highest memory of three steps, above what the process held when model and optimizer stood."""
    step = plain_arm(point, device) if arm == "plain" else selective_arm(point, device)[0]
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    held = held_bytes(device)
    for number in range(3):
        step(number)
    if device != "cpu":
        return torch.cuda.max_memory_allocated() - held
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - held


def held_bytes(device: str) -> int:
    """What the process holds now."""
    if device != "cpu":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_in_a_process(point: Point, arm: str, device: str) -> int:
    """:func:`peak_bytes`, of a fresh process."""
    command = [sys.executable, __file__, "--peak", json.dumps(asdict(point)), "--arm", arm, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------------- the Gram matrix, and how else to come by it


def gram_of_gradients(rows: Tensor, factor: Tensor) -> Tensor:
    """``<g_i, P g_j>`` of whole gradients ``(n, d)``."""
    return (rows * factor) @ rows.T


def table(results: list[dict[str, Any]]) -> str:
    """As it is printed and kept."""
    lines = [f"{'':<34}{'plain ms':>9}{'ratio':>8}{'quartiles':>15}{'floor':>7}{'x floor':>9}  memory beside plain"]
    for found in results:
        low, high = found["quartiles"]
        memory = found.get("memory")
        lines.append(
            f"{found['point']['name']:<34}{found['plain_ms']:>9.0f}{found['ratio']:>8.2f}{f'{low:.2f}-{high:.2f}':>15}"
            f"{found['floor']:>7.2f}{found['over_floor']:>9.2f}  {'' if memory is None else f'{memory:.2f}'}"
        )
    lines.append("")
    for found in results:
        phases = ", ".join(f"{label} {value:.0f}" for label, value in found["phases_ms"].items())
        lines.append(f"{found['point']['name']}: ms {phases}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="points whose name contains this")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="also peak memory, a process for each arm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        print(peak_bytes(Point(**json.loads(options.peak)), options.arm, options.device))
        return
    points = QUICK if options.quick else GRID if options.grid else [*GOALS, *MEMORY]
    points = [point for point in points if not options.only or options.only in point.name]
    results = []
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for point in points:
        found = measure(point, options.repeats, options.device)
        if options.memory or point in MEMORY:
            plain, ours = (peak_in_a_process(point, arm, options.device) for arm in ("plain", "selective"))
            found["memory"] = ours / plain
        results.append(found)
        print(table([found]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "step_cost.json").write_text(json.dumps(results, indent=1))
        (options.out / "step_cost.txt").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
