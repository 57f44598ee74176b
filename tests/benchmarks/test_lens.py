"""The lens: its weights and cosines against gradients written out, and a short run of the whole."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftw_optim import GreedyFilter, KeepAll, NonNegativeLeastSquares, SelectiveOptimizer, TopKFilter, UniformWeights

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lens import command, products, ways
from pays.arms import Sizes
from pays.records import Example

from tests.support.models import RowGradients

POOL, TARGET, HELD_OUT = 9, 4, 5
SIZES = Sizes(candidates=5, keep=2, target_rows=3, read_ahead=7)


@pytest.fixture
def vectors() -> Tensor:
    """Gradients of pool, target and held-out rows; the targets have something in common."""
    found = torch.randn(POOL + TARGET + HELD_OUT, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found[POOL:, 0] += 2.0
    found[:3, 0] += 2.0
    return found


def rows_of(vectors: Tensor) -> ways.Rows:
    some, goal = vectors[: POOL + TARGET], vectors[POOL + TARGET :].mean(0)
    return ways.Rows(
        gram=some @ some.T,
        held_out=some @ goal,
        energy=float(goal @ goal),
        pool=range(POOL),
        target=range(POOL, POOL + TARGET),
        likeness=torch.arange(POOL, 0, -1.0),
        plain_likeness=torch.arange(1.0, POOL + 1),
        own=[row < 3 for row in range(POOL)] + [False] * TARGET,
        tokens=torch.arange(1, POOL + TARGET + 1, dtype=torch.float64),
        damaged=[row % 2 == 0 for row in range(POOL)] + [False] * TARGET,
    )


def test_agreement_is_the_cosine_with_the_held_out_gradient(vectors: Tensor) -> None:
    rows = rows_of(vectors)
    weights = torch.rand(POOL + TARGET, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    combined, goal = weights @ vectors[: POOL + TARGET], vectors[POOL + TARGET :].mean(0)
    expected = torch.nn.functional.cosine_similarity(combined, goal, dim=0)
    assert rows.agreement(weights) == pytest.approx(float(expected))
    assert rows.agreement(torch.zeros_like(weights)) == 0.0


def library_weights(vectors: Tensor, candidates: list[int], target: list[int], **options: object) -> Tensor:
    """The weights of all rows that the optimizer itself gives."""
    model = RowGradients(vectors.shape[1])
    optimizer = SelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: model(vectors[target]),
        metric="euclidean",
        **options,  # type: ignore[arg-type]
    )
    optimizer.step(lambda: model(vectors[candidates]))
    assert optimizer.selection is not None
    found = torch.zeros(POOL + TARGET, dtype=torch.float64)
    found[candidates] = optimizer.selection.spread_weights()
    if len(optimizer.selection.target_weights):
        found[target] = optimizer.selection.target_weights
    return found


@pytest.mark.parametrize("target", [[9, 10, 11], [12, 10]])
def test_ways_give_the_weights_that_the_optimizer_gives(vectors: Tensor, target: list[int]) -> None:
    rows, candidates = rows_of(vectors), [0, 4, 2, 7, 5]
    greedy, fit = GreedyFilter(keep=2), NonNegativeLeastSquares()
    anchored = NonNegativeLeastSquares(anchor=0.3, anchor_to="positive")
    top = TopKFilter(keep=2)
    pairs = [
        (
            ways.selected(rows, candidates, target, greedy, fit),
            library_weights(vectors, candidates, target, filter=greedy, weight=fit),
        ),
        (
            ways.selected(rows, candidates, target, top, None),
            library_weights(vectors, candidates, target, filter=top, weight=UniformWeights()),
        ),
        (
            ways.together(rows, candidates, target, anchored),
            library_weights(vectors, candidates, target, filter=KeepAll(), weight=anchored, train_on_target=True),
        ),
    ]
    for found, expected in pairs:
        assert bool(expected.any())
        torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-8, atol=1e-10)


def test_likeness_chooses_among_the_records_read_and_acceptance_leaves_out_what_opposes(vectors: Tensor) -> None:
    rows = rows_of(vectors)
    drawn = ways.Drawn(read=[8, 3, 6, 1], own=[], target=[9, 10])
    sizes = replace(SIZES, candidates=2)
    assert ways.most_alike(rows, drawn, sizes) == [1, 3]
    assert ways.most_plainly_alike(rows, drawn, sizes) == [8, 6]
    weights = ways.accepted(rows, [0, 4, 7], [9, 10])
    asked = rows.gram[[0, 4, 7]][:, [9, 10]].mean(1) > 0
    assert (weights[[0, 4, 7]] > 0).tolist() == asked.tolist()
    assert bool((weights[[9, 10]] > 0).all())
    assert float(weights.sum()) == pytest.approx(1.0)


def test_what_the_pool_has_in_common_is_no_likeness_unless_asked_for() -> None:
    """A record of the pool's commonest word is the most alike one, and is not beyond the likeness to the pool."""

    def example(*tokens: int) -> Example:
        return Example(tokens=list(tokens), prompt_length=1, source="")

    pool = [example(7, 7, 7, 7), example(1, 2, 20, 21)] + [example(7, 8, 30 + 2 * at, 31 + 2 * at) for at in range(6)]
    target = [example(1, 7, 2, 7), example(1, 7, 3, 7)]
    beyond, plain = (products.likeness(pool, target, contrast=contrast) for contrast in (True, False))
    assert beyond.argmax() == 1
    assert plain.argmax() == 0


