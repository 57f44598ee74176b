"""The extra state in a checkpoint, beside the inner optimizer's: plain tensors and containers of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ftw_optim._step.watch import Watch


def written_state(backwards: int, seed: int, target: Mapping[str, Tensor] | None, watch: Watch) -> dict[str, Any]:
    """The extra state: number of selections, seed and, where they must outlive a step, target gradient and watch."""
    extra: dict[str, Any] = {"backwards": torch.tensor(backwards), "seed": torch.tensor(seed)}
    if target is not None:
        extra["target"] = dict(target)
    if not watch.new:
        extra["watch"] = watch.state_dict()
    return extra


def read_state(
    extra: Any, key: str, model: nn.Module, *, seed: int
) -> tuple[int, int, dict[str, Tensor] | None, Watch]:
    """The arguments that :func:`written_state` was given, read back from its result.

    Args:
        extra: the extra state; None where a checkpoint holds none.
        key: the key of the extra state in a state dict, for the message.
        model: the model; the target gradient is put on the devices of its parameters.
        seed: the seed to return where the checkpoint holds no extra state.

    Raises:
        ValueError: ``extra`` is not such a state, or its target gradient is that of another model.
    """
    if extra is None:
        return 0, seed, None, Watch()
    if not (isinstance(extra, Mapping) and {"backwards", "seed"} <= extra.keys()):
        raise ValueError(
            f"Expected {key!r} of the state dict to hold 'backwards' and 'seed', got "
            f"{sorted(extra) if isinstance(extra, Mapping) else extra!r}. Remove the key to load the inner "
            "optimizer's state alone."
        )
    target, parameters = extra.get("target"), dict(model.named_parameters())
    if target is not None:  # a run with DDP around the model and one without it go on from each other
        target = {_as_in(parameters, name): gradient for name, gradient in target.items()}
    for name, gradient in (target or {}).items():
        if name in parameters and gradient.shape != parameters[name].shape:
            raise ValueError(
                f"Expected the kept target gradient of {name} in the shape {tuple(parameters[name].shape)}, got "
                f"{tuple(gradient.shape)}: the checkpoint is of another model."
            )
    if target is not None:
        target = {
            name: gradient.to(parameters[name].device if name in parameters else gradient.device)
            for name, gradient in target.items()
        }
    return int(extra["backwards"]), int(extra["seed"]), target, Watch.from_state(extra.get("watch"))


def _as_in(parameters: Mapping[str, Tensor], name: str) -> str:
    """The name that a parameter has in this model, if it differs by the prefix of a wrapper."""
    others = (name, name.removeprefix(_WRAPPED), _WRAPPED + name)
    return next((other for other in others if other in parameters), name)


_WRAPPED = "module."
