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
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import LivePeak, resident_bytes
from torch import Tensor, nn

from ftw_optim import (
    GreedyFilter,
    KeepAll,
    SelectiveOptimizer,
    TargetGradient,
    last_blocks,
    preconditioner_of,
    token_losses,
)

VOCABULARY = 512
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Without these, glibc gives every large block back to the system, and the next step faults its pages in again."""


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
GRAMS = [GOALS[0], GOALS[5], Point("Gram matrix at t 64", t=64, layers=2)]
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


# ---------------------------------------------------------------------- memory


def peak_bytes(point: Point, arm: str, device: str) -> tuple[int, int]:
    """Highest memory of a step above that of model, state and buffers: of live tensors, and of the process."""
    step = plain_arm(point, device) if arm == "plain" else selective_arm(point, device)[0]
    gc.collect()
    held = torch.cuda.memory_allocated() if device != "cpu" else resident_bytes("VmRSS")
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for number in range(3):
        step(number)
    resident = (torch.cuda.max_memory_allocated() if device != "cpu" else resident_bytes("VmHWM")) - held
    with LivePeak() as live:
        step(3)
    return live.peak, resident


def peaks_in_a_process(point: Point, arm: str, device: str) -> list[int]:
    """:func:`peak_bytes`, of a fresh process."""
    command = [sys.executable, __file__, "--peak", json.dumps(asdict(point)), "--arm", arm, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---------------------------------------------------------------------- how else to come by the same Gram matrix


def gram_by(way: str, model: nn.Module, candidates: dict[str, Tensor], factors: dict[str, Tensor]) -> Tensor:
    """``<g_i, P g_j>`` in the computing precision, of gradients that are formed in one of the usual ways."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    n = len(candidates["labels"])
    if way == "loop":
        rows = []
        for index in range(n):
            one = {key: value[index : index + 1] for key, value in candidates.items()}
            gradients = torch.autograd.grad(token_losses(model, one)[0], list(named.values()))
            rows.append([gradient.flatten() for gradient in gradients])
        stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    elif way == "vmap":
        values = {name: parameter.detach() for name, parameter in named.items()}

        def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
            wrapped = _Called(model, values)
            return token_losses(wrapped, {"input_ids": ids[None], "labels": ids[None]})[0]

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, candidates["input_ids"])
        stacked = [gradients[name].flatten(1) for name in named]
    else:
        from opacus import GradSampleModule

        wrapped = GradSampleModule(model, loss_reduction="sum")
        token_losses(wrapped, candidates).sum().backward()
        stacked = [parameter.grad_sample.flatten(1) for parameter in named.values()]
        wrapped.zero_grad()
        wrapped.remove_hooks()
    gram = torch.zeros(n, n, dtype=stacked[0].dtype, device=stacked[0].device)
    for name, rows_of in zip(named, stacked, strict=True):
        gram += (rows_of * factors[name].flatten()) @ rows_of.T
    return gram


class _Called(nn.Module):
    """A model with other values in place of its parameters."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._of = [model]
        self._values = values

    def forward(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self._of[0], self._values, kwargs=inputs)


def compare_grams(point: Point, repeats: int, device: str) -> list[str]:
    """Milliseconds and largest relative error of each way to the Gram matrix, against the loop in float64."""
    step, optimizer = selective_arm(replace(point, m=1, k=1, update="factors"), device)
    for number in range(2):
        step(number)
    model, candidates = optimizer.model, batch(point.n, point.t, 7, device)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = copy.deepcopy(optimizer.state_dict())

    def ours() -> Tensor:
        optimizer.backward(lambda: token_losses(model, candidates))
        optimizer.zero_grad()
        assert optimizer.selection is not None
        return optimizer.selection.gram

    optimizer.target = TargetGradient(lambda: token_losses(model, batch(1, 8, 3, device)))
    ours()
    means = dict(
        zip(
            named,
            torch.autograd.grad(token_losses(model, candidates).mean(), list(named.values())),
            strict=True,
        )
    )
    factors = {
        name: preconditioner_of(optimizer, parameter, means[name]).apply(torch.ones_like(parameter))
        for name, parameter in named.items()
    }
    wide = copy.deepcopy(model).double()
    exact = gram_by("loop", wide, candidates, {name: factor.double() for name, factor in factors.items()})
    lines = []
    ways: dict[str, Callable[[], Tensor]] = {
        "ours, a target of one and one kept": ours,
        **{way: partial(gram_by, way, model, candidates, factors) for way in ("loop", "vmap", "opacus")},
    }
    for way, run in ways.items():
        try:
            gram = run()
            taken = []
            for _ in range(repeats):
                wait(device)
                start = time.perf_counter()
                gram = run()
                wait(device)
                taken.append(1e3 * (time.perf_counter() - start))
            with LivePeak() as live:
                run()
        except Exception as error:
            lines.append(f"  {way:<34} did not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        off = float((gram.double().cpu() - exact.cpu()).abs().max() / exact.abs().max())
        lines.append(
            f"  {way:<34}{statistics.median(taken):>9.0f} ms   error {off:.0e}   {live.peak / 2**20:>7.0f} MiB"
        )
    optimizer.load_state_dict(state)
    return lines


def table(results: list[dict[str, Any]]) -> str:
    """As it is printed and kept."""
    lines = [f"{'':<34}{'plain ms':>9}{'ratio':>8}{'quartiles':>15}{'floor':>7}{'x floor':>9}  memory beside plain"]
    for found in results:
        low, high = found["quartiles"]
        memory = found.get("memory")
        beside = "" if memory is None else f"{memory['live']:.2f} ({memory['resident']:.2f} resident)"
        lines.append(
            f"{found['point']['name']:<34}{found['plain_ms']:>9.0f}{found['ratio']:>8.2f}{f'{low:.2f}-{high:.2f}':>15}"
            f"{found['floor']:>7.2f}{found['over_floor']:>9.2f}  {beside}"
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
    parser.add_argument("--keep-pages", action="store_true", help="tell glibc to keep freed memory (see the README)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        print(json.dumps(peak_bytes(Point(**json.loads(options.peak)), options.arm, options.device)))
        return
    if options.keep_pages and KEEP_PAGES.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    points = QUICK if options.quick else GRID if options.grid else [*GOALS, *MEMORY, GRAMS[-1]]
    points = [point for point in points if not options.only or options.only in point.name]
    results = []
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for point in points:
        found = measure(point, options.repeats, options.device)
        if options.memory or point in MEMORY:
            plain, ours = (peaks_in_a_process(point, arm, options.device) for arm in ("plain", "selective"))
            found["memory"] = {"live": ours[0] / plain[0], "resident": ours[1] / plain[1]}
        results.append(found)
        print(table([found]), flush=True)
        if point in GRAMS or options.quick:
            found["gram"] = compare_grams(point, 3, options.device)
            print("the same Gram matrix by other ways", *found["gram"], sep="\n", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "step_cost.json").write_text(json.dumps(results, indent=1))
        (options.out / "step_cost.txt").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
