"""Inner products from factors against those of whole gradients, under every form of preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim import Factors, Preconditioner, RankOne, Scalar
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import inner, on_host
from ftw_optim._gram.metric import Metric, PowerMetric
from ftw_optim._gram.spec import GramSpec
from tests.support.factors import COLUMNS, MAPS, ROWS, USES, N, uniform
from tests.support.oracles import gradients


class Further(PowerMetric):
    """Metrics that users cannot ask for, yet: to add one is a line of its name and power."""

    STEEP = "steep", 1.5
    STEEPER = "steeper", 2.0


METRICS: list[Any] = [*Metric, *Further]


def test_a_power_that_applies_no_whole_number_of_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The power of 'odd' must be a multiple of 1/2 and not negative, got 0\.3"):

        class Odd(PowerMetric):
            ODD = "odd", 0.3


@pytest.mark.parametrize("way", [None, "tokens", "materialised"])
@pytest.mark.parametrize("memory_limit", [2**28, 1, 8 * N * COLUMNS * 4], ids=["whole", "by row", "by four rows"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("uses", USES.values(), ids=USES)
@pytest.mark.parametrize("build", MAPS.values(), ids=MAPS)
def test_products_are_those_of_whole_gradients(
    build: Callable[[torch.Generator], Preconditioner],
    uses: list[Factors],
    scale: float,
    memory_limit: int,
    way: str | None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    preconditioner = build(generator)
    target = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    accepted = torch.tensor([True, False, True])
    found = [use.without(~accepted) for use in uses]
    whole = sum(map(gradients, found)) / scale
    seen: list[Tensor] = []

    def precondition(name: str, reference: Tensor) -> Preconditioner:
        seen.append(reference)
        return preconditioner

    spec = GramSpec(
        shapes={"weight": torch.Size((ROWS, COLUMNS))},
        target={"weight": target},
        precondition=precondition,
        metrics=METRICS,
        dtype=torch.float64,
        device=torch.device("cpu"),
        scale=scale,
        memory_limit=memory_limit,
        way=way,
    )
    sums = GramSums(spec, accepted)
    taken = sums.add("weight", found)
    if way is not None:
        folds = isinstance(preconditioner, Scalar | RankOne) and all(not use.indexed for use in uses)
        assert taken == (way if folds else "materialised")
    result = on_host(sums.products())[0]
    torch.testing.assert_close(seen, [whole[accepted].mean(0)])
    moved, moved_target = whole, target
    for metric in sorted(METRICS, key=lambda metric: metric.power):  # each applies P once more than the one before
        torch.testing.assert_close(result[metric].gram, torch.einsum("irc,jrc->ij", whole, moved))
        torch.testing.assert_close(result[metric].cross_gram, torch.einsum("irc,rc->i", whole, moved_target))
        torch.testing.assert_close(result[metric].target_energy, (target * moved_target).sum())
        moved, moved_target = preconditioner.apply(moved), preconditioner.apply(moved_target)


def test_parameters_add_up_and_one_without_a_target_gradient_counts_in_the_gram_alone() -> None:
    uses, target = USES["dense"], uniform(ROWS, COLUMNS)
    shape = torch.Size((ROWS, COLUMNS))
    results = []
    for names in (["a"], ["a", "b"]):
        spec = GramSpec(
            shapes={"a": shape, "b": shape},
            target={"a": target},
            precondition=lambda name, reference: Scalar(1.0),
            metrics=[Metric.EUCLIDEAN],
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        sums = GramSums(spec, torch.ones(N, dtype=torch.bool))
        for name in names:
            sums.add(name, uses)
        results.append(on_host(sums.products())[0][Metric.EUCLIDEAN])
    one, both = results
    torch.testing.assert_close(both.gram, 2 * one.gram)
    torch.testing.assert_close(both.cross_gram, one.cross_gram)
    torch.testing.assert_close(both.target_energy, one.target_energy)


@pytest.mark.parametrize("d", [5, 4096, 4097, 3 * 4096, 50_001])
def test_long_rows_are_summed_in_short_runs(d: int) -> None:
    """Float32 keeps its digits, however long the rows are."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, d, generator=generator) + 0.3, torch.randn(3, d, generator=generator) + 0.3
    expected = left.double() @ right.double().T
    error = (inner(left, right).double() - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-6
    wide = torch.randn(4, 2 * d, generator=generator)[:, :d]  # rows apart in memory
    torch.testing.assert_close(inner(wide, right), wide @ right.T, rtol=1e-4, atol=1e-3)
