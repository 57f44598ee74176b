"""The points that ``step_cost.py`` measures: configurations, the floor of each, and the goals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

WAYS = ("factors", "graph", "rerun", "auto")
"""The values of ``combine``."""

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
"""Published models, by what their configurations say."""


KEPT = 10**6
"""The ``r`` of a point whose target gradient is formed once and kept."""


@dataclass(frozen=True)
class Point:
    """One configuration: a model, ``n`` candidates and ``m`` targets of ``t`` tokens, ``k`` of the candidates kept.

    Attributes:
        name: unique.
        family: ``"llama"`` or ``"qwen3"``.
        shape: one of :data:`SHAPES`; empty: a small model of ``width`` and ``layers``.
        width: of the hidden states.
        layers: blocks.
        t: tokens of a row.
        n: candidates.
        k: of them kept.
        m: target rows.
        r: steps from one target gradient to the next; :data:`KEPT`: all.
        scored: last blocks that count in the Gram matrix; 0: the whole model.
        lora: rank of adapters on all linear layers; 0: all parameters train.
        dtype: of the parameters.
        autocast: to bfloat16.
        checkpoint: gradient checkpointing.
        ways: values of ``combine`` that are measured.
        also: beyond the ratios: ``"kept pages"`` (the same where glibc keeps freed memory), ``"errors"`` (of the Gram
            matrix), ``"other ways"`` (to the same Gram matrix), ``"chart t"``, ``"chart n"``.
    """

    name: str
    family: str = "llama"
    shape: str = ""
    width: int = 384
    layers: int = 4
    t: int = 512
    n: int = 16
    k: int = 4
    m: int = 4
    r: int = 1
    scored: int = 0
    lora: int = 0
    dtype: str = "float32"
    autocast: bool = False
    checkpoint: bool = False
    ways: tuple[str, ...] = ("factors",)
    also: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Point:
        """The point that was written with ``asdict``."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})

    @property
    def cycle(self) -> int:
        """The number of steps after which the same happens again, once the first were made."""
        return 1 if self.r == KEPT else self.r

    @property
    def share(self) -> float:
        """The share of the model's work at and after the first scored layer."""
        return self.scored / self.layers if self.scored else 1.0

    def floor(self, way: str) -> float:
        """Arithmetic that a selective step cannot leave out, beside a plain step on the same candidates.

        Forward, input gradient and weight gradient cost the same. A plain step with LoRA forms no weight gradient of
        its base, and checkpointing runs the forward twice.
        """
        forward = inputs = 1.0
        weights = 0.0 if self.lora else 1.0
        again = 1.0 if self.checkpoint else 0.0
        plain = forward + again + inputs + weights
        kept = self.k / self.n
        scored_pass = forward + self.share * (again + inputs + weights)
        if way == "factors":  # of all parameters, and gradients multiplied out of the scored ones
            step = forward + again + inputs + self.share * weights + kept * weights
        elif way == "graph":
            step = scored_pass + again + inputs + weights
        elif way == "rerun":
            step = scored_pass + kept * plain
        else:
            raise ValueError(
                f"Expected 'factors', 'graph' or 'rerun', got {way!r}; 'auto' has the floor of its choice."
            )
        return (step + self.m / (self.r * self.n) * scored_pass) / plain