def test_a_mean_over_tokens_weighs_by_length_and_the_weight_of_damaged_rows_is_counted(vectors: Tensor) -> None:
    rows = rows_of(vectors)
    weights = ways.by_token(rows, [0, 4, 7], [9, 10], 2)
    assert weights[[0, 4, 7]].tolist() == pytest.approx([1 / 14, 5 / 14, 8 / 14])
    drawn = [ways.Drawn(read=[0, 1, 2, 3, 5], own=[], target=[9]), ways.Drawn(read=[1, 3, 5, 7, 0], own=[], target=[9])]
    alike = ways.Way("alike", ways.first_read, ways.unweighed)
    found = ways.agreement_of(alike, rows, drawn, SIZES)
    assert found.damaged == pytest.approx((2 / 5 + 1 / 5) / 2)
    assert found.value == pytest.approx(sum(rows.agreement(alike.weights(rows, one, SIZES)) for one in drawn) / 2)


@pytest.mark.parametrize("way", ways.WAYS, ids=lambda way: way.label)
def test_every_way_weighs_what_it_may_see(vectors: Tensor, way: ways.Way) -> None:
    rows = rows_of(vectors)
    for drawn in ways.draws(rows, SIZES, 5, seed=3):
        weights = way.weights(rows, drawn, SIZES)
        assert bool((weights >= 0).all())
        allowed = {*drawn.read, *(drawn.own if way.oracle else []), *(drawn.target if way.trains_on_target else [])}
        assert set(weights.nonzero()[:, 0].tolist()) <= allowed
        assert int((weights > 0).sum()) <= way.rows(SIZES)


def test_a_short_run_looks_twice_and_says_what_it_saw(capsys: pytest.CaptureFixture[str]) -> None:
    tables = command.main(["--quick", "--threads", "1"])
    printed = capsys.readouterr().out
    assert len(tables) == 2
    for table in tables.values():
        assert table.keys() == {way.label for way in ways.WAYS}
        assert all(-1.0 <= one.value <= 1.0 for one in table.values())
    first = next(iter(tables.values()))
    for way in ways.WAYS:
        (line,) = (line for line in printed.splitlines() if line.startswith(way.label.ljust(34)))
        assert f"{first[way.label][0]:.2f} ±" in line
    assert len(re.findall(r"with target rows in the\s+step", printed)) == 2
    assert "dam." not in printed
    with pytest.raises(SystemExit):
        command.main(["--quick", "--target-batch", "1"])


def test_damage_of_the_pool_is_seen_by_the_reader_alone(capsys: pytest.CaptureFixture[str]) -> None:
    tables = command.main(["--quick", "--threads", "1", "--damage", "placeholder=0.5"])
    printed = capsys.readouterr().out
    assert "50 % of the pool placeholder" in printed
    for table in tables.values():
        assert 0.0 < table["n of the pool"].damaged < 1.0
        assert table["n of the pool, by token"].damaged < table["n of the pool"].damaged
        assert table["m target rows"].damaged == 0.0
    with pytest.raises(SystemExit):
        command.main(["--quick", "--damage", "burnt=0.5"])
