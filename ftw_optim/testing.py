"""The oracle of the layer rules, for authors of layers: what is captured against autograd, one candidate at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ftw_optim._capture import Capture
from ftw_optim._factors import weighted_sum
from ftw_optim._layers.coverage import Coverage, coverage
from ftw_optim._plan import plan

__all__ = ["check_layer"]


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