def _quarter(point: Point) -> Point:
    """The point with a quarter of the candidates kept, and as many targets."""
    return replace(point, k=max(1, point.n // 4), m=max(1, point.n // 4))


MAIN = Point("all scored, factors", also=("kept pages", "other ways"))
LAST_BLOCK = Point("last block, graph", layers=8, k=16, m=8, r=4, scored=1, ways=("graph",), also=("kept pages",))
LORA = Point("LoRA rank 16, t 1024", t=1024, layers=2, lora=16, also=("kept pages", "other ways"))
SERIES = [
    _quarter(Point(f"t {t}, n {n}", t=t, n=n, layers=2, also=also))
    for t, n, also in (
        (256, 16, ("chart t", "kept pages")),
        (512, 8, ("chart t", "chart n", "kept pages")),
        (1024, 4, ("chart t", "kept pages")),
        (2048, 4, ("chart t", "kept pages")),
        (512, 16, ("chart n",)),
        (512, 32, ("chart n",)),
        (512, 64, ("chart n",)),
    )
]
PRECISION = [
    Point(f"precision, {kind}", width=256, layers=2, t=512, n=8, k=2, m=2, ways=(), also=("errors",), **how)
    for kind, how in (
        ("float32", {}),
        ("bfloat16 parameters", {"dtype": "bfloat16"}),
        ("bfloat16 autocast", {"autocast": True}),
    )
]
GOALS = [MAIN, LAST_BLOCK, LORA, *SERIES, replace(MAIN, name="t 64", t=64, layers=2, also=("other ways",)), *PRECISION]

MEMORY = [
    Point(f"memory, {way}", width=256, layers=8, ways=(way,), scored=scored)
    for way, scored in (("factors", 0), ("graph", 1), ("rerun", 0))
]

GRID = [
    _quarter(
        Point(
            f"width {width}, t {t}, n {n}{', LoRA 16' if lora else ''}{', last block' if scored else ''}",
            width=width,
            t=t,
            n=n,
            lora=lora,
            scored=scored,
            ways=WAYS,
            also=() if scored else ("other ways",),
        )
    )
    for width in (128, 384)
    for t, n in ((32, 64), (64, 32), (128, 16), (512, 4))
    for lora in (0, 16)
    for scored in (0, 1)
]

CASES = [
    Point(
        f"{family}, {'LoRA' if lora else 'full'}, {kind}",
        family=family,
        width=256,
        layers=2,
        t=128,
        n=8,
        k=2,
        m=2,
        lora=lora,
        ways=WAYS,
        also=("errors",),
        **how,
    )
    for family in ("llama", "qwen3")
    for lora in (0, 16)
    for kind, how in (
        ("float32", {}),
        ("checkpointing", {"checkpoint": True}),
        ("bfloat16 parameters", {"dtype": "bfloat16"}),
        ("bfloat16 autocast", {"autocast": True}),
    )
]

LARGE = [
    Point(
        f"{shape}, {'LoRA' if lora else 'full'}{', checkpointing' if checkpoint else ''}",
        family=shape.split("-")[0].lower(),
        shape=shape,
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        t=2048,
        lora=lora,
        dtype="bfloat16",
        checkpoint=checkpoint,
    )
    for shape, config in SHAPES.items()
    if shape != "SmolLM2-135M"
    for lora in (0, 16)
    for checkpoint in (False, True)
] + [
    Point(
        "SmolLM2-135M, LoRA 8, t 96, n 12, target kept",
        shape="SmolLM2-135M",
        width=576,
        layers=30,
        t=96,
        n=12,
        k=3,
        r=KEPT,
        lora=8,
    )
]
"""Measured only where ``--only`` names the shape; all but the last are for an accelerator."""


def launch_point(layers: int, width: int, t: int, lora: int) -> Point:
    """A point of ``--launches``: the target gradient is formed once and kept, and both ways of scoring are measured."""
    name = f"{layers} layers, width {width}, t {t}, {f'LoRA {lora}' if lora else 'full'}"
    return Point(name, width=width, layers=layers, t=t, n=8, k=2, m=4, r=KEPT, lora=lora, ways=("factors", "graph"))


LAUNCH_GRID = [
    launch_point(layers, width, t, lora)
    for layers in (4, 12, 30)
    for width in (64, 192, 576)
    for t in (16, 128, 512)
    for lora in (8, 0)
]
LAUNCHES = [point for point in LAUNCH_GRID if point.width < 576 and point.t < 512]
"""Where small operations are most of the time; the rest of the grid is measured when asked for."""
QUICK_LAUNCHES = [launch_point(2, 64, 16, lora) for lora in (8, 0)]

_SMALL = Point("quick", width=64, layers=2, t=32, n=4, k=1, m=1)
QUICK = [
    replace(
        _SMALL, name="quick, all ways", ways=WAYS, also=("kept pages", "errors", "other ways", "chart t", "chart n")
    ),
    replace(_SMALL, name="quick, t 64", t=64, also=("chart t",)),
    _quarter(replace(_SMALL, name="quick, n 8", n=8, also=("chart n",))),
]

RATIO_GOALS = {
    MAIN.name: ("x floor", 1.10),
    LAST_BLOCK.name: ("x plain", 1.15),
    LORA.name: ("x floor", 1.05),
    **{point.name: ("x floor", 1.15) for point in LARGE if point.shape == "Qwen3-0.6B"},
    **{point.name: ("x plain", 1.08) for point in LARGE if point.shape == "SmolLM2-135M"},
}
"""By the point's name: beside what, and at most how much."""
MEMORY_GOALS = {"factors": 1.6, "graph": 1.15, "rerun": 1.15}
GROWTH_GOAL = 0.10
"""Of the ratio to the floor, from the shortest context to the longest."""
SHARE_GOAL = 0.15
"""Gram products and solve, of the time of materialising."""
ERROR_GOALS = {"float32": 1e-5, "bfloat16": 1e-2}
