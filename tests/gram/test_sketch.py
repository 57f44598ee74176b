"""Sketched products against exact ones: right on average, as far off as they say, and the same by every way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftw_optim import GreedyFilter, Kronecker, Preconditioner, Scalar, SelectiveOptimizer, Sketch
from ftw_optim._factors.factors import Factors
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import SketchSums
from ftw_optim._gram.spec import GramSpec
from ftw_optim.testing import products_of
from tests.support.factors import COLUMNS, MAPS, ROOTLESS, ROWS, USES, Mixing, positive, random_factors
from tests.support.grids import grid
from tests.support.models import Case, cases, in_batches, mlp, seeded, trained
from tests.support.oracles import candidate_gradients

N = 3
METRICS = tuple(Metric)


def summed(
    uses: list[Factors],
    preconditioner: Preconditioner,
    *,
    shape: tuple[int, ...] = (ROWS, COLUMNS),
    dim: int = 16,
    seed: int = 0,
    memory_limit: int = 2**20,
    scale: float = 1.0,
    metrics: Sequence[str] = METRICS,
    exact: bool = False,
    way: str | None = None,
) -> Any:
    count = uses[0].count
    target = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    spec = GramSpec(
        shapes={"weight": torch.Size(shape)},
        target={"weight": target},
        precondition=lambda name, reference: preconditioner,
        metrics=list(map(Metric, metrics)),
        dtype=torch.float64,
        device=torch.device("cpu"),
        scale=scale,
        memory_limit=memory_limit,
        way=way,
    )
    accepted = torch.ones(count, dtype=torch.bool)
    sums: Any
    sums = GramSums(spec, accepted) if exact else SketchSums(spec, accepted, sketch=Sketch(dim=dim), seed=seed)
    taken = sums.add("weight", uses)
    assert way in (None, taken)
    return sums


def flat(products: Any) -> Tensor:
    return torch.cat([products.gram.flatten(), products.cross_gram, products.target_energy[None]])


def normed(products: Any) -> Tensor:
    """Products of norms, entry by entry as :func:`flat` has the products."""
    norms, target = products.gram.diagonal().sqrt(), products.target_energy.sqrt()
    return torch.cat([(norms[:, None] * norms).flatten(), norms * target, (target * target)[None]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    grid(
        [name for name in MAPS if name not in ROOTLESS],
        USES,
        # A tied weight is used in both of the other ways.
        fast=lambda name, kind: kind == "tied" or name == "scalar",
    ),
)
def test_products_are_right_on_average_and_as_far_off_as_measured(name: str, kind: str) -> None:
    """Over 200 draws: the mean within five standard errors, and the measured error within a third of the true one."""
    uses = USES[kind]
    preconditioner = MAPS[name](torch.Generator().manual_seed(0))
    exact = summed(uses, preconditioner, exact=True).products()
    drawn: dict[str, list[Tensor]] = {metric: [] for metric in METRICS}
    measured = []
    for seed in range(200):
        sums = summed(uses, preconditioner, seed=seed)
        problem, _ = on_host(sums.products())
        for metric, products in problem.items():
            drawn[metric].append(flat(products))
        measured.append(float(problem[METRICS[0]].error))
    for metric, values in drawn.items():
        found, expected = torch.stack(values), flat(exact[metric])
        size = normed(exact[metric])
        allowed = 5 * found.std(0) / len(values) ** 0.5 + 1e-9 * size
        assert bool(((found.mean(0) - expected).abs() <= allowed).all()), metric
    first = torch.stack(drawn[METRICS[0]])
    n = uses[0].count
    # Every pair once for each order, as the report has it; norms are those of the sketch there, so only roughly equal.
    true = float(((first - flat(exact[METRICS[0]])) / normed(exact[METRICS[0]]))[:, : n * n].square().mean().sqrt())
    assert true / 1.5 < float(torch.tensor(measured).square().mean().sqrt()) < 1.5 * true


@pytest.mark.parametrize("dim", [64, 512])
def test_the_error_is_that_of_random_signs(dim: int) -> None:
    """No more than (2 / dim) ** 0.5 of the norms, also for gradients of low rank, whose entries go together."""
    uses = [random_factors("dense", grid=(8, 1), rows=20, columns=24, seed=3)]
    shape = (20, 24)
    exact = summed(uses, Scalar(1.0), shape=shape, metrics=("euclidean",), exact=True).products()["euclidean"]
    errors = []
    for seed in range(60):
        found = summed(uses, Scalar(1.0), shape=shape, dim=dim, seed=seed, metrics=("euclidean",)).products()
        errors.append((flat(found["euclidean"]) - flat(exact)) / normed(exact))
    error = float(torch.stack(errors).square().mean().sqrt())
    assert error < 1.25 * (2 / dim) ** 0.5
    assert error > 0.3 * (2 / dim) ** 0.5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["scalar", "rank one", "kronecker", "kronecker, right alone"])
@pytest.mark.parametrize("memory_limit", [2**20, 1])
def test_a_convolution_of_both_sides_is_the_sketch_of_the_product(name: str, metric: str, memory_limit: int) -> None:
    preconditioner = MAPS[name](torch.Generator().manual_seed(0))
    found = []
    for way in ("convolved", "materialised"):
        for uses in (USES["dense"], USES["two uses"]):
            sums = summed(uses, preconditioner, metrics=(metric,), memory_limit=memory_limit, scale=1024.0, way=way)
            found.append(flat(on_host(sums.products())[0][metric]))
    torch.testing.assert_close(found[:2], found[2:])


@given(limit=st.integers(1, 3000), kind=st.sampled_from(sorted(USES)), name=st.sampled_from(sorted(MAPS)))
@settings(max_examples=60, deadline=None)
def test_the_memory_limit_changes_nothing(limit: int, kind: str, name: str) -> None:
    preconditioner = MAPS[name](torch.Generator().manual_seed(0))
    metrics = ("update", "euclidean") if name in ROOTLESS else METRICS
    one, other = (
        summed(USES[kind], preconditioner, memory_limit=bytes_, metrics=metrics).products() for bytes_ in (limit, 2**30)
    )
    for metric in metrics:
        torch.testing.assert_close(flat(one[metric]), flat(other[metric]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rows", "t", "way"), [(8, 64, "materialised"), (2048, 1, "convolved")])
def test_wide_layers_are_convolved_and_narrow_ones_multiplied_out(rows: int, t: int, way: str) -> None:
    factors = random_factors("dense", grid=(2, t), rows=rows, columns=rows, seed=0)
    found = products_of(factors, torch.zeros(rows, rows), Scalar(1.0), metric="euclidean", gram=Sketch(dim=32))
    assert found.way == way


def test_axes_between_the_first_and_the_last_are_mapped_too() -> None:
    """A convolution's weight under a Kronecker map: right on average."""
    generator = torch.Generator().manual_seed(1)
    preconditioner = Kronecker(positive(4, generator), positive(2, generator), (positive(3, generator),))
    uses = [random_factors("dense", grid=(N, 5), rows=4, columns=6, seed=1)]
    shape = (4, 3, 2)
    exact = flat(summed(uses, preconditioner, shape=shape, exact=True).products()["preconditioned"])
    found = torch.stack(
        [flat(summed(uses, preconditioner, shape=shape, seed=s).products()["preconditioned"]) for s in range(200)]
    )
    assert bool(((found.mean(0) - exact).abs() <= 5 * found.std(0) / 200**0.5).all())


