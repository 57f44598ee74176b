"""What the self-check finds, and what it takes for an error: planted errors, beside the same model without them.

    python benchmarks/self_check.py [--seeds 20] [--quick] [--out benchmarks/results/self_check.txt]
    python benchmarks/self_check.py --cost [--out benchmarks/results/self_check_cost.txt]

One block of attention with a perceptron; what is planted is planted in a single layer of it. Each cell is the share of
seeds in which the error is found in the first selection, and by the third: where anything is computed in a short dtype,
a layer is compared three times before it is vouched for. The rows *clean* are false alarms, over ten selections that
are all compared; there the share should be 0, elsewhere 1.

``--cost``: the time of a step that is checked beside one that is not, interleaved, one thread; and what that makes of a
run where every 100th is checked, as by default.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import hardware
from step_cost.arms import selective_arm
from step_cost.points import Point
from torch import Tensor, nn
from torch.nn import functional

from ftw_optim import Factors, SelectiveOptimizer, register_layer

N, T, WIDTH, VOCABULARY, RANK = 8, 12, 32, 50, 4
WAYS = ("factors", "graph")
CLEAN = ("clean", "clean, packed", "clean, one token")
DTYPES = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "bfloat16 + LoRA": (torch.bfloat16, True),
    "float16 + LoRA": (torch.float16, True),
}
"""Of the model's parameters, and whether adapters in float32 alone are trained."""


# ---------------------------------------------------------------------- what is planted


class Around(nn.Module):
    """A linear layer, and around it something that mixes rows: the layer itself is captured as any other."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(*sizes, **options)


class SwappedRows(Around):
    """Two rows change places before the layer, and back after it."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x))
        order[:2] = torch.tensor([1, 0])
        return self.layer(x[order])[order]


class LeakingRows(Around):
    """A twentieth of the next row's output is added."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + 0.05 * y.roll(1, 0)


class Normalised(Around):
    """BatchNorm follows the layer."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.norm = nn.BatchNorm1d(self.layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x).mT).mT


class WrongRule(nn.Linear):
    """Its rule scales a factor by 1.05."""


