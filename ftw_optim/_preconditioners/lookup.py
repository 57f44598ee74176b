"""The preconditioner of one parameter of a live optimizer: by its class, by its state, or by trying it out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from ftw_optim._preconditioners.look_ahead import STACKED
from ftw_optim._preconditioners.maps import Diagonal, Preconditioner, Scalar
from ftw_optim._preconditioners.probing.probe import (
    NotElementwise,
    agrees_with_trial,
    check_separable,
    couples_decay,
    follows_signs,
    probed,
)
from ftw_optim._preconditioners.registry import registered_rule
from ftw_optim._preconditioners.rules.adam import adam
from ftw_optim._preconditioners.stacking import Numbers, StackedState, numbers_of, together

LOOK_EVERY = 16
"""Steps between two probes of an optimizer that no rule knows."""


@final
@dataclass
class _Looks:
    """The results of probing an optimizer's parameters, by the identity of the parameter."""

    count: dict[int, int] = field(default_factory=dict)
    like_adam: dict[int, bool] = field(default_factory=dict)
    couples_decay: dict[int, bool] = field(default_factory=dict)
    refusals: dict[int, NotElementwise] = field(default_factory=dict)
    warned: bool = False

    def due(self, param: Tensor, *, with_history: bool) -> bool:
        """Whether to probe again: at calls 1, 2, 4 and 8, then every :data:`LOOK_EVERY`, since some optimizers change.

        Calls with and without history (a filled state) are counted separately: some updates only seem element-wise
        before the state is filled.
        """
        key = 2 * id(param) + with_history
        count = self.count[key] = self.count.get(key, 0) + 1
        return count & (count - 1) == 0 or count % LOOK_EVERY == 0


class Kind(NamedTuple):
    """What parameters have in common that one map, stacked, can serve."""

    group: int
    dtype: torch.dtype
    state: tuple[str, ...]
    numbers: Numbers


_looks: WeakKeyDictionary[Optimizer, _Looks] = WeakKeyDictionary()


def learning_rate_is_zero(optimizer: Optimizer) -> bool:
    """Whether the learning rate of every group is zero, as before a scheduler's first step."""
    return all(_is_zero(group.get("lr")) for group in optimizer.param_groups)


def _is_zero(rate: Any) -> bool:
    return rate is not None and float(rate) == 0.0