def test_a_map_without_a_known_root_is_refused() -> None:
    mixing = Mixing(positive(ROWS * COLUMNS, torch.Generator().manual_seed(0)))
    with pytest.raises(NotImplementedError, match=r"whose root is known.*got Mixing"):
        summed(USES["dense"], mixing)


# ---------------------------------------------------------------------- in a step


def sketched(case: Case, inner: torch.optim.Optimizer | None = None, **options: Any) -> SelectiveOptimizer:
    options = {"filter": GreedyFilter(keep=3), "gram": Sketch(dim=64), **options}
    inner = torch.optim.AdamW(trained(case).values(), lr=0.01) if inner is None else inner
    return SelectiveOptimizer(inner, case.model, case.target_losses, **options)


@pytest.mark.slow
@pytest.mark.parametrize("build", cases().values(), ids=cases())
def test_reruns_are_the_same_however_candidates_are_split(build: Callable[[], Case]) -> None:
    """Products, weights, gradients and parameters, over three steps; and the gradient is the weighted oracle's."""
    runs: list[list[Any]] = []
    for sizes in ([8], [4, 1, 3], [1] * 8):
        case = build()
        optimizer = sketched(case, combine="rerun")
        found: list[Any] = []
        for step in range(3):
            before = copy.deepcopy(case.model.state_dict())
            optimizer.step(in_batches(case, sizes) if len(sizes) > 1 else case.losses)
            selection = optimizer.selection
            assert selection is not None
            assert selection.sketch is not None
            assert selection.combine == "rerun"
            found += [selection.losses, selection.gram, selection.weights, selection.sketch.error]
            found += [[p.grad for p in trained(case).values()], [p.detach() for p in trained(case).values()]]
            if step == 2:
                after = copy.deepcopy(case.model.state_dict())
                case.model.load_state_dict(before)
                weights = torch.zeros(8, dtype=torch.float64).index_put((selection.kept,), selection.weights)
                for name, parameter in trained(case).items():
                    rows = torch.stack([gradients[name] for gradients in candidate_gradients(case)])
                    expected = torch.einsum("n,n...->...", weights, rows)
                    torch.testing.assert_close(
                        parameter.grad, expected, rtol=1e-5, atol=1e-7
                    )  # norms and token losses are taken in float32
                case.model.load_state_dict(after)
        runs.append(found)
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("combine", ["factors", "graph", "rerun"])
def test_a_step_with_a_sketch_is_near_the_exact_one(combine: str) -> None:
    """In every way of applying it; the products differ by what the report says."""
    runs = []
    for gram, way in (("exact", "factors"), (Sketch(dim=4096), combine)):
        case = cases()["llama with lora"]()
        # Of a map that looks at no gradient ahead: that would be the candidates' mean, and the target's.
        inner = torch.optim.SGD(trained(case).values(), lr=0.01)
        optimizer = sketched(case, inner, gram=gram, combine=way)
        optimizer.backward(case.losses)
        runs.append(optimizer)
    exact, optimizer = runs
    one, other = exact.selection, optimizer.selection
    assert one is not None
    assert other is not None
    assert one.sketch is None
    assert other.sketch is not None
    assert other.sketch.dim == 4096
    assert 0.0 < other.sketch.error < 0.1
    size = one.gram.diagonal().sqrt()
    off = ((other.gram - one.gram) / (size[:, None] * size)).square().mean().sqrt()
    assert float(off) < 3 * other.sketch.error
    assert abs(one.cosine - other.cosine) < 0.1


