"""The factors of a layer's parameters, formed from the output gradients that arrived at the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from ftw_optim._capture.layer_use import Use, versions_of
from ftw_optim._capture.layouts import FOLDED
from ftw_optim._capture.replay.fallback import NotRepeatable, Output, per_candidate
from ftw_optim._capture.self_check import WAYS_OUT, tolerance
from ftw_optim._factors.factors import Factors, PositionMap
from ftw_optim._factors.row_groups import RowGroups
from ftw_optim._layers.registry import LayerRule


def factors_of(
    use: Use, parameters: Mapping[str, nn.Parameter], count: int, groups: RowGroups | None = None
) -> list[tuple[str, Factors]]:
    """The factors that one use of a layer gives its parameters, each with the parameter's name in the model.

    A gradient must have reached the use, and the caller must have disabled gradients. A parameter that the layer has in
    several places comes once for each place. With ``groups`` the rows are attributed one by one, as candidates are
    without, and grouped afterwards; but not where a layer's own ``sample_ids`` name the candidates.

    Raises:
        NotImplementedError: the candidates of the layer cannot be told apart, or the module cannot be run again.
        RuntimeError: an input was changed in place, or the rule returned a gradient of the wrong shape or none.
        TypeError: the rule returned something other than a mapping.
        ValueError: the layer ran on another number of rows than there are losses.
    """
    owner = use.owner
    if use.layout.sample_ids is not None:
        groups = None
    candidates, count = count, count if groups is None else groups.rows
    if use.layout.trouble is not None:
        _refuse_layout(use, use.layout.trouble)
    if use.in_place:
        raise NotImplementedError(
            f"Layer {owner.name!r} changed an input in place, so it cannot be run again on what it got. Use the "
            f"out-of-place form of that operation (x = x + y, not x += y). {WAYS_OUT}"
        )
    if use.shared and any(one.changed for one in use.returned):
        raise RuntimeError(
            f"Layer {owner.name!r} returned tensors that share memory, and one of them was changed in place, which no "
            f"longer changes the others. Use the out-of-place form of that operation. {WAYS_OUT}"
        )
    if use.versions != versions_of(use.call):
        raise RuntimeError(
            f"An input of layer {owner.name!r} was changed in place after the layer had read it, so its gradient can "
            "no longer be formed. Use the out-of-place form of that operation."
        )
    given = _replayed(use, parameters, count) if owner.rule is None else _by_rule(use)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"The rule {_rule_name(use)!r} of layer {owner.name!r} must return a mapping from parameter names to "
            f"factors or gradients, got {type(given).__name__}."
        )
    found = []
    for local, name in owner.parameters.items():
        value = given.get(local)
        if value is None:
            raise RuntimeError(
                f"The rule {_rule_name(use)!r} returned no gradient for {local!r} of layer {owner.name!r}; expected "
                "one for each of its trainable parameters."
            )
        factors = _as_factors(use, value, parameters[name], count)
        if factors.rows * factors.columns != parameters[name].numel():
            raise RuntimeError(
                f"The rule {_rule_name(use)!r} returned gradients of {factors.rows} x {factors.columns} entries for "
                f"{name}, expected its shape {tuple(parameters[name].shape)} for each candidate, as factors or as a "
                "tensor with the candidates in front."
            )
        if factors.count != count:
            told = "" if groups is None else f" and sample_ids has {count} rows"
            raise ValueError(
                f"The closure returned {candidates} losses{told}, but layer {owner.name!r} ran on {factors.count} "
                "rows. Expected one loss for each row of the model's input, or for each candidate that sample_ids "
                "names; call the model itself (not a part of it), on all candidates at once."
            )
        found.append((name, factors if groups is None else groups.grouped(factors)))
    return found


def _by_rule(use: Use) -> Mapping[str, Factors | Tensor]:
    rule, call = use.owner.rule, use.call
    assert isinstance(rule, LayerRule)
    grads: Any
    if use.several is None:
        grads = use.returned[0].gradient
    else:
        by_index = {one.index: one.gradient for one in use.returned}
        grads = tuple(by_index.get(index) for index in range(use.several))
    if not rule.replays:
        return rule.function(call.module, call.inputs(), grads)
    with call.replayed():
        return rule.function(call.module, call.inputs(), grads)


def _replayed(use: Use, parameters: Mapping[str, nn.Parameter], count: int) -> Mapping[str, Tensor]:
    outputs = [
        Output(index=one.index, value=one.value, changed=one.changed, grad=one.gradient, axis=one.axis)
        for one in use.returned
        if one.gradient is not None and one.value is not None
    ]
    own = {local: parameters[name] for local, name in use.owner.parameters.items()}
    dtypes = [use.computed_in, *(parameter.dtype for parameter in own.values())]
    try:
        return per_candidate(
            use.call,
            own,
            outputs,
            count,
            tolerance=tolerance(dtypes),
            sample_ids=use.layout.sample_ids,
            whole=use.chooses,
        )
    except NotRepeatable as error:
        raise NotImplementedError(
            f"Expected to run {type(use.call.module).__name__} (layer {use.owner.name!r}) again, candidate by "
            f"candidate, for the gradients of {', '.join(use.owner.parameters.values())}, but that failed: {error}. "
            f"{WAYS_OUT}"
        ) from error


def _as_factors(use: Use, value: Factors | Tensor, parameter: Tensor, count: int) -> Factors:
    """The value that a rule returned, as factors with the candidates as first axis."""
    ids = use.layout.sample_ids
    if isinstance(value, Tensor):
        if use.owner.rule is not None and ids is not None:
            value = _summed(use, value, ids, count)
        if use.layout.reading == FOLDED:
            value = value.reshape(count, -1, *value.shape[1:]).sum(1)
        # A scale or a shift is already summed over positions: where terms cancelled, it may be rounding alone.
        return Factors.explicit(value, parameter, terms=use.gradient_norm() if parameter.ndim < 2 else None)
    if value.positions is not None:
        return value
    if ids is None:
        return value.folded(count) if use.layout.reading == FOLDED else value
    rows = ids if ids.ndim == 2 else ids[None]
    value = value.folded(len(rows))
    times, rest = divmod(value.left.shape[1], max(1, rows.shape[1]))
    if rest or len(value.left) != len(rows):
        _refuse_layout(use, "as many positions as sample_ids has")
    grid = PositionMap(candidates=rows.to(value.left.device), count=count)
    return replace(value, positions=grid.repeated(times))


def _summed(use: Use, value: Tensor, ids: Tensor, count: int) -> Tensor:
    """The gradients of candidates, from those of rows that each belong to one candidate or to none."""
    if ids.ndim != 1 or len(value) != len(ids):
        _refuse_layout(use, "positions that sample_ids can tell apart")
    ids = ids.to(value.device)
    return value.new_zeros(count, *value.shape[1:]).index_add(0, ids[ids >= 0], value[ids >= 0])


def _refuse_layout(use: Use, expected: str) -> NoReturn:
    first = next(iter(use.call.tensors()), None)
    raise NotImplementedError(
        f"Expected layer {use.owner.name!r} to take inputs with {expected}, got shape "
        f"{None if first is None else tuple(first.shape)}: which candidate a position belongs to is not known. "
        f"{WAYS_OUT}"
    )


def _rule_name(use: Use) -> str:
    return use.owner.rule.name if isinstance(use.owner.rule, LayerRule) else "fallback"