@register_layer(WrongRule, parameters=["weight", "bias"])
def wrong_rule(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> dict[str, Factors]:
    """The gradients of a linear layer, 5 % too large."""
    return {"weight": Factors(left=1.05 * output_grad, right=inputs[0]), "bias": Factors(left=1.05 * output_grad)}


PLANTED: dict[str, Callable[..., nn.Module]] = {
    "two rows swapped": SwappedRows,
    "a twentieth of another row": LeakingRows,
    "BatchNorm": Normalised,
    "a factor scaled by 1.05": WrongRule,
}
MASK = "packed, one row's mask ignored"
ERRORS = (*PLANTED, MASK)


# ---------------------------------------------------------------------- the model


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank side path in float32."""

    def __init__(self, base: nn.Linear, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.base, self.down = base.requires_grad_(False), kind(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x.float())).to(x.dtype)


class Block(nn.Module):
    """One block of attention, whose value projection is the layer that something is planted in."""

    def __init__(self, dtype: torch.dtype, *, lora: bool, planted: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.query, self.key, self.value, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.ignored: int | None = None
        if not lora:
            self.value = planted(WIDTH, WIDTH)
        self.to(dtype)
        if lora:
            self.requires_grad_(False)
            self.query, self.key, self.up, self.down = (
                Adapted(layer, nn.Linear) for layer in (self.query, self.key, self.up, self.down)
            )
            self.value = Adapted(self.value, planted)

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """``documents`` (b, t) are the numbers of the documents that the positions belong to."""
        x = self.embed(tokens)
        y = self.norms[0](x)
        q, k, v = (one(y).unflatten(-1, (2, -1)).transpose(1, 2) for one in (self.query, self.key, self.value))
        mask = documents[:, :, None] == documents[:, None]
        if self.ignored is not None:
            mask[self.ignored] = True
        mask = (mask & torch.ones(mask.shape[1:], dtype=torch.bool).tril())[:, None]
        x = x + functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return self.head(x)


def selections(name: str, dtype: torch.dtype, *, lora: bool, way: str, seed: int) -> Callable[[bool], None]:
    """A function that makes one selection on new data, with what is called ``name`` planted."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    packed, single = "packed" in name, name == "clean, one token"
    model = Block(dtype, lora=lora, planted=PLANTED.get(name, nn.Linear))
    if name == MASK:
        model.ignored = seed % (N // 2)
    rows, length = (N // 2, 2 * T) if packed else (N, 1 if single else T)

    def documents(rows: int) -> Tensor:
        numbers = torch.arange(length) // T if packed else torch.zeros(length, dtype=torch.long)
        return numbers + (torch.arange(rows) * (2 if packed else 1))[:, None]

    def losses(rows: int) -> Tensor:
        tokens, numbers = torch.randint(VOCABULARY, (rows, length), generator=generator), documents(rows)
        targets = torch.randint(VOCABULARY, (rows, length), generator=generator)
        each = functional.cross_entropy(
            model(tokens, numbers).float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        numbers = numbers.flatten()
        return each.new_zeros(int(numbers.max()) + 1).index_add(0, numbers, each) / (1 if single else T)

    def select(check: bool) -> None:
        optimizer.self_check = check or "first"
        optimizer.zero_grad()
        optimizer.backward(lambda: losses(rows), sample_ids=documents(rows) if packed else None)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The target has as many rows, or BatchNorm would be another function there.
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(trained, lr=1e-3), model, lambda: losses(rows), combine=way, seed=seed, self_check="first"
    )
    return select


def cell(name: str, dtype: torch.dtype, *, lora: bool, way: str, seeds: int) -> str:
    """The share of seeds in which an error was reported: in the first selection, and by the last."""
    first = ever = 0
    for seed in range(seeds):
        select = selections(name, dtype, lora=lora, way=way, seed=seed)
        for number in range(10 if name in CLEAN else 3):
            try:
                select(name in CLEAN)
            except (RuntimeError, NotImplementedError):
                first, ever = first + (number == 0), ever + 1
                break
    return f"{first / seeds:.2f} {ever / seeds:.2f}"


COSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "2 layers of width 384, n 16, t 256": ("factors", {"layers": 2, "t": 256}),
    "last of 8 layers of width 256, n 16, t 128": (
        "graph",
        {"layers": 8, "width": 256, "t": 128, "k": 16, "m": 8, "r": 4, "scored": 1},
    ),
    "LoRA 8 on 4 layers of width 128, n 16, t 64": ("factors", {"layers": 4, "width": 128, "t": 64, "lora": 8}),
}
"""The way that combines, and the fields of a ``Point``."""


def cost(case: str, *, rounds: int) -> str:
    """One line: the ratio of a checked step to one that is not, of neighbours in time, and the share it adds."""
    way, fields = COSTS[case]
    steps = {}
    for check in ("first", True):
        steps[check], optimizer = selective_arm(Point("", **fields), way, "cpu")
        optimizer.self_check = check
        for number in range(3):
            steps[check](number)
    ratios = []
    for number in range(3, 3 + rounds):
        seconds = []
        for step in steps.values():
            start = time.perf_counter()
            step(number)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{case:<46}{way:<9}{middle:>7.2f}   {low:.2f} - {high:.2f}{100 * (middle - 1) / 100:>12.2f} %"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="at most three seeds, three dtypes")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--cost", action="store_true", help="the time of a check instead")
    options = parser.parse_args(arguments)
    machine = hardware("cpu")
    if options.cost:
        torch.set_num_threads(1)
        lines = [
            f"torch {machine['torch']}, {machine['cpu']}, 1 thread",
            "",
            f"{'case':<46}{'way':<9}{'ratio':>7}   {'quartiles':<12}{'every 100th':>14}",
        ]
        lines += [cost(case, rounds=2 if options.quick else 15) for case in COSTS]
        print("\n".join(lines))
        _keep(lines, options.out)
        return
    seeds = min(options.seeds, 3) if options.quick else options.seeds
    dtypes = {name: DTYPES[name] for name in (("float64", "float32", "bfloat16 + LoRA") if options.quick else DTYPES)}
    lines = [
        f"torch {machine['torch']}, {machine['cpu']}; n = {N}, t = {T}, width {WIDTH}; {seeds} seeds",
        "share of seeds in which an error is reported: in the first selection, and by the last (third; clean: tenth)",
        "",
        f"{'planted':<32}{'way':<9}" + "".join(f"{name:>17}" for name in dtypes),
    ]
    for name, way in itertools.product((*ERRORS, *CLEAN), WAYS):
        cells = [cell(name, dtype, lora=lora, way=way, seeds=seeds) for dtype, lora in dtypes.values()]
        lines.append(f"{name:<32}{way:<9}" + "".join(f"{one:>17}" for one in cells))
        print("\n".join(lines[-1:] if len(lines) > 5 else lines), flush=True)
    _keep(lines, options.out)


def _keep(lines: list[str], out: Path | None) -> None:
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