def test_each_step_draws_anew_and_the_seed_decides() -> None:
    grams = []
    for seed in (0, 0, 1):
        case = mlp(torch.float64, 8)
        optimizer = sketched(case, seed=seed)
        for _ in range(2):
            optimizer.backward(case.losses)
            assert optimizer.selection is not None
            grams.append(optimizer.selection.gram)
    torch.testing.assert_close(grams[0], grams[2], rtol=0, atol=0)
    torch.testing.assert_close(grams[1], grams[3], rtol=0, atol=0)
    assert not torch.allclose(grams[0], grams[1])
    assert not torch.allclose(grams[0], grams[4])


@pytest.mark.parametrize("where", ["x", "huge"])
def test_a_spoilt_candidate_of_one_micro_batch_leaves_alone(where: str) -> None:
    """NaN in its input, or a gradient whose square overflows; the others are compared as without it."""
    case = mlp(torch.float64, 8)
    size = torch.ones(8, dtype=torch.float64)
    if where == "x":
        case.candidates["x"][5] = torch.nan
    else:
        size[5] = 1e200
    grams = []
    for rows in (torch.arange(8), torch.tensor([0, 1, 2, 3, 4, 6, 7])):
        optimizer = sketched(case, combine="rerun")

        def closure(rows: Tensor = rows, **given: Tensor) -> Iterator[Tensor]:
            chosen = given["rows"] if given else rows
            return (size[part] * case.losses(part) for part in chosen.split(3))

        optimizer.backward(closure)
        assert optimizer.selection is not None
        grams.append(optimizer.selection.gram[: len(rows)])
        if len(rows) == 8:
            assert optimizer.selection.rejected.tolist() == [5]
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in case.model.parameters())
    others = [0, 1, 2, 3, 4, 6, 7]
    torch.testing.assert_close(grams[0][others][:, others], grams[1])
    assert not bool(grams[0][5].any())


def test_a_closure_that_gives_other_rows_is_refused() -> None:
    case = mlp(torch.float64, 8)
    optimizer = sketched(case, combine="rerun")

    def closure(rows: Tensor | None = None) -> Iterator[Tensor]:
        return (case.losses(part) for part in torch.arange(8).split(4))

    with pytest.raises(ValueError, match="must return the losses of these 3 rows"):
        optimizer.step(closure)
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("dim", [0, 1, 7, -2, 2.0, True])
def test_a_dimension_must_be_an_even_number(dim: Any) -> None:
    with pytest.raises(ValueError, match="dim must be an even number"):
        Sketch(dim=dim)


def test_options_are_checked_and_copies_keep_them() -> None:
    case = mlp(torch.float64, 8)
    with pytest.raises(ValueError, match=r"gram must be \"exact\" or a Sketch"):
        sketched(case, gram="sketch")
    optimizer = pickle.loads(pickle.dumps(sketched(case)))
    assert optimizer.gram == Sketch(dim=64)


@pytest.mark.parametrize("combine", ["factors", "rerun"])
def test_a_parameter_that_the_target_does_not_reach_outweighs_no_other(combine: str) -> None:
    """Its second moment would be zero at the first step, and its map the learning rate over eps."""
    model = seeded(lambda: nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})).double()
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor, both: bool) -> Tensor:
            out: Tensor = self.parts["a"](x)
            return (out + self.parts["b"](x) if both else out).square().sum(1)

    whole = Two()
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(whole.parameters(), lr=0.01),
        whole,
        lambda: whole(x[:2], False),
        filter=GreedyFilter(keep=3),
        gram=Sketch(dim=512),
        combine=combine,
    )
    optimizer.backward(lambda rows=None: whole(x if rows is None else x[rows], True))
    assert optimizer.selection is not None
    assert optimizer.selection.cosine > 0.3  # 1e-6 where b's map is that of a zero gradient
