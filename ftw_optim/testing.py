"""The oracle of the layer rules, for authors of layers, and what a step does inside, for those who measure it.

:func:`check_layer` compares what is captured with autograd's, one candidate at a time. :func:`products_of` forms one
parameter's Gram matrix as a step does, and :func:`recorded` notes what a step forms its own from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ftw_optim._capture.capture import Capture
from ftw_optim._capture.coverage import Coverage, coverage
from ftw_optim._capture.plan import plan
from ftw_optim._factors.factors import Factors, weighted_sum
from ftw_optim._gram.blocks import Block
from ftw_optim._gram.blocks import Buffer as Buffer
from ftw_optim._gram.exact import GramSums
from ftw_optim._gram.inner_products import on_host
from ftw_optim._gram.metric import Metric
from ftw_optim._gram.sketch import Sketch, SketchSums
from ftw_optim._gram.spec import DEFAULT_MEMORY_LIMIT, GramSpec
from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._step.optimizer import SelectiveOptimizer

__all__ = ["Buffer", "FormedProducts", "RecordedShare", "check_layer", "products_of", "recorded"]


def check_layer(
    module: nn.Module,
    inputs: Tensor | Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-12,
    seed: int = 0,
) -> Coverage:
    """Check that every candidate's captured gradient of a module's parameters is autograd's of that candidate alone.

    The module runs once on all candidates, captured, and once on each candidate by itself; both under losses that are a
    random non-linear function of all its outputs. It runs on a copy in float64.

    Args:
        module: a layer, or a model of several. With dropout in it, call ``eval()`` first: on one candidate alone it
            would draw other masks.
        inputs: its positional inputs. In each tensor whose first axis is as long as that of the first one, this axis
            is the candidate's; other inputs are shared by all candidates.
        kwargs: its keyword inputs, read alike.
        rtol: largest difference, relative to the norm of the largest candidate's gradient of the same parameter.
        atol: difference that counts as rounding where all gradients of a parameter are next to zero.
        seed: of the losses.

    Returns:
        The coverage of the module: which rule captured what.

    Raises:
        AssertionError: a gradient differs; names the parameter, the rule, the candidate and by how much.
        NotImplementedError: a parameter cannot be captured; says why.
        ValueError: there is no candidate, or no parameter requires a gradient.
    """
    args: tuple[Any, ...] = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    args, options = tree_map_only(Tensor, _wide, (args, dict(kwargs or {})))
    first = next((leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None or not len(first):
        raise ValueError("Expected inputs with a tensor whose first axis is the candidate's, of length one at least.")
    n = len(first)
    plan(module, {name for name, p in module.named_parameters() if p.requires_grad})  # says what cannot be captured
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

    table = coverage(module)
    with Capture(module, plan(module, parameters)) as capture:
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
                    f"The gradient of {name} (rule: {table[name].rule}) for candidate {row} of {n} is off by "
                    f"{error:.1e}, where the largest candidate's has the norm {size:.1e}; expected {rtol:.0e} of it at "
                    "most."
                )
    return table


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FormedProducts:
    """Inner products of the candidates' gradients of one parameter, on the CPU; made by :func:`products_of`.

    Attributes:
        gram: shape (n, n).
        cross_gram: shape (n,), with the target gradient.
        target_energy: of the target gradient with itself.
        error: standard error of each over the norms it is of; zero where they are exact.
        way: that was taken: ``"materialised"`` (gradients multiplied out), ``"tokens"`` (over pairs of positions) or,
            in a sketch, ``"convolved"`` (both sides of the outer products apart).
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
        factors: of the candidates' gradients; several where the parameter is used several times.
        target: the parameter's target gradient, of its shape.
        preconditioner: ``P``.
        metric: as that of :class:`SelectiveOptimizer`.
        gram: ``"exact"``, or a :class:`Sketch`.
        way: ``"materialised"``, or ``"tokens"`` (``"convolved"`` in a sketch), which is taken where a map as simple as
            a scalar or :class:`RankOne` meets dense factors of a matrix; None: the one that should cost less.
        memory_limit: bytes of multiplied-out gradients that may exist at a time; None: 256 MiB.
        seed: of the sketch.
        buffer: memory for those gradients that outlives the call, as it outlives a step; None: fresh memory.

    Raises:
        ValueError: the metric, the Gram matrix or the way is none of those above.
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


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedShare:
    """What one parameter's share of a Gram matrix was formed from; made by :func:`recorded`.

    Candidate ``i`` has the gradient ``factors[0].g_i + factors[1].g_i + ...``, and the share is ``<g_i, P g_j>``.

    Attributes:
        name: of the parameter.
        factors: with one row of positions for each candidate; the scale of the losses is divided out.
        shape: of the parameter.
        reference: the gradient that ``P`` was taken at.
        preconditioner: ``P``; it may share memory with the inner optimizer's state, so read it before the next step.
    """

    name: str
    factors: tuple[Factors, ...]
    shape: torch.Size
    reference: Tensor
    preconditioner: Preconditioner


@contextmanager
def recorded(optimizer: SelectiveOptimizer) -> Iterator[list[RecordedShare]]:
    """A list that grows, while it is entered, by each parameter that a backward adds to its Gram matrix.

    The matrix of a backward is the sum of their shares. With a :class:`Sketch` each micro-batch has its own; a backward
    that begins anew, without candidates that turned out not to be finite, adds all of them anew. The list keeps the
    factors alive, also where a step would drop them.

    Args:
        optimizer: not changed; neither copies nor pickles of it record.

    Raises:
        TypeError: it is no :class:`SelectiveOptimizer` but something around one.
        RuntimeError: it is being recorded already.
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
    """The axis in which the output for one candidate is shorter; None where there is none, unless they are equal."""
    differing = [dim for dim, (a, b) in enumerate(zip(whole.shape, one.shape, strict=True)) if a != b]
    return differing[0] if differing else 0 if whole.ndim and len(whole) == 1 else None


def _losses(outputs: Sequence[Tensor], n: int, seed: int) -> Tensor:
    """A function of each row of all outputs, with weights that are the same for every row."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(n, dtype=torch.float64)
    for output in outputs:
        rows = output.reshape(n, -1).double().cpu()
        weights = torch.randn(rows.shape[1], dtype=torch.float64, generator=generator)
        total = total + (weights * torch.sin(rows + 0.5)).sum(1) + 0.1 * rows.square().sum(1)
    return total
