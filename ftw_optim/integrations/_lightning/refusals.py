"""Refusals: hooks of a module that selection would hide, and settings of a trainer that it cannot do."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

POOLS = ("window", "batch")


def refuse_hidden_hooks(module_class: type[LightningModule], mixin: type[LightningModule]) -> None:
    """Raise a TypeError if a class has a hook that would hide the mixin's, or that the mixin's would hide.

    A ``training_step`` of a base class behind the mixin may be there: ``candidate_losses`` takes its place.
    """
    if module_class.training_step is not mixin.training_step:
        raise TypeError(
            f"Expected {module_class.__name__} to define candidate_losses(batch) in the place of training_step, and to "
            f"name {mixin.__name__} before its other bases: a training_step of its own would hide the selective one."
        )
    for base in module_class.__mro__:
        if "backward" in vars(base) and base is not mixin and not issubclass(LightningModule, base):
            raise TypeError(_backward(f"{base.__name__}.backward"))


def refuse_replaced_hooks(module: LightningModule) -> None:
    """Raise a TypeError if such a hook has been put on the instance."""
    if "backward" in vars(module):
        raise TypeError(_backward("a backward that is set on the instance"))
    if "training_step" in vars(module):
        raise TypeError(
            "Expected candidate_losses(batch) in the place of training_step, got a training_step that is set on the "
            "instance, as torch.compile(module) does: compile the model inside of the module instead."
        )


def _backward(found: str) -> str:
    return (
        f"Expected no backward of one's own, got {found}: gradients come from the selection among candidates, and not "
        "from the loss. Scale the losses in candidate_losses, look at gradients in on_after_backward or "
        "on_before_optimizer_step, and change them in configure_gradient_clipping."
    )


def refuse_settings(module: Any, trainer: Trainer) -> None:
    """Raise an error if a fit would not do what its settings say."""
    strategy = trainer.strategy
    if type(strategy) is not DDPStrategy and not isinstance(strategy, SingleDeviceStrategy):  # DeepSpeed's is a kind
        raise NotImplementedError(
            f"Expected SingleDeviceStrategy or DDPStrategy, got {type(strategy).__name__}: one selection among the "
            'candidates of all of its processes is not supported. Use Trainer(devices=1), or strategy="ddp".'
        )
    if not module.automatic_optimization:
        raise ValueError(
            "Expected automatic_optimization to be True, got False: SelectiveModuleMixin selects within Lightning's "
            "own optimisation, with one optimizer: give all parameters to one, in groups. For a loop of your own use "
            "SelectiveOptimizer, without the mixin."
        )
    if module.select_from not in POOLS:
        raise ValueError(f"select_from must be one of {POOLS}, got {module.select_from!r}.")
