"""Tools for tests and measurements: an oracle for layer rules, and access to the Gram matrix of a step.

:func:`check_layer` compares captured gradients with autograd's, one candidate at a time. :func:`products_of` forms one
parameter's Gram matrix as a step does, :func:`matching_with_targets` reads off one what target rows ask for, and
:func:`recorded` records the inputs from which a step forms its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ftw_optim._capture.capture import Capture
from ftw_optim._capture.coverage import Coverage, table
from ftw_optim._capture.plan import plan
from ftw_optim._capture.structure import Structure
from ftw_optim._factors.buffer import Buffer as Buffer
from ftw_optim._factors.factors import Factors, weighted_sum
from ftw_optim._gram.blocks import Block
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import Products, on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import Sketch, SketchSums
from ftw_optim._gram.spec import DEFAULT_MEMORY_LIMIT, GramSpec
from ftw_optim._gram.target_rows import leaving_one_out
from ftw_optim._matching.problem import Matching
from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._step.optimizer import SelectiveOptimizer

__all__ = [
    "Buffer",
    "FormedProducts",
    "RecordedShare",
    "check_layer",
    "matching_with_targets",
    "products_of",
    "recorded",
]


def check_layer(
    module: nn.Module,
    inputs: Tensor | Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-12,
    seed: int = 0,
) -> Coverage:
    """Check the captured gradients of a module's parameters against autograd's, for every candidate alone.

    A copy of the module in float64 runs once on all candidates, captured, and once on each candidate by itself. The
    losses of both are a random non-linear function of all its outputs.

    Args:
        module: a layer, or a model of several layers. If it has dropout, call ``eval()`` first: on one candidate alone
            it would draw other masks.
        inputs: the module's positional inputs. In each tensor whose first axis is as long as that of the first tensor,
            this axis is the candidates'; other inputs are shared by all candidates.
        kwargs: the module's keyword inputs, with candidates found in the same way.
        rtol: largest difference, relative to the norm of the largest candidate's gradient of the same parameter.
        atol: difference that counts as rounding where all gradients of a parameter are close to zero.
        seed: seed of the losses.

    Returns:
        The coverage of the module, which says what rule captured what.

    Raises:
        AssertionError: a gradient differs; the message names the parameter, the rule, the candidate and the difference.
        NotImplementedError: a parameter cannot be captured; the message says why.
        ValueError: there is no candidate, or no parameter requires a gradient.
    """
    args: tuple[Any, ...] = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    args, options = tree_map_only(Tensor, _wide, (args, dict(kwargs or {})))
    first = next((leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None or not len(first):
        raise ValueError("Expected inputs with a tensor whose first axis is the candidate's, of length one at least.")
    n = len(first)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    plan(Structure(module), trained)  # says what cannot be captured
    module = copy.deepcopy(module).double()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"Expected a module with parameters that require a gradient, got {type(module).__name__}.")

    def outputs(row: int | None) -> list[Tensor]:
        def part(value: Tensor) -> Tensor:
            return value[row : row + 1] if row is not None and value.ndim and len(value) == n else value

        given, named = tree_map_only(Tensor, part, (args, options))
        leaves = [leaf for leaf in tree_leaves(module(*given, **named)) if isinstance(leaf, Tensor)]
        return [leaf for leaf in leaves if leaf.is_floating_point()]

    with torch.no_grad():
        axes = [_axis(whole, one) for whole, one in zip(outputs(None), outputs(0), strict=True)]

    def losses(row: int | None) -> Tensor:
        rows = [leaf.movedim(axis, 0) for leaf, axis in zip(outputs(row), axes, strict=True) if axis is not None]
        return _losses(rows, n if row is None else 1, seed)

    structure = Structure(module)
    covered = table(structure)
    with Capture(plan(structure, parameters)) as capture:
        found = capture.differentiate(
            losses(None), scale=1.0, keep_graph=False, checks=None, generator=torch.Generator().manual_seed(seed)
        )
    alone = [
        torch.autograd.grad(losses(row)[0], list(parameters.values()), allow_unused=True, materialize_grads=True)
        for row in range(n)
    ]
    for number, (name, parameter) in enumerate(parameters.items()):
        expected = torch.stack([gradients[number] for gradients in alone])
        size = float(expected.reshape(n, -1).norm(dim=1).max())
        for row, one in enumerate(torch.eye(n, dtype=torch.float64)):
            given = weighted_sum(found[name], one, parameter.shape) if name in found else torch.zeros_like(parameter)
            error = float((given - expected[row]).norm())
            if not error <= rtol * size + atol:
                raise AssertionError(
                    f"The gradient of {name} (rule: {covered[name].rule}) for candidate {row} of {n} is off by "
                    f"{error:.1e}, where the largest candidate's has the norm {size:.1e}; expected {rtol:.0e} of it at "
                    "most."
                )
    return covered


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FormedProducts:
    """Inner products of the candidates' gradients of one parameter, on the CPU; made by :func:`products_of`.

    Attributes:
        gram: shape (n, n).
        cross_gram: shape (n,), products with the target gradient.
        target_energy: product of the target gradient with itself.
        error: standard error of a product, relative to the norms of its two gradients; zero where they are exact.
        way: the way that was taken: ``"materialised"`` (gradients multiplied out), ``"tokens"`` (over pairs of
            positions) or, in a sketch, ``"convolved"`` (both sides of the outer products sketched separately).
    """

    gram: Tensor
    cross_gram: Tensor
    target_energy: float
    error: float
    way: str


def products_of(
    factors: Factors | Sequence[Factors],
    target: Tensor,
    preconditioner: Preconditioner,
    *,
    metric: str = "preconditioned",
    gram: str | Sketch = "exact",
    way: str | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    buffer: Buffer | None = None,
) -> FormedProducts:
    """The Gram matrix of one parameter, formed as a step forms it.

    Args:
        factors: factors of the candidates' gradients; several where the parameter is used several times.
        target: the parameter's target gradient, of the parameter's shape.
        preconditioner: ``P``.
        metric: the metric, as the option of :class:`SelectiveOptimizer`.
        gram: ``"exact"``, or a :class:`Sketch`.
        way: ``"materialised"``, or ``"tokens"`` (``"convolved"`` in a sketch), which is taken where the map is as
            simple as a scalar or a :class:`RankOne` and the factors of a matrix are dense; None: the one that should
            cost less.
        memory_limit: bytes of multiplied-out gradients that may exist at a time; None: 256 MiB.
        seed: seed of the sketch.
        buffer: memory for those gradients that outlives the call, as it outlives a step; None: fresh memory.

    Raises:
        ValueError: the metric, the Gram matrix or the way is not one of those above.
    """
    if metric not in (known := [one.value for one in Metric]):
        raise ValueError(f"metric must be one of {', '.join(map(repr, known))}, got {metric!r}.")
    if gram != "exact" and not isinstance(gram, Sketch):
        raise ValueError(f'gram must be "exact" or a Sketch, got {gram!r}.')
    uses = [factors] if isinstance(factors, Factors) else list(factors)
    spec = GramSpec(
        shapes={"parameter": target.shape},
        target={"parameter": target},
        precondition=lambda name, reference: preconditioner,
        metrics=[Metric(metric)],
        dtype=torch.promote_types(torch.float32, target.dtype),
        device=target.device,
        memory_limit=DEFAULT_MEMORY_LIMIT if memory_limit is None else memory_limit,
        buffer=Buffer() if buffer is None else buffer,
        way=way,
    )
    everyone = torch.ones(uses[0].count, dtype=torch.bool)
    sums = SketchSums(spec, everyone, sketch=gram, seed=seed) if isinstance(gram, Sketch) else GramSums(spec, everyone)
    taken = sums.add("parameter", uses)
    found = on_host(sums.products())[0][Metric(metric)]
    return FormedProducts(
        gram=found.gram,
        cross_gram=found.cross_gram,
        target_energy=float(found.target_energy),
        error=float(found.error),
        way=taken,
    )


def matching_with_targets(gram: Tensor, targets: int) -> Matching:
    """The matching problem of candidates and target rows that take part in a step, from their inner products alone.

    Args:
        gram: shape ``(n + m, n + m)``, the target rows behind the candidates.
        targets: ``m``, at least 2.
    """
    n = len(gram)
    products = replace(Products.zeros(n, dtype=gram.dtype, device=gram.device), gram=gram)
    found = leaving_one_out(products, targets, remembered=0.0)
    return Matching(
        gram=gram,
        cross_gram=found.cross_gram,
        target_energy=float(found.target_energy),
        losses=torch.zeros(n),
        generator=torch.Generator().manual_seed(0),
        cross_gram_error=found.cross_gram_error,
    )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedShare:
    """The inputs of one parameter's share of a Gram matrix; made by :func:`recorded`.

    Candidate ``i`` has the gradient ``factors[0].g_i + factors[1].g_i + ...``, and the share is ``<g_i, P g_j>``.

    Attributes:
        name: the parameter's name.
        factors: the factors, with one row of positions for each candidate and the scale of the losses divided out.
        shape: the parameter's shape.
        reference: the gradient at which ``P`` was taken.
        preconditioner: ``P``; it may share memory with the inner optimizer's state, so read it before the next step.
    """

    name: str
    factors: tuple[Factors, ...]
    shape: torch.Size
    reference: Tensor
    preconditioner: Preconditioner


@contextmanager
def recorded(optimizer: SelectiveOptimizer) -> Iterator[list[RecordedShare]]:
    """A block that records each parameter's share of the Gram matrix; gives a list to which backward calls append.

    The Gram matrix of a backward is the sum of the shares of its parameters. With a :class:`Sketch` each micro-batch
    has shares of its own. A backward that starts again, without candidates that turned out not to be finite, appends
    all shares again. The list keeps the factors alive, also where a step would drop them.

    Args:
        optimizer: the optimizer to record; it makes the same steps, and neither copies nor pickles of it record.

    Raises:
        TypeError: ``optimizer`` is no :class:`SelectiveOptimizer`, for example a wrapper around one.
        RuntimeError: the optimizer is being recorded already.
    """
    if not isinstance(optimizer, SelectiveOptimizer):
        raise TypeError(f"Expected a SelectiveOptimizer, got {type(optimizer).__name__}. Give the one inside of it.")
    if optimizer._observe is not None:
        raise RuntimeError("Expected an optimizer that is not being recorded; leave the first recorded() before.")
    shares: list[RecordedShare] = []

    def observe(name: str, block: Block, reference: Tensor, preconditioner: Preconditioner) -> None:
        shares.append(
            RecordedShare(
                name=name,
                factors=tuple(block.uses),
                shape=block.shape,
                reference=reference.clone(),
                preconditioner=preconditioner,
            )
        )

    optimizer._observe = observe
    try:
        yield shares
    finally:
        del optimizer._observe


def _wide(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value


def _axis(whole: Tensor, one: Tensor) -> int | None:
    """The axis in which the output for one candidate differs from that for all; None where there is none.

    With a single candidate there is no difference: then it is the first axis, if that has length one.
    """
    differing = [dim for dim, (a, b) in enumerate(zip(whole.shape, one.shape, strict=True)) if a != b]
    return differing[0] if differing else 0 if whole.ndim and len(whole) == 1 else None


def _losses(outputs: Sequence[Tensor], n: int, seed: int) -> Tensor:
    """The losses of ``n`` rows: a non-linear function of all outputs, with the same random weights for every row."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(n, dtype=torch.float64)
    for output in outputs:
        rows = output.reshape(n, -1).double().cpu()
        weights = torch.randn(rows.shape[1], dtype=torch.float64, generator=generator)
        total = total + (weights * torch.sin(rows + 0.5)).sum(1) + 0.1 * rows.square().sum(1)
    return total
