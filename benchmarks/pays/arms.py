"""The arms: ways of training that are compared, an entry each.

They come in two families, each with a baseline of its own. In ``guide`` the target rows may guide a selection but are
never trained on, as where they are a development set; in ``target`` they are part of every step.

A later arm is one more entry: a proposal goes to ``propose``, and what a :class:`ftw_optim.SelectiveOptimizer` is given
beside its filter, weights, metric and target goes to ``Method.options``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ftw_optim import (
    AcceptFilter,
    FilterStage,
    GreedyFilter,
    KeepAll,
    NonNegativeLeastSquares,
    TopKFilter,
    UniformWeights,
    WeightStage,
    last_blocks,
    spread_blocks,
)

from .peers import GreatsFilter, LessFilter, RandomWeights, SmallLossFilter
from .proposals import (
    Chooser,
    Known,
    contrasted,
    first,
    learned,
    learned_from_scores,
    own_source,
    similar,
    similar_and_sound,
    similar_embeddings,
    tested,
    tested_with_floor,
    vetted,
    vetted_random,
)
from .split import Top
from .weights import ExpectedFilter, ExpectedWeights, HorizonWeights, TiltedWeights


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows of one step, in all arms: ``n`` candidates, of which ``k`` are kept; ``m`` target rows; records read."""

    candidates: int
    keep: int
    target_rows: int
    read_ahead: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """Selection among the candidates.

    Attributes:
        filter: called at each step, with ``k`` and the step's learning rate.
        weight: the weight stage.
        metric: of the matching problem.
        decay: of the moving average of target gradients.
        guide_share: share of the target rows that only guide, where others are part of the step; 0: all are both.
        refresh_every: steps from one batch of rows that only guide to the next.
        group: candidates that are compared with each other; each such group of a step makes a selection of its own, as
            where every process selects for itself, and their mean is applied. 0: all of them.
        watched: whether the validation rows tell the selection when the target rows are memorised.
        by_token: whether a candidate's loss is the sum over its response tokens, as in the mean over all tokens of the
            step; its mean otherwise.
        scored: makes the predicate of the parameters by which candidates are compared; None: all that are trained.
        unless_trusted: whether all candidates are taken as they are while the proposal says that it can be trusted.
        trusted_every: steps from one selection to the next while it does; those between are plain. Else every step
            selects.
        options: whatever else the optimizer is given.
    """

    filter: Callable[[int, float], FilterStage]
    weight: WeightStage
    metric: str = "preconditioned"
    decay: float = 0.0
    guide_share: float = 0.0
    refresh_every: int = 1
    group: int = 0
    watched: bool = False
    by_token: bool = False
    unless_trusted: bool = False
    trusted_every: int = 1
    scored: Callable[[Top], Callable[[str, nn.Parameter], bool]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        label: the name in the table.
        family: ``"guide"`` or ``"target"``.
        rows: how many records of the stream a step runs.
        trained_target_rows: how many target rows are part of the step itself.
        target_after: share of the steps before target rows are part of them; until then they only guide, or with no
            method are not run, and as many records are in their place.
        propose: which of the records read they are.
        method: how a step selects among them; None: the mean over all rows of the step, a plain step.
        by_token: whether the mean of a plain step is that over their response tokens, so that a row counts by its
            length.
    """

    label: str
    family: str
    rows: Callable[[Sizes], int]
    trained_target_rows: Callable[[Sizes], int] = lambda sizes: 0
    target_after: float = 0.0
    propose: Callable[[Known], Chooser] = first
    method: Method | None = None
    by_token: bool = False


def _n(sizes: Sizes) -> int:
    return sizes.candidates


def _k(sizes: Sizes) -> int:
    return sizes.keep


def _m(sizes: Sizes) -> int:
    return sizes.target_rows


def _the_rest(sizes: Sizes) -> int:
    return sizes.candidates - sizes.target_rows


def _none(sizes: Sizes) -> int:
    return 0


def _greedy(keep: int, lr: float) -> FilterStage:
    return GreedyFilter(keep=keep)


def _all(keep: int, lr: float) -> FilterStage:
    return KeepAll()


UNIFORM = Method(filter=_all, weight=UniformWeights())
"""No selection, but its scores, which a proposal learns from."""
FILTER_THEN_WEIGHT = Method(filter=_greedy, weight=NonNegativeLeastSquares())
BY_TOKEN = replace(FILTER_THEN_WEIGHT, by_token=True)
UNLESS_TRUSTED = replace(BY_TOKEN, unless_trusted=True)
OFTEN_PLAIN = replace(UNLESS_TRUSTED, trusted_every=4)
"""What the trainers do by default."""
IN_THIRTY_TWOS = Method(filter=_greedy, weight=NonNegativeLeastSquares(), group=32)
IN_EIGHTS = Method(filter=_greedy, weight=NonNegativeLeastSquares(), group=8)
IN_FOURS = Method(filter=_greedy, weight=NonNegativeLeastSquares(), group=4)
REMEMBERED = Method(filter=_greedy, weight=NonNegativeLeastSquares(), decay=0.75)
ALL_WEIGHED = Method(filter=_all, weight=NonNegativeLeastSquares(), decay=0.75)
EUCLIDEAN = Method(filter=_greedy, weight=NonNegativeLeastSquares(), metric="euclidean")
EUCLIDEAN_BY_TOKEN = replace(EUCLIDEAN, by_token=True)
OF_UPDATES_BY_TOKEN = replace(BY_TOKEN, metric="update")
LAST_BLOCK = Method(filter=_greedy, weight=NonNegativeLeastSquares(), scored=lambda top: last_blocks(top, 1))
SPREAD_BLOCKS = Method(
    filter=_greedy, weight=NonNegativeLeastSquares(), scored=lambda top: spread_blocks(top, min(4, top.blocks))
)
TOP_K = Method(filter=lambda keep, lr: TopKFilter(keep=keep), weight=UniformWeights())
# TracIn's score of a step, and GRAD-MATCH's choice and weights (its regularisation of 0.5), both in plain gradients.
TRACIN = Method(filter=lambda keep, lr: TopKFilter(keep=keep), weight=UniformWeights(), metric="euclidean")
GRAD_MATCH = Method(filter=_greedy, weight=NonNegativeLeastSquares(ridge=0.5), metric="euclidean")
GREATS = Method(filter=lambda keep, lr: GreatsFilter(keep=keep, lr=lr), weight=UniformWeights())
LESS = Method(filter=lambda keep, lr: LessFilter(keep=keep), weight=UniformWeights())
TOP_K_BY_TOKEN, GREATS_BY_TOKEN, LESS_BY_TOKEN = (replace(method, by_token=True) for method in (TOP_K, GREATS, LESS))

UNIFORM_WITH_TARGET = Method(filter=_all, weight=UniformWeights(), options={"train_on_target": True})
WATCHED_WITH_TARGET = Method(filter=_all, weight=UniformWeights(), watched=True, options={"train_on_target": True})
WEIGHTS_WITH_TARGET = Method(
    filter=_all,
    weight=NonNegativeLeastSquares(anchor=0.3, anchor_to="positive"),
    options={"train_on_target": True},
)
ACCEPTED_WITH_TARGET = Method(
    filter=lambda keep, lr: AcceptFilter(), weight=UniformWeights(), options={"train_on_target": True}
)
HONEST = {"guide_share": 0.5, "refresh_every": 2, "decay": 0.5}
"""Half of the target rows only guide: four of them at every second step, which half of the guides before outweigh."""
HONEST_UNIFORM = Method(filter=_all, weight=UniformWeights(), **HONEST)
HONEST_ACCEPTED = Method(filter=lambda keep, lr: AcceptFilter(), weight=UniformWeights(), **HONEST)
SMALL_LOSS_GUIDED = Method(filter=lambda keep, lr: SmallLossFilter(keep=0.5), weight=UniformWeights())
SMALL_LOSS = replace(SMALL_LOSS_GUIDED, options={"train_on_target": True})
RANDOM_WEIGHTS = Method(filter=_all, weight=RandomWeights(), options={"train_on_target": True})


LATE_UNIFORM = Method(filter=_all, weight=UniformWeights(), decay=0.75)
LATE_UNIFORM_TOKENS = replace(LATE_UNIFORM, by_token=True)
EVERY_OTHER = replace(LATE_UNIFORM_TOKENS, decay=0.5, refresh_every=2)
EVERY_FOURTH = replace(LATE_UNIFORM_TOKENS, decay=0.5, refresh_every=4)
LATE_ACCEPTED = Method(filter=lambda keep, lr: AcceptFilter(), weight=UniformWeights(), decay=0.75)
LATE_EXPECTED = Method(filter=_all, weight=ExpectedWeights(), decay=0.75)
LATE_ABOVE = Method(filter=lambda keep, lr: ExpectedFilter(share=0.3), weight=UniformWeights(), decay=0.75)
LATE_FTW = Method(filter=_greedy, weight=NonNegativeLeastSquares(), decay=0.75)
HALF_UNIFORM = Method(filter=_all, weight=UniformWeights(), decay=0.5, refresh_every=2)
HALF_FTW = Method(filter=_greedy, weight=NonNegativeLeastSquares(), decay=0.5, refresh_every=2)
HORIZON = Method(filter=_all, weight=HorizonWeights(horizon=3.0), decay=0.75)
TILTED = Method(filter=_all, weight=TiltedWeights(strength=1.25), options={"train_on_target": True})
"""Whose target rows run beside the candidates, but get no weight."""
LATE = 0.75
"""Share of the steps in which the target rows only guide, where they are trained on in the later ones."""


def _guide(label: str, rows: Callable[[Sizes], int] = _n, **more: Any) -> Arm:
    return Arm(label=label, family="guide", rows=rows, **more)


def _target(label: str, rows: Callable[[Sizes], int] = _the_rest, **more: Any) -> Arm:
    return Arm(label=label, family="target", rows=rows, **{"trained_target_rows": _m, **more})


ARMS = {
    "adamw-k": _guide("AdamW on k", _k),
    "adamw-n": _guide("AdamW, by record"),
    "adamw-n-tokens": _guide("AdamW, by token", by_token=True),
    "ftw": _guide("filter-then-weight", method=FILTER_THEN_WEIGHT),
    "ftw-tokens": _guide("ftw, by token", method=BY_TOKEN),
    "ftw-thirty-twos": _guide("ftw in groups of 32", method=IN_THIRTY_TWOS),
    "ftw-eights": _guide("ftw in groups of 8", method=IN_EIGHTS),
    "ftw-fours": _guide("ftw in groups of 4", method=IN_FOURS),
    "ftw-remembered": _guide("ftw, remembered", method=REMEMBERED),
    "ftw-euclidean": _guide("ftw, euclidean", method=EUCLIDEAN),
    "ftw-last-block": _guide("ftw, last block", method=LAST_BLOCK),
    "ftw-spread-blocks": _guide("ftw, 4 blocks", method=SPREAD_BLOCKS),
    "topk": _guide("top-k, dot product", method=TOP_K),
    "tracin": _guide("TracIn, top-k", method=TRACIN),
    "gradmatch": _guide("GRAD-MATCH", method=GRAD_MATCH),
    "greats": _guide("GREATS' greedy", method=GREATS),
    "less": _guide("LESS, online", method=LESS),
    "topk-tokens": _guide("top-k, by token", method=TOP_K_BY_TOKEN),
    "greats-tokens": _guide("GREATS, by token", method=GREATS_BY_TOKEN),
    "less-tokens": _guide("LESS, by token", method=LESS_BY_TOKEN),
    "ftw-euclidean-tokens": _guide("euclidean, by token", method=EUCLIDEAN_BY_TOKEN),
    "ftw-update-tokens": _guide("of updates, token", method=OF_UPDATES_BY_TOKEN),
    "similarity-n": _guide("n similar", propose=similar),
    "similarity-n-tokens": _guide("n similar, by token", propose=similar, by_token=True),
    "contrast-n-tokens": _guide("contrast, by token", propose=contrasted, by_token=True),
    "sound-n-tokens": _guide("sound, by token", propose=similar_and_sound, by_token=True),
    "own-n-tokens": _guide("own source, token", propose=own_source, by_token=True),
    "similarity-k": _guide("k similar", _k, propose=similar),
    "embeddings-n": _guide("n similar, embedded", propose=similar_embeddings),
    "similarity+ftw": _guide("n similar, ftw", propose=similar, method=FILTER_THEN_WEIGHT),
    "similarity+ftw-tokens": _guide("n similar, ftw, tok", propose=similar, method=BY_TOKEN),
    "similarity+ftw-remembered": _guide("n similar, ftw rem.", propose=similar, method=REMEMBERED),
    "similarity+weights": _guide("n similar, weights", propose=similar, method=ALL_WEIGHED),
    "similarity+accept": _guide("n similar, accepted", propose=similar, method=LATE_ACCEPTED),
    "similarity+small": _guide("n similar, small l.", propose=similar, method=SMALL_LOSS_GUIDED),
    "accept": _guide("n, accepted", method=LATE_ACCEPTED),
    "horizon": _guide("n, horizon", method=HORIZON),
    "similarity+horizon": _guide("n similar, horizon", propose=similar, method=HORIZON),
    "tilt": _guide("n, tilted", method=TILTED),
    "similarity+tilt": _guide("n similar, tilted", propose=similar, method=TILTED),
    "learned+accept": _guide("n learned, accepted", propose=learned, method=LATE_ACCEPTED),
    "vetted-n": _guide("n vetted", propose=vetted, method=LATE_UNIFORM),
    "vetted-n-tokens": _guide("n vetted, by token", propose=vetted, method=LATE_UNIFORM_TOKENS),
    "vetted-n-second": _guide("vetted, every 2nd", propose=vetted, method=EVERY_OTHER),
    "vetted-n-fourth": _guide("vetted, every 4th", propose=vetted, method=EVERY_FOURTH),
    "random+vetted": _guide("n random, vetted", propose=vetted_random, method=LATE_UNIFORM),
    "random+vetted-tokens": _guide("random, vetted, tok", propose=vetted_random, method=LATE_UNIFORM_TOKENS),
    "tested-n": _guide("n tested, by token", propose=tested, method=OFTEN_PLAIN, by_token=True),
    "tested-n-floor": _guide("tested, 1/8 random", propose=tested_with_floor, method=OFTEN_PLAIN, by_token=True),
    "tested-n-tokens": _guide("tested, every step", propose=tested, method=UNLESS_TRUSTED),
    "learned-n": _guide("n learned", propose=learned, method=UNIFORM),
    "learned+ftw": _guide("n learned, ftw", propose=learned, method=FILTER_THEN_WEIGHT),
    "scores-n": _guide("n learned, no prior", propose=learned_from_scores, method=UNIFORM),
    "target-m": _target("m target rows", _none),
    "target-n": _target("n target rows", _none, trained_target_rows=_n),
    "target-n-tokens": _target("n target, by token", _none, trained_target_rows=_n, by_token=True),
    "target+random": _target("target + random"),
    "target+similarity": _target("target + similar", propose=similar),
    "target+random-tokens": _target("target + rand., tok", by_token=True),
    "target+similarity-tokens": _target("target + sim., tok", propose=similar, by_token=True),
    "target+own": _target("target + own source", propose=own_source),
    "target+sound": _target("similar and sound", propose=similar_and_sound),
    "target+learned": _target("target + learned", propose=learned, method=UNIFORM_WITH_TARGET),
    "target+watched": _target("learned until blind", propose=learned, method=WATCHED_WITH_TARGET),
    "target+honest": _target("learned, split", propose=learned, method=HONEST_UNIFORM),
    "late+similarity": _target("similar, target late", propose=similar, target_after=LATE),
    "half+similarity": _target("similar, half late", propose=similar, target_after=0.5),
    "half+ftw": _target("ftw, half late", method=HALF_FTW, target_after=0.5),
    "late+ftw": _target("ftw, target late", method=LATE_FTW, target_after=LATE),
    "half+similarity+ftw": _target("similar, ftw, half", propose=similar, method=HALF_FTW, target_after=0.5),
    "late+similarity+ftw": _target("similar, ftw, late", propose=similar, method=LATE_FTW, target_after=LATE),
    "half+vetted": _target("vetted, half late", propose=vetted, method=HALF_UNIFORM, target_after=0.5),
    "half+random+vetted": _target("target + vetted", propose=vetted_random, method=HALF_UNIFORM, target_after=0.5),
    "late+vetted": _target("vetted, 3/4 late", propose=vetted, method=LATE_UNIFORM, target_after=LATE),
    "late+learned": _target("learned, target late", propose=learned, method=LATE_UNIFORM, target_after=LATE),
    "late+similarity+accept": _target("similar, acc, late", propose=similar, method=LATE_ACCEPTED, target_after=LATE),
    "late+learned+expected": _target("learned, exp. w, late", propose=learned, method=LATE_EXPECTED, target_after=LATE),
    "late+learned+above": _target("learned, above, late", propose=learned, method=LATE_ABOVE, target_after=LATE),
    "late+learned+accept": _target("learned, acc, late", propose=learned, method=LATE_ACCEPTED, target_after=LATE),
    "target+similarity+accept": _target("similar, accepted", propose=similar, method=ACCEPTED_WITH_TARGET),
    "target+similarity+honest": _target("similar, acc, split", propose=similar, method=HONEST_ACCEPTED),
    "target+honest+accept": _target("learned, acc, split", propose=learned, method=HONEST_ACCEPTED),
    "target+similarity+small": _target("similar, small loss", propose=similar, method=SMALL_LOSS),
    "target+similarity+chance": _target("similar, random w", propose=similar, method=RANDOM_WEIGHTS),
    "target+random+weights": _target("target + random, w", method=WEIGHTS_WITH_TARGET),
    "target+similarity+weights": _target("target + similar, w", propose=similar, method=WEIGHTS_WITH_TARGET),
    "target+learned+weights": _target("target + learned, w", propose=learned, method=WEIGHTS_WITH_TARGET),
}

BASELINES = {"guide": "adamw-n", "target": "target+random"}
ORACLES = frozenset({"own-n-tokens", "target+own"})
"""Arms that need to be told the target's own source."""
SOUND = frozenset({"target+sound", "sound-n-tokens"})
"""Arms that need to be told which records are damaged."""
