"""An optimizer around another one, which schedulers, scalers and checkpoints can use like the inner one."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class OptimizerWrapper(Optimizer):
    """An optimizer whose groups, state and defaults are the inner optimizer's; hooks and pickling are its own.

    Groups, state and defaults are properties, not aliases, since ``load_state_dict`` rebinds the inner objects. There
    is no ``__getattr__``: if a fused Adam's flags were forwarded, a GradScaler would unscale twice.

    Attributes:
        optimizer: the inner optimizer.
    """

    EXTRA_KEY = "selective"
    """The key under which :meth:`state_dict` keeps the extra state; a bare optimizer ignores it."""

    def __init__(self, optimizer: Optimizer) -> None:
        # Not Optimizer.__init__: it would make groups and state of its own.
        self.optimizer = optimizer
        self._reset_hooks()

    def _reset_hooks(self) -> None:
        for name in _HOOKS:
            setattr(self, name, OrderedDict())
        self._warned_capturable_if_run_uncaptured = True  # read by torch.optim
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The inner optimizer's state; the wrapper adds nothing to it."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def train(self) -> None:
        """Switch a schedule-free inner optimizer to its training parameters; nothing for other optimizers."""
        if callable(train := getattr(self.optimizer, "train", None)):
            train()

    def eval(self) -> None:
        """Switch a schedule-free inner optimizer to its parameters for evaluation and saving; nothing for others."""
        if callable(evaluate := getattr(self.optimizer, "eval", None)):
            evaluate()

    def extra_state(self) -> dict[str, Any]:
        """The extra state for a checkpoint, beside the inner optimizer's: plain tensors and containers of them."""
        raise NotImplementedError

    def read_extra_state(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """The attributes restored from :meth:`extra_state`, by name; ``extra`` is None if the checkpoint has none."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with one further top-level key, which a bare optimizer ignores."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = {**self.optimizer.state_dict(), self.EXTRA_KEY: self.extra_state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of a wrapped or a bare optimizer; without our key the extra state starts anew."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else dict(changed)
        attributes = self.read_extra_state(state_dict.pop(self.EXTRA_KEY, None))
        self.optimizer.load_state_dict(state_dict)
        self.__dict__.update(attributes)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as those of every optimizer do, and so does a scheduler's patch of this instance's step.
        left_behind = {*_HOOKS, "step"}
        return {name: value for name, value in self.__dict__.items() if name not in left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_hooks()