class Preconditioners:
    """The preconditioners of an optimizer's coming step; one object for each step.

    Args:
        optimizer: the inner optimizer.
        unknown_as_identity: where no preconditioner is found, take the learning rate times the identity and warn once.
    """

    def __init__(self, optimizer: Optimizer, *, unknown_as_identity: bool = False) -> None:
        self._optimizer = optimizer
        self._unknown_as_identity = unknown_as_identity
        self._known = registered_rule(optimizer)
        self._looks = _looks.setdefault(optimizer, _Looks())
        self._learning_rate_is_zero = learning_rate_is_zero(optimizer)

    def __call__(self, param: Tensor, group: dict[str, Any], reference: Tensor | None) -> Preconditioner:
        """``P`` of one parameter of a group; see :func:`ftw_optim.preconditioner_of`."""
        if param.is_complex():
            raise NotImplementedError(
                "Expected real parameters, got a complex one. Hold its real and imaginary parts (torch.view_as_real)."
            )
        state = self._optimizer.state.get(param, {})
        with torch.no_grad():
            if self._known is not None:
                return self._known.rule(param, self._settings(group), state, reference)
            group = self._settings(group)
            if _is_zero(group.get("lr")):
                return Scalar(0.0)  # whatever the optimizer does, the coming gradient moves nothing
            try:
                due = self._looks.due(param, with_history=bool(state))
                group = self._with_its_decay(param, group, reference, due=due)
                if self._is_like_adam(param, group, state, reference, due=due):
                    return adam(param, group, state, reference)
                return self._tried(param, group, reference, due=due)
            except Exception as error:  # whatever an optimizer that is tried on a copy may raise
                return self._unknown(group, error)

    def _settings(self, group: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The group as rules get it: with the optimizer's own attributes, and a learning rate that is not zero."""
        own = {} if self._known is None else {name: getattr(self._optimizer, name) for name in self._known.attributes}
        if self._learning_rate_is_zero:
            own["lr"] = 1.0
        return {**group, **own, **more} if own or more else group

    def kinds(self, params: Mapping[str, Tensor], groups: Mapping[str, dict[str, Any]]) -> dict[str, Kind]:
        """What each parameter has in common with those that :meth:`stacked` takes beside it; those alone are left out.

        Args:
            params: the parameters, by name.
            groups: the group of each.
        """
        if self._known is None or not self._known.stacks:
            return {}
        some = {name: param for name, param in params.items() if param.numel() > 1 and not param.is_complex()}
        states = [self._optimizer.state.get(param, {}) for param in some.values()]
        numbers = numbers_of(states, [param.shape for param in some.values()])
        return {
            name: Kind(id(groups[name]), param.dtype, tuple(state), own)
            for (name, param), state, own in zip(some.items(), states, numbers, strict=True)
            if own is not None
        }

    def stacked(self, params: Sequence[Tensor], group: dict[str, Any], reference: Tensor) -> Scalar | Diagonal:
        """One map for parameters of one shape and one of the :meth:`kinds`, at their references ``(B, *shape)``."""
        assert self._known is not None
        state = StackedState([self._optimizer.state.get(param, {}) for param in params])
        with torch.no_grad():
            settings = self._settings(group, **{STACKED: True})
            found = self._known.rule(together(params, group), settings, cast(dict[str, Any], state), reference)
        if not isinstance(found, Scalar | Diagonal):
            raise TypeError(
                f"The rule of {type(self._optimizer).__name__} is registered with stacks=True: expected a Scalar or a "
                f"Diagonal for {len(params)} stacked parameters, got {type(found).__name__}."
            )
        return found

    def _with_its_decay(
        self, param: Tensor, group: dict[str, Any], reference: Tensor | None, *, due: bool
    ) -> dict[str, Any]:
        """The group with ``decoupled_weight_decay`` set where it has weight decay and does not say whether coupled."""
        if not group.get("weight_decay") or "decoupled_weight_decay" in group:
            return group
        if due or id(param) not in self._looks.couples_decay:
            expected = torch.ones_like(param) if reference is None else reference
            try:
                coupled = couples_decay(self._optimizer, param, group, expected)
            except Exception:  # it cannot be tried on a copy, as others will say
                coupled = False
            self._looks.couples_decay[id(param)] = coupled
        return {**group, "decoupled_weight_decay": not self._looks.couples_decay[id(param)]}

    def _is_like_adam(
        self, param: Tensor, group: dict[str, Any], state: dict[str, Any], reference: Tensor | None, *, due: bool
    ) -> bool:
        """Whether the state has Adam's names, and a step on a copy does what Adam's rule says."""
        if not ({"exp_avg", "exp_avg_sq"} <= state.keys() and {"lr", "betas", "eps"} <= group.keys()):
            return False
        if due or id(param) not in self._looks.like_adam:
            try:
                alike = agrees_with_trial(adam, self._optimizer, param, group, reference)
            except NotElementwise:
                alike = False
            except Exception as error:  # such as a kernel that takes other devices or precisions than the copy's
                alike = True
                self._warn(
                    f"{torch.typename(type(self._optimizer))} has the state of Adam and cannot be tried on a copy "
                    f"({error}): it is taken for Adam."
                )
            self._looks.like_adam[id(param)] = alike
        return self._looks.like_adam[id(param)]

    def _warn(self, message: str) -> None:
        if not self._looks.warned:
            self._looks.warned = True
            warnings.warn(message, stacklevel=2)

    def _tried(self, param: Tensor, group: dict[str, Any], reference: Tensor | None, *, due: bool) -> Preconditioner:
        """``P`` from two steps on a copy, after a check that the update is element-wise at all."""
        if due:
            expected = torch.ones_like(param) if reference is None else reference
            try:
                check_separable(self._optimizer, param, group, expected)
            except NotElementwise as refusal:
                self._looks.refusals[id(param)] = refusal
            if follows_signs(self._optimizer, param, group, expected):
                self._warn(
                    f"The step of {torch.typename(type(self._optimizer))} follows signs alone, which no linear map "
                    "describes: entries that the coming gradient cannot turn count as nothing, and predicted_decrease "
                    "is approximate."
                )
        if id(param) in self._looks.refusals:
            raise self._looks.refusals[id(param)]
        return probed(self._optimizer, param, group, reference)

    def _unknown(self, group: dict[str, Any], error: Exception) -> Scalar:
        cls = type(self._optimizer)
        unknown = (
            f"No preconditioner is known for {torch.typename(cls)}, and trying it on a copy did not tell one: {error}."
        )
        if not self._unknown_as_identity:
            raise NotImplementedError(
                f"{unknown} Register one with @register_preconditioner({cls.__name__}), or ask for "
                'metric="euclidean", which ignores the optimizer.'
            ) from error
        self._warn(f"{unknown} Its learning rate times the identity takes its place.")
        return Scalar(float(group.get("lr") or 1.0))
